#include <cuda_runtime.h>

#include "gather.h"

namespace moevement {
namespace {

constexpr std::uint32_t kThreads = 256;
// Bytes that a block moves at least: more blocks would only be started and ended.
constexpr std::uint32_t kBytesPerBlock = kThreads * 16 * 4;
// A chunk's copy to the host takes far longer than the kernel, which should leave the GPU to the training.
constexpr std::uint32_t kMaxBlocksPerPiece = 8;

__global__ void __launch_bounds__(kThreads) move_pieces(const __grid_constant__ GatherTable table,
                                                        std::uint64_t staging, bool scatter) {
  move_piece(table.items[blockIdx.y], staging, scatter, blockIdx.x * kThreads + threadIdx.x, gridDim.x * kThreads);
}

}  // namespace

int launch_gather(const GatherTable& table, std::uint64_t staging, bool scatter, void* stream) noexcept {
  std::uint32_t largest = 1;
  for (std::uint32_t index = 0; index < table.count; ++index) {
    if (table.items[index].bytes > largest) largest = table.items[index].bytes;
  }
  const std::uint32_t wanted = (largest + kBytesPerBlock - 1) / kBytesPerBlock;
  const dim3 blocks(wanted < kMaxBlocksPerPiece ? wanted : kMaxBlocksPerPiece, table.count);
  move_pieces<<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(table, staging, scatter);
  return static_cast<int>(cudaGetLastError());
}

}  // namespace moevement
