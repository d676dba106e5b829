#include <cuda_runtime.h>

#include "fingerprint.h"

namespace moevement {
namespace {

constexpr std::uint32_t kThreads = 256;
// A thread reads so many words at least. It is training's stream that waits for the kernel: it takes what GPU there is.
constexpr std::uint64_t kWordsPerThread = 16;
constexpr std::uint64_t kMaxBlocks = 1024;

__global__ void __launch_bounds__(kThreads) add_fingerprint_kernel(std::uint64_t address, std::uint64_t bytes,
                                                                   std::uint64_t result) {
  const std::uint64_t lanes = std::uint64_t{gridDim.x} * kThreads;
  std::uint64_t total = fingerprint_share(address, bytes, std::uint64_t{blockIdx.x} * kThreads + threadIdx.x, lanes);
  for (std::uint32_t apart = 16; apart > 0; apart /= 2) total += __shfl_xor_sync(0xFFFFFFFF, total, apart);
  if (threadIdx.x % 32 == 0) atomicAdd(reinterpret_cast<unsigned long long*>(result), total);
}

}  // namespace

int launch_fingerprint(std::uint64_t address, std::uint64_t bytes, std::uint64_t result, void* stream) noexcept {
  constexpr std::uint64_t kBytesPerBlock = kThreads * kWordsPerThread * 4;
  const std::uint64_t wanted = bytes / kBytesPerBlock + 1;
  add_fingerprint_kernel<<<static_cast<std::uint32_t>(wanted < kMaxBlocks ? wanted : kMaxBlocks), kThreads, 0,
                           static_cast<cudaStream_t>(stream)>>>(address, bytes, result);
  return static_cast<int>(cudaGetLastError());
}

}  // namespace moevement
