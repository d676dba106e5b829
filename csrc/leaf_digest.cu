#include <cuda_runtime.h>

#include "leaf_digest.h"

namespace moevement {
namespace {

constexpr std::uint32_t kThreads = 1024;

__global__ void __launch_bounds__(kThreads) digest_leaves_kernel(const LeafRange* __restrict__ ranges,
                                                                 std::uint32_t count, std::uint32_t leaves,
                                                                 std::uint64_t results,
                                                                 const __grid_constant__ LeafKeys keys) {
  const std::uint32_t thread = blockIdx.x * kThreads + threadIdx.x;
  const std::uint32_t lane = thread % kLanesPerLeaf;
  const std::uint32_t groups = gridDim.x * (kThreads / kLanesPerLeaf);
  // Groups of one warp come to their end at different times: each meets its own lanes only.
  const std::uint32_t others = ((1U << kLanesPerLeaf) - 1) << (threadIdx.x % 32 / kLanesPerLeaf * kLanesPerLeaf);
  for (std::uint32_t number = thread / kLanesPerLeaf; number < leaves; number += groups) {
    const Leaf leaf = find_leaf(ranges, count, number);
    if (leaf.bytes <= kRawBytes) {
      take_along(leaf, results, lane);
      continue;
    }
    Lane total = leaf_share(leaf.address, leaf.bytes, lane, keys);
    for (std::uint32_t apart = kLanesPerLeaf / 2; apart > 0; apart /= 2) {
      total.even += __shfl_xor_sync(others, total.even, apart);
      total.odd += __shfl_xor_sync(others, total.odd, apart);
    }
    if (lane == 0) reinterpret_cast<Wide16*>(results)[leaf.unit] = leaf_digest(total, leaf.bytes);
  }
}

}  // namespace

int launch_leaf_digests(const LeafRange* ranges, std::uint32_t count, std::uint32_t leaves, std::uint64_t results,
                        std::uint32_t blocks, void* stream) noexcept {
  constexpr std::uint32_t kLeavesPerBlock = kThreads / kLanesPerLeaf;
  const std::uint32_t useful = (leaves + kLeavesPerBlock - 1) / kLeavesPerBlock;
  digest_leaves_kernel<<<blocks < useful ? blocks : useful, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      ranges, count, leaves, results, leaf_keys());
  return static_cast<int>(cudaGetLastError());
}

}  // namespace moevement
