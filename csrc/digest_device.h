// What digests of device memory need from the hardware: something that digests leaves behind a stream's work.
#pragma once

#include <cstdint>
#include <memory>

#include "leaf_digest.h"

namespace moevement {

struct DigestRoom {
  std::uint64_t ranges;
  std::uint64_t units;
};

// Calls come from one thread at a time. All but the accessors throw EngineError.
class DigestDevice {
 public:
  virtual ~DigestDevice() = default;
  // Host memory with room for all ranges, written only while nothing is under way.
  virtual LeafRange* table() noexcept = 0;
  // Host memory of all units, read only once what was started is over.
  virtual const unsigned char* results() const noexcept = 0;
  // Bytes of the device's memory that this takes.
  virtual std::uint64_t device_bytes() const noexcept = 0;
  // Digests the leaves of the table's first `ranges` ranges behind the work given to `stream` so far, with at most
  // `blocks` blocks of threads.
  virtual void start(std::uint32_t ranges, std::uint32_t leaves, std::uint32_t blocks, std::uint64_t stream) = 0;
  virtual bool over() = 0;
  // What the digests of the last start took, without what they waited for.
  virtual double seconds() = 0;
};

// Digests at the call, with the caller's thread.
std::unique_ptr<DigestDevice> make_cpu_digest_device(const DigestRoom& room);
// Throws EngineError without a usable GPU, and always in a build without nvcc.
std::unique_ptr<DigestDevice> make_cuda_digest_device(int index, const DigestRoom& room);

}  // namespace moevement
