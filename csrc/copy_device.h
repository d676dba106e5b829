// What a copy engine needs from the hardware it copies with. The engine decides what is copied when; a device only
// starts a chunk and says when it is over, so that the CPU and the CUDA engine share every rule about tickets.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

#include "chunking.h"

namespace moevement {

// A point in somebody else's work that copies must not overtake.
class Fence {
 public:
  virtual ~Fence() = default;
  // True once the work before the fence is over. Worker thread only; throws EngineError.
  virtual bool passed() = 0;
};

// Chunks in flight are numbered by slots, 0 to kMaxChunksInFlight - 1.
constexpr std::size_t kMaxChunksInFlight = 64;

constexpr std::size_t kCopyStreams = 2;
constexpr std::size_t kMaxCopyStreams = 8;

class CopyDevice {
 public:
  virtual ~CopyDevice() = default;

  // Called once on the worker thread before anything else is called there.
  virtual void enter_worker() = 0;
  // Any thread: a fence behind the work given to `stream` so far; null where there is nothing to wait for.
  virtual std::unique_ptr<Fence> fence(std::uint64_t stream) = 0;
  // Any thread: the same point, of which the worker is only told; no copy is ordered behind it.
  virtual std::unique_ptr<Fence> mark(std::uint64_t stream) = 0;
  // Any thread: device memory for gathering, over all chunks in flight; 0 where nothing is gathered.
  virtual std::uint64_t staging_bytes() const noexcept = 0;

  // Worker thread only; throw EngineError.
  // How a batch that begins with this piece travels; all its pieces go the same way.
  virtual Direction direction(const CopyPiece& first) = 0;
  // Starts a chunk. Chunks are made, and become over, in the order of the calls.
  virtual void copy_chunk(const Chunk& chunk, std::size_t slot) = 0;
  // Waits for the oldest chunk that is not over yet, which is in `slot`.
  virtual void finish(std::size_t slot) = 0;
  // Returns when no copy is in flight, whatever went wrong before.
  virtual void drain() noexcept = 0;
  // False when an earlier error makes every later call fail too.
  virtual bool usable() noexcept = 0;

  // Any thread: pins host memory for fast copies; false where that means nothing. Throw EngineError.
  virtual bool register_host(std::uint64_t address, std::uint64_t nbytes) = 0;
  virtual bool unregister_host(std::uint64_t address) = 0;
};

std::unique_ptr<CopyDevice> make_cpu_device();
// Throws EngineError without a usable GPU, and always in a build without CUDA. `gather_bytes_limit`: device memory for
// gathering small pieces, 0 for none. `copy_streams`: streams on which chunks take turns, 1 to kMaxCopyStreams.
std::unique_ptr<CopyDevice> make_cuda_device(int index, std::uint64_t gather_bytes_limit,
                                             std::size_t copy_streams = kCopyStreams);
// "13.0", or null in a build without CUDA.
const char* cuda_version();
// Whether this build can gather small pieces on the GPU.
bool gather_built() noexcept;

}  // namespace moevement
