// What a copy engine needs from the hardware it copies with. The engine decides what is copied when; a device only
// starts a copy and says when it is over, so that the CPU and the CUDA engine share every rule about tickets.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

namespace moevement {

// A point in somebody else's work that copies must not overtake.
class Fence {
 public:
  virtual ~Fence() = default;
  // True once the work before the fence is over. Worker thread only; throws EngineError.
  virtual bool passed() = 0;
};

class CopyDevice {
 public:
  virtual ~CopyDevice() = default;

  // Called once on the worker thread before anything else is called there.
  virtual void enter_worker() = 0;
  // Any thread: a fence behind the work given to `stream` so far; null where there is nothing to wait for.
  virtual std::unique_ptr<Fence> fence(std::uint64_t stream) = 0;

  // Worker thread only; all throw EngineError. Copies are made in the order of the calls.
  virtual void copy(std::uint64_t source, std::uint64_t destination, std::uint64_t bytes) = 0;
  // Marks the copies since the last mark as the chunk in `slot`, and waits for that chunk.
  virtual void mark(std::size_t slot) = 0;
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
// `slots`: how many chunks are in flight at most. Throws EngineError without a usable GPU, and always in a build
// without CUDA.
std::unique_ptr<CopyDevice> make_cuda_device(int index, std::size_t slots);
// "13.0", or null in a build without CUDA.
const char* cuda_version();

}  // namespace moevement
