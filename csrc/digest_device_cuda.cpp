#include <string>

#include "digest_device.h"
#include "errors.h"

#if defined(MOEVEMENT_WITH_CUDA) && defined(MOEVEMENT_WITH_GATHER)

#include "cuda_support.h"

namespace moevement {
namespace {

// The kernel reads its table in device memory, and writes what it finds to the host at once: a copy of it would stand in
// the queue of the small copies that the training waits for.
class CudaDigestDevice final : public DigestDevice {
 public:
  // Stream, events and memory belong to the device that is current when they are made.
  CudaDigestDevice(int index, const DigestRoom& room)
      : index_(index),
        table_bytes_(room.ranges * sizeof(LeafRange)),
        table_(table_bytes_),
        results_(room.units * kUnitBytes),
        device_table_(table_bytes_) {}

  LeafRange* table() noexcept override { return static_cast<LeafRange*>(table_.get()); }
  const unsigned char* results() const noexcept override { return static_cast<const unsigned char*>(results_.get()); }
  std::uint64_t device_bytes() const noexcept override { return table_bytes_; }

  void start(std::uint32_t ranges, std::uint32_t leaves, std::uint32_t blocks, std::uint64_t stream) override {
    const DeviceGuard guard(index_);
    MOEVEMENT_CUDA(cudaEventRecord(ready_.get(), reinterpret_cast<cudaStream_t>(stream)));
    MOEVEMENT_CUDA(cudaStreamWaitEvent(side_.get(), ready_.get(), 0));
    auto* table = reinterpret_cast<LeafRange*>(device_table_.address());
    MOEVEMENT_CUDA(
        cudaMemcpyAsync(table, table_.get(), ranges * sizeof(LeafRange), cudaMemcpyHostToDevice, side_.get()));
    MOEVEMENT_CUDA(cudaEventRecord(began_.get(), side_.get()));
    check_cuda(static_cast<cudaError_t>(launch_leaf_digests(
                   table, ranges, leaves, reinterpret_cast<std::uintptr_t>(results_.get()), blocks, side_.get())),
               "digest kernel", MOEVEMENT_HERE);
    MOEVEMENT_CUDA(cudaEventRecord(ended_.get(), side_.get()));
  }

  // The stream and not the last event: what was started in part, before an error, counts too.
  bool over() override {
    const DeviceGuard guard(index_);
    return is_over(cudaStreamQuery(side_.get()), "cudaStreamQuery(digests)", MOEVEMENT_HERE);
  }

  double seconds() override {
    float milliseconds = 0;
    MOEVEMENT_CUDA(cudaEventElapsedTime(&milliseconds, began_.get(), ended_.get()));
    return milliseconds / 1e3;
  }

 private:
  int index_;
  std::uint64_t table_bytes_;
  PinnedMemory table_;
  PinnedMemory results_;
  DeviceMemory device_table_;
  // Training's own priority is the least there is, as a rule; nothing here may come before it.
  SideStream side_{StreamPriority::least};
  CudaEvent ready_;
  CudaEvent began_{true};
  CudaEvent ended_{true};
};

}  // namespace

std::unique_ptr<DigestDevice> make_cuda_digest_device(int index, const DigestRoom& room) {
  check_device_index(index);
  const DeviceGuard guard(index);
  return std::make_unique<CudaDigestDevice>(index, room);
}

}  // namespace moevement

#else

namespace moevement {

std::unique_ptr<DigestDevice> make_cuda_digest_device(int, const DigestRoom&) {
  throw EngineError(
      std::string("this build has no digests on the GPU; build again where the CUDA toolkit with nvcc is found") +
      MOEVEMENT_HERE);
}

}  // namespace moevement

#endif
