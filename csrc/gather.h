// Many small pieces of device memory in one place, or back: one kernel and one copy instead of a copy each.
//
// The byte-copying itself is plain code that is compiled for the host too, so that it is tested without a GPU.
#pragma once

#include <cstddef>
#include <cstdint>

#include "chunking.h"
#include "device_code.h"

namespace moevement {

// Travels as a kernel parameter, for which there are 4 KiB.
struct GatherTable {
  std::uint32_t count;
  Descriptor items[kMaxPiecesPerChunk];
};
static_assert(sizeof(GatherTable) < 4096, "a kernel's parameters have 4 KiB");

// How many bytes at a time both addresses allow, once some first bytes are copied alone.
MOEVEMENT_HOST_DEVICE inline std::uint32_t widest(std::uint64_t to, std::uint64_t from) {
  const std::uint64_t apart = to ^ from;
  return apart % 16 == 0 ? 16 : apart % 8 == 0 ? 8 : apart % 4 == 0 ? 4 : apart % 2 == 0 ? 2 : 1;
}

// Lane `lane` of `lanes` copies its share of `count` words.
template <typename Word>
MOEVEMENT_HOST_DEVICE inline void copy_words(std::uint64_t to, std::uint64_t from, std::uint32_t count,
                                             std::uint32_t lane, std::uint32_t lanes) {
  Word* target = reinterpret_cast<Word*>(to);
  const Word* source = reinterpret_cast<const Word*>(from);
  std::uint32_t index = lane;
  // Four loads under way at a time hide the memory's latency; counts stay far below 2^32 - 4 * lanes.
  for (; index + 3 * lanes < count; index += 4 * lanes) {
    const Word first = source[index];
    const Word second = source[index + lanes];
    const Word third = source[index + 2 * lanes];
    const Word fourth = source[index + 3 * lanes];
    target[index] = first;
    target[index + lanes] = second;
    target[index + 2 * lanes] = third;
    target[index + 3 * lanes] = fourth;
  }
  for (; index < count; index += lanes) target[index] = source[index];
}

// Copies `bytes` bytes together with the other lanes: first bytes up to an aligned address, words, last bytes.
MOEVEMENT_HOST_DEVICE inline void copy_bytes(std::uint64_t to, std::uint64_t from, std::uint32_t bytes,
                                             std::uint32_t lane, std::uint32_t lanes) {
  const std::uint32_t width = widest(to, from);
  const std::uint32_t skewed = static_cast<std::uint32_t>((width - to % width) % width);
  const std::uint32_t head = skewed < bytes ? skewed : bytes;
  const std::uint32_t words = (bytes - head) / width;
  const std::uint32_t body = words * width;
  copy_words<unsigned char>(to, from, head, lane, lanes);
  switch (width) {
    case 16:
      copy_words<Wide16>(to + head, from + head, words, lane, lanes);
      break;
    case 8:
      copy_words<Wide8>(to + head, from + head, words, lane, lanes);
      break;
    case 4:
      copy_words<Wide4>(to + head, from + head, words, lane, lanes);
      break;
    case 2:
      copy_words<Wide2>(to + head, from + head, words, lane, lanes);
      break;
    default:
      copy_words<unsigned char>(to + head, from + head, words, lane, lanes);
  }
  copy_words<unsigned char>(to + head + body, from + head + body, bytes - head - body, lane, lanes);
}

// Lane `lane` of `lanes` moves its share of one piece into the staging memory, or out of it.
MOEVEMENT_HOST_DEVICE inline void move_piece(const Descriptor& piece, std::uint64_t staging, bool scatter,
                                             std::uint32_t lane, std::uint32_t lanes) {
  const std::uint64_t staged = staging + piece.offset;
  copy_bytes(scatter ? piece.address : staged, scatter ? staged : piece.address, piece.bytes, lane, lanes);
}

// Starts the kernel on `stream` (a cudaStream_t) of the current device; the code of a cudaError_t.
int launch_gather(const GatherTable& table, std::uint64_t staging, bool scatter, void* stream) noexcept;

}  // namespace moevement
