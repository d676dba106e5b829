#include "copy_device.h"
#include "errors.h"

#ifdef MOEVEMENT_WITH_CUDA

#include <sys/prctl.h>

#include <algorithm>
#include <chrono>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "cuda_support.h"
#include "gather.h"

namespace moevement {
namespace {

// How often the worker looks whether a chunk is over. cudaEventSynchronize would keep a core busy, and get in the way of
// the training's launches in the driver: beside training it was slower, too. The next chunk is on the link meanwhile.
constexpr auto kFinishPollEvery = std::chrono::microseconds(50);

// The worker asks for the fence before it starts the first chunk, and also orders the side streams behind it. The order
// alone would be correct, but a chunk that waits on the GPU behind a collective that never ends cannot be cancelled.
class StreamFence final : public Fence {
 public:
  StreamFence(cudaStream_t stream, std::vector<cudaStream_t> sides) : sides_(std::move(sides)) {
    MOEVEMENT_CUDA(cudaEventRecord(event_.get(), stream));
  }
  bool passed() override {
    if (!is_over(cudaEventQuery(event_.get()), "cudaEventQuery(fence)", MOEVEMENT_HERE)) return false;
    for (const cudaStream_t side : sides_) MOEVEMENT_CUDA(cudaStreamWaitEvent(side, event_.get(), 0));
    return true;
  }

 private:
  CudaEvent event_;
  std::vector<cudaStream_t> sides_;
};

// Everything that belongs to one place in the row of chunks in flight.
struct Slot {
  CudaEvent gathered;  // the pieces are in the staging memory
  CudaEvent copied;    // the link is free again; of a chunk that is scattered, which is over later
  CudaEvent over;
  bool staged = false;
  bool scattered = false;
};

void copy_async(std::uint64_t source, std::uint64_t destination, std::uint64_t bytes, cudaStream_t stream) {
  MOEVEMENT_CUDA(cudaMemcpyAsync(reinterpret_cast<void*>(destination), reinterpret_cast<const void*>(source), bytes,
                                 cudaMemcpyDefault, stream));
}

void move_pieces(const Chunk& chunk, std::uint64_t staging, cudaStream_t stream) {
  const std::vector<Descriptor> items = descriptors(chunk);
  GatherTable table;
  table.count = static_cast<std::uint32_t>(items.size());
  std::copy(items.begin(), items.end(), table.items);
  const bool scatter = chunk.direction == Direction::to_device;
  check_cuda(static_cast<cudaError_t>(launch_gather(table, staging, scatter, stream)), "gather kernel", MOEVEMENT_HERE);
}

// Chunks take turns on several streams, each behind the one before. On one stream they would be a queue that never runs
// dry, and the GPU goes on with a queue before it looks at others: a small copy of the training would wait for the whole
// slot. Small pieces going to the host are gathered on a stream of their own before that, so that the kernel works while
// the chunk before is still on the link.
class CudaDevice final : public CopyDevice {
 public:
  // The events and streams belong to the device that is current when they are made.
  CudaDevice(int index, std::uint64_t staging_bytes, std::size_t copy_streams)
      : index_(index), staging_bytes_(staging_bytes), staging_(staging_bytes), ring_(staging_bytes) {
    for (std::size_t count = 0; count < copy_streams; ++count) {
      copies_.push_back(std::make_unique<SideStream>(StreamPriority::greatest));
    }
    for (std::size_t slot = 0; slot < kMaxChunksInFlight; ++slot) slots_.push_back(std::make_unique<Slot>());
  }

  void enter_worker() override {
    // Else a sleep of microseconds takes twice as long.
    (void)::prctl(PR_SET_TIMERSLACK, 1UL, 0UL, 0UL, 0UL);
    MOEVEMENT_CUDA(cudaSetDevice(index_));
  }

  std::unique_ptr<Fence> fence(std::uint64_t stream) override {
    const DeviceGuard guard(index_);
    std::vector<cudaStream_t> sides{gathers_.get()};
    for (const auto& side : copies_) sides.push_back(side->get());
    return std::make_unique<StreamFence>(reinterpret_cast<cudaStream_t>(stream), std::move(sides));
  }

  std::unique_ptr<Fence> mark(std::uint64_t stream) override {
    const DeviceGuard guard(index_);
    return std::make_unique<StreamFence>(reinterpret_cast<cudaStream_t>(stream), std::vector<cudaStream_t>());
  }

  std::uint64_t staging_bytes() const noexcept override { return staging_bytes_; }

  Direction direction(const CopyPiece& first) override {
    if (staging_bytes_ == 0) return Direction::other;
    const bool from_device = on_device(first.source);
    if (from_device == on_device(first.destination)) return Direction::other;
    return from_device ? Direction::to_host : Direction::to_device;
  }

  void copy_chunk(const Chunk& chunk, std::size_t slot) override {
    Slot& here = *slots_[slot];
    const auto place = chunk.staging_bytes == 0 ? std::nullopt : ring_.take(chunk.staging_bytes);
    here.staged = place.has_value();
    const std::uint64_t staging = staging_.address() + place.value_or(0);
    const bool to_host = chunk.direction == Direction::to_host;
    const cudaStream_t stream = copies_[turn_]->get();
    turn_ = (turn_ + 1) % copies_.size();
    if (here.staged && to_host) {
      move_pieces(chunk, staging, gathers_.get());
      MOEVEMENT_CUDA(cudaEventRecord(here.gathered.get(), gathers_.get()));
      MOEVEMENT_CUDA(cudaStreamWaitEvent(stream, here.gathered.get(), 0));
    }
    here.scattered = here.staged && !to_host;
    // What goes into staging memory alone need not wait until the chunk before is scattered.
    const bool only_staged = here.scattered && all_gathered(chunk);
    if (before_ != nullptr) {
      const CudaEvent& needed = only_staged && before_->scattered ? before_->copied : before_->over;
      MOEVEMENT_CUDA(cudaStreamWaitEvent(stream, needed.get(), 0));
    }
    for (const Run& run : chunk.runs) copy_run(chunk, run, here.staged, staging, stream);
    // Calls of the driver are what a busy training notices of chunks: no more of them than are needed.
    if (here.scattered) {
      MOEVEMENT_CUDA(cudaEventRecord(here.copied.get(), stream));
      if (only_staged && before_ != nullptr) MOEVEMENT_CUDA(cudaStreamWaitEvent(stream, before_->over.get(), 0));
      move_pieces(chunk, staging, stream);
    }
    MOEVEMENT_CUDA(cudaEventRecord(here.over.get(), stream));
    // A later gather may read what this chunk writes.
    if (!to_host && staging_bytes_ != 0) MOEVEMENT_CUDA(cudaStreamWaitEvent(gathers_.get(), here.over.get(), 0));
    before_ = &here;
  }

  void finish(std::size_t slot) override {
    const cudaEvent_t over = slots_[slot]->over.get();
    while (!is_over(cudaEventQuery(over), "cudaEventQuery(chunk)", MOEVEMENT_HERE)) {
      std::this_thread::sleep_for(kFinishPollEvery);
    }
    if (slots_[slot]->staged) ring_.give_back_oldest();
  }

  void drain() noexcept override {
    (void)cudaStreamSynchronize(gathers_.get());
    for (const auto& stream : copies_) (void)cudaStreamSynchronize(stream->get());
    ring_.clear();
    before_ = nullptr;
  }

  bool usable() noexcept override {
    (void)cudaGetLastError();
    return works(gathers_) && std::all_of(copies_.begin(), copies_.end(), [](const auto& one) { return works(*one); });
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
  static bool works(const SideStream& stream) noexcept {
    const cudaError_t code = cudaStreamQuery(stream.get());
    if (code == cudaErrorNotReady) (void)cudaGetLastError();
    return code == cudaSuccess || code == cudaErrorNotReady;
  }

  // In this device's memory: the kernel cannot count on reaching another one's.
  bool on_device(std::uint64_t address) const {
    cudaPointerAttributes found{};
    MOEVEMENT_CUDA(cudaPointerGetAttributes(&found, reinterpret_cast<const void*>(address)));
    return found.type == cudaMemoryTypeDevice && found.device == index_;
  }

  static bool all_gathered(const Chunk& chunk) {
    return std::all_of(chunk.runs.begin(), chunk.runs.end(), [](const Run& run) { return run.gathered(); });
  }

  void copy_run(const Chunk& chunk, const Run& run, bool staged, std::uint64_t staging, cudaStream_t stream) {
    const CopyPiece& first = chunk.pieces[run.first];
    if (!run.gathered() || !staged) {
      for (std::size_t index = run.first; index < run.first + run.count; ++index) {
        const CopyPiece& piece = chunk.pieces[index];
        copy_async(piece.source, piece.destination, piece.bytes, stream);
      }
    } else if (chunk.direction == Direction::to_host) {
      copy_async(staging + run.staging, first.destination, run.bytes, stream);
    } else {
      copy_async(first.source, staging + run.staging, run.bytes, stream);
    }
  }

  int index_;
  std::uint64_t staging_bytes_;
  std::vector<std::unique_ptr<SideStream>> copies_;
  // A gather of microseconds must not queue behind the training's kernels.
  SideStream gathers_{StreamPriority::greatest};
  DeviceMemory staging_;
  std::vector<std::unique_ptr<Slot>> slots_;
  // Worker thread only.
  StagingRing ring_;
  std::size_t turn_ = 0;          // the stream of the next chunk
  const Slot* before_ = nullptr;  // of the chunk before
};

}  // namespace

std::unique_ptr<CopyDevice> make_cuda_device(int index, std::uint64_t gather_bytes_limit, std::size_t copy_streams) {
  if (copy_streams < 1 || copy_streams > kMaxCopyStreams) {
    throw std::invalid_argument("copy_streams must be 1 to " + std::to_string(kMaxCopyStreams) + MOEVEMENT_HERE);
  }
  check_device_index(index);
  const DeviceGuard guard(index);
  return std::make_unique<CudaDevice>(index, gather_built() ? gather_bytes_limit : 0, copy_streams);
}

const char* cuda_version() {
  static const std::string version =
      std::to_string(CUDART_VERSION / 1000) + "." + std::to_string(CUDART_VERSION % 1000 / 10);
  return version.c_str();
}

bool gather_built() noexcept {
#ifdef MOEVEMENT_WITH_GATHER
  return true;
#else
  return false;
#endif
}

#ifndef MOEVEMENT_WITH_GATHER
// Without nvcc no staging memory is given out and this is never called.
int launch_gather(const GatherTable&, std::uint64_t, bool, void*) noexcept {
  return static_cast<int>(cudaErrorNotSupported);
}
#endif

}  // namespace moevement

#else  // MOEVEMENT_WITH_CUDA

namespace moevement {

std::unique_ptr<CopyDevice> make_cuda_device(int, std::uint64_t, std::size_t) {
  throw EngineError(std::string("this build has no CUDA copy engine; build again where the CUDA toolkit is found") +
                    MOEVEMENT_HERE);
}

const char* cuda_version() { return nullptr; }

bool gather_built() noexcept { return false; }

}  // namespace moevement

#endif  // MOEVEMENT_WITH_CUDA
