// The fingerprint of a tensor's bytes: exact, 64 bits, the same wherever it is made.
//
// A multilinear hash modulo 2^64: the number of bytes, and every 32-bit word (signed; the last one filled up with zeros)
// times an odd key of its place. Such a sum is the same in any order. It is plain code that is compiled for the host too.
#pragma once

#include <cstdint>

#include "device_code.h"

namespace moevement {

// Keys repeat after so many words, times a key of the block.
constexpr std::uint64_t kFingerprintBlockWords = std::uint64_t{1} << 21;
constexpr std::uint64_t kFirstBlockKey = std::uint64_t{1} << 40;

// splitmix64, made odd.
MOEVEMENT_HOST_DEVICE inline std::uint64_t fingerprint_key(std::uint64_t number) {
  std::uint64_t mixed = (number + 1) * 0x9E3779B97F4A7C15;
  mixed = (mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9;
  mixed = (mixed ^ (mixed >> 27)) * 0x94D049BB133111EB;
  return (mixed ^ (mixed >> 31)) | 1;
}

// The word at `place`, of `bytes` bytes at `address`, which need not be aligned.
MOEVEMENT_HOST_DEVICE inline std::uint64_t fingerprint_word(std::uint64_t address, std::uint64_t bytes,
                                                            std::uint64_t place) {
  const std::uint64_t begin = 4 * place;
  std::uint32_t word = 0;
  if (address % 4 == 0 && begin + 4 <= bytes) {
    word = reinterpret_cast<const Wide4*>(address + begin)->bits;
  } else {
    for (std::uint64_t index = 0; index < 4 && begin + index < bytes; ++index) {
      word |= std::uint32_t{reinterpret_cast<const unsigned char*>(address)[begin + index]} << (8 * index);
    }
  }
  return static_cast<std::uint64_t>(static_cast<std::int64_t>(static_cast<std::int32_t>(word)));
}

// What lane `lane` of `lanes` adds to the sum.
MOEVEMENT_HOST_DEVICE inline std::uint64_t fingerprint_share(std::uint64_t address, std::uint64_t bytes,
                                                             std::uint64_t lane, std::uint64_t lanes) {
  const std::uint64_t words = (bytes + 3) / 4;
  std::uint64_t total = lane == 0 ? bytes : 0;
  for (std::uint64_t begin = 0; begin < words; begin += kFingerprintBlockWords) {
    const std::uint64_t end = begin + kFingerprintBlockWords < words ? begin + kFingerprintBlockWords : words;
    std::uint64_t sum = 0;
    for (std::uint64_t place = begin + lane; place < end; place += lanes) {
      sum += fingerprint_word(address, bytes, place) * fingerprint_key(place - begin);
    }
    total += sum * fingerprint_key(kFirstBlockKey + begin / kFingerprintBlockWords);
  }
  return total;
}

// Of host memory.
std::uint64_t fingerprint(std::uint64_t address, std::uint64_t bytes) noexcept;

// Adds the fingerprint of memory of device `index` to the 64-bit number at `result` there, behind the work given to
// `stream`; nobody waits. Throws EngineError, and always in a build without kernels.
void add_fingerprint(int index, std::uint64_t address, std::uint64_t bytes, std::uint64_t result, std::uint64_t stream);

// Starts the kernel on `stream` (a cudaStream_t) of the current device; the code of a cudaError_t.
int launch_fingerprint(std::uint64_t address, std::uint64_t bytes, std::uint64_t result, void* stream) noexcept;

}  // namespace moevement
