#include "copy_device.h"
#include "errors.h"

#ifdef MOEVEMENT_WITH_CUDA

#include <cuda_runtime_api.h>

#include <string>
#include <vector>

namespace moevement {
namespace {

void check(cudaError_t code, const char* call, const char* here) {
  if (code == cudaSuccess) return;
  // Clears the error of this thread when it is not sticky, so that the next call does not report it again.
  (void)cudaGetLastError();
  throw EngineError(std::string(call) + ": " + cudaGetErrorName(code) + ", " + cudaGetErrorString(code) + here);
}

#define MOEVEMENT_CUDA(call) check((call), #call, MOEVEMENT_HERE)

// Callers keep their own current device; the engine's differs from it on a node with several GPUs.
class DeviceGuard {
 public:
  explicit DeviceGuard(int index) {
    MOEVEMENT_CUDA(cudaGetDevice(&before_));
    if (before_ != index) MOEVEMENT_CUDA(cudaSetDevice(index));
    changed_ = before_ != index;
  }
  ~DeviceGuard() {
    if (changed_) (void)cudaSetDevice(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

class Event {
 public:
  Event() { MOEVEMENT_CUDA(cudaEventCreateWithFlags(&event_, cudaEventDisableTiming)); }
  ~Event() { (void)cudaEventDestroy(event_); }
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;
  cudaEvent_t get() const { return event_; }

 private:
  cudaEvent_t event_ = nullptr;
};

class SideStream {
 public:
  // Non-blocking: work on the legacy default stream must not wait for snapshot copies, nor they for it.
  SideStream() { MOEVEMENT_CUDA(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking)); }
  ~SideStream() { (void)cudaStreamDestroy(stream_); }
  SideStream(const SideStream&) = delete;
  SideStream& operator=(const SideStream&) = delete;
  cudaStream_t get() const { return stream_; }

 private:
  cudaStream_t stream_ = nullptr;
};

// The worker asks for the fence before it starts the first chunk, and also orders the side stream behind it. The order
// alone would be correct, but a chunk that waits on the GPU behind a collective that never ends cannot be cancelled.
class StreamFence final : public Fence {
 public:
  StreamFence(cudaStream_t stream, cudaStream_t side) : side_(side) {
    MOEVEMENT_CUDA(cudaEventRecord(event_.get(), stream));
  }
  bool passed() override {
    const cudaError_t code = cudaEventQuery(event_.get());
    if (code == cudaErrorNotReady) {
      (void)cudaGetLastError();
      return false;
    }
    check(code, "cudaEventQuery(fence)", MOEVEMENT_HERE);
    MOEVEMENT_CUDA(cudaStreamWaitEvent(side_, event_.get(), 0));
    return true;
  }

 private:
  Event event_;
  cudaStream_t side_;
};

class CudaDevice final : public CopyDevice {
 public:
  CudaDevice(int index, std::size_t slots) : index_(index) {
    int count = 0;
    MOEVEMENT_CUDA(cudaGetDeviceCount(&count));
    if (index < 0 || index >= count) {
      throw EngineError("no CUDA device " + std::to_string(index) + ": " + std::to_string(count) + " visible" +
                        MOEVEMENT_HERE);
    }
    const DeviceGuard guard(index_);
    side_ = std::make_unique<SideStream>();
    for (std::size_t slot = 0; slot < slots; ++slot) chunks_.push_back(std::make_unique<Event>());
  }

  void enter_worker() override { MOEVEMENT_CUDA(cudaSetDevice(index_)); }

  std::unique_ptr<Fence> fence(std::uint64_t stream) override {
    const DeviceGuard guard(index_);
    return std::make_unique<StreamFence>(reinterpret_cast<cudaStream_t>(stream), side_->get());
  }

  void copy(std::uint64_t source, std::uint64_t destination, std::uint64_t bytes) override {
    MOEVEMENT_CUDA(cudaMemcpyAsync(reinterpret_cast<void*>(destination), reinterpret_cast<const void*>(source), bytes,
                                   cudaMemcpyDefault, side_->get()));
  }
  void mark(std::size_t slot) override { MOEVEMENT_CUDA(cudaEventRecord(chunks_[slot]->get(), side_->get())); }
  void finish(std::size_t slot) override { MOEVEMENT_CUDA(cudaEventSynchronize(chunks_[slot]->get())); }
  void drain() noexcept override { (void)cudaStreamSynchronize(side_->get()); }

  bool usable() noexcept override {
    (void)cudaGetLastError();
    const cudaError_t code = cudaStreamQuery(side_->get());
    return code == cudaSuccess || code == cudaErrorNotReady;
  }

  bool register_host(std::uint64_t address, std::uint64_t nbytes) override {
    const DeviceGuard guard(index_);
    // Portable: pinned for the contexts of all devices of this process.
    MOEVEMENT_CUDA(cudaHostRegister(reinterpret_cast<void*>(address), nbytes, cudaHostRegisterPortable));
    return true;
  }
  bool unregister_host(std::uint64_t address) override {
    const DeviceGuard guard(index_);
    MOEVEMENT_CUDA(cudaHostUnregister(reinterpret_cast<void*>(address)));
    return true;
  }

 private:
  int index_;
  std::unique_ptr<SideStream> side_;
  std::vector<std::unique_ptr<Event>> chunks_;
};

}  // namespace

std::unique_ptr<CopyDevice> make_cuda_device(int index, std::size_t slots) {
  return std::make_unique<CudaDevice>(index, slots);
}

const char* cuda_version() {
  static const std::string version =
      std::to_string(CUDART_VERSION / 1000) + "." + std::to_string(CUDART_VERSION % 1000 / 10);
  return version.c_str();
}

}  // namespace moevement

#else  // MOEVEMENT_WITH_CUDA

namespace moevement {

std::unique_ptr<CopyDevice> make_cuda_device(int, std::size_t) {
  throw EngineError(std::string("this build has no CUDA copy engine; build again where the CUDA toolkit is found") +
                    MOEVEMENT_HERE);
}

const char* cuda_version() { return nullptr; }

}  // namespace moevement

#endif  // MOEVEMENT_WITH_CUDA
