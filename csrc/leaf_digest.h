// The digest of a range of memory: XXH3-128 over the XXH3-128 digests, one after the other, of its leaves of
// kDigestLeafBytes; the last leaf is shorter, and an empty range has none. Leaves are small and independent so that a
// GPU digests many of them at once; what is needed for that is here, in code that is compiled for the host too.
//
// XXH3 adds up eight 64-bit numbers, each from its own 8 bytes of every 64-byte stripe; numbers 2i and 2i+1 also take
// each other's bytes. So four lanes digest a leaf, each with 16 bytes of a stripe, and meet only at the end.
#pragma once

#include <cstddef>
#include <cstdint>

#include "device_code.h"

namespace moevement {

constexpr std::uint64_t kDigestLeafBytes = std::uint64_t{64} << 10;
constexpr std::size_t kDigestBytes = 16;

constexpr std::uint32_t kLanesPerLeaf = 4;
constexpr std::uint32_t kStripeBytes = 64;
constexpr std::uint32_t kStripesPerBlock = 16;
constexpr std::uint32_t kBlockBytes = kStripeBytes * kStripesPerBlock;
// XXH3 treats inputs up to this length in other ways. Such a leaf is not digested but taken along as it is: at most one
// of a range, of which the library makes the digest later.
constexpr std::uint32_t kRawBytes = 240;

// Where what was found of the leaves lies is counted in units of 16 bytes: one for a digest, as many as needed for a
// leaf that is taken along.
constexpr std::uint32_t kUnitBytes = 16;
constexpr std::uint32_t kMaxRawUnits = kRawBytes / kUnitBytes;

// A range that is not empty.
struct LeafRange {
  std::uint64_t address;
  std::uint64_t bytes;
  std::uint32_t first_leaf;  // of all ranges, which are in this order
  std::uint32_t first_unit;
};

// What the library's secret and primes come to in the long hash with seed 0. Travels as a kernel parameter.
struct LeafKeys {
  std::uint64_t start[8];
  std::uint64_t secret[kStripesPerBlock + 8];  // stripe n of a block uses eight from n on; the block's end the last eight
  std::uint64_t last[8];                       // for a leaf's last 64 bytes
  std::uint64_t low[8];                        // for the digest's two halves
  std::uint64_t high[8];
};
LeafKeys leaf_keys() noexcept;

// Two of XXH3's numbers, or 16 bytes.
struct Lane {
  std::uint64_t even;
  std::uint64_t odd;
};

constexpr std::uint64_t kPrime32 = 0x9E3779B1U;
constexpr std::uint64_t kPrimeLow = 0x9E3779B185EBCA87ULL;
constexpr std::uint64_t kPrimeHigh = 0xC2B2AE3D27D4EB4FULL;
constexpr std::uint64_t kPrimeAvalanche = 0x165667919E3779F9ULL;

template <typename Word>
MOEVEMENT_HOST_DEVICE inline std::uint64_t assemble(const Word* words) {
  std::uint64_t value = 0;
  MOEVEMENT_UNROLL
  for (unsigned index = 0; index < 8 / sizeof(Word); ++index) {
    value |= static_cast<std::uint64_t>(words[index].bits) << (8 * sizeof(Word) * index);
  }
  return value;
}

// 16 bytes from an address that is a multiple of the word's size.
template <typename Word>
MOEVEMENT_HOST_DEVICE inline Lane load_lane(std::uint64_t address) {
  const Word* words = reinterpret_cast<const Word*>(address);
  return {assemble(words), assemble(words + 8 / sizeof(Word))};
}
template <>
MOEVEMENT_HOST_DEVICE inline Lane load_lane<Wide16>(std::uint64_t address) {
#ifdef __CUDA_ARCH__
  // Read once: the cache is left to the training.
  const ulonglong2 found = __ldcs(reinterpret_cast<const ulonglong2*>(address));
  return {found.x, found.y};
#else
  const Wide16 found = *reinterpret_cast<const Wide16*>(address);
  return {found.low, found.high};
#endif
}

MOEVEMENT_HOST_DEVICE inline void accumulate(Lane& sums, const Lane& data, std::uint64_t even_key,
                                             std::uint64_t odd_key) {
  const std::uint64_t even = data.even ^ even_key;
  const std::uint64_t odd = data.odd ^ odd_key;
  sums.even += data.odd + (even & 0xFFFFFFFFU) * (even >> 32);
  sums.odd += data.even + (odd & 0xFFFFFFFFU) * (odd >> 32);
}

MOEVEMENT_HOST_DEVICE inline std::uint64_t scrambled(std::uint64_t sum, std::uint64_t key) {
  return (sum ^ (sum >> 47) ^ key) * kPrime32;
}

// All of a leaf but its last stripe. The leaf has more than kRawBytes.
template <typename Word>
MOEVEMENT_HOST_DEVICE inline Lane accumulate_stripes(std::uint64_t address, std::uint32_t bytes, std::uint32_t lane,
                                                     const LeafKeys& keys) {
  constexpr unsigned kAtOnce = 8;  // loads under way, which hide the memory's latency
  const std::uint64_t* own = keys.secret + 2 * lane;
  std::uint64_t words[kStripesPerBlock + 1];
  MOEVEMENT_UNROLL
  for (unsigned index = 0; index <= kStripesPerBlock; ++index) words[index] = own[index];
  const std::uint64_t even_end = own[kStripesPerBlock];
  const std::uint64_t odd_end = own[kStripesPerBlock + 1];
  Lane sums{keys.start[2 * lane], keys.start[2 * lane + 1]};
  std::uint64_t from = address + 16 * lane;
  for (std::uint32_t block = (bytes - 1) / kBlockBytes; block > 0; --block, from += kBlockBytes) {
    MOEVEMENT_UNROLL
    for (unsigned first = 0; first < kStripesPerBlock; first += kAtOnce) {
      Lane data[kAtOnce];
      MOEVEMENT_UNROLL
      for (unsigned n = 0; n < kAtOnce; ++n) data[n] = load_lane<Word>(from + kStripeBytes * (first + n));
      MOEVEMENT_UNROLL
      for (unsigned n = 0; n < kAtOnce; ++n) accumulate(sums, data[n], words[first + n], words[first + n + 1]);
    }
    sums.even = scrambled(sums.even, even_end);
    sums.odd = scrambled(sums.odd, odd_end);
  }
  const std::uint32_t left = (bytes - 1) % kBlockBytes / kStripeBytes;
  for (std::uint32_t n = 0; n < left; ++n, from += kStripeBytes) {
    accumulate(sums, load_lane<Word>(from), own[n], own[n + 1]);
  }
  return sums;
}

MOEVEMENT_HOST_DEVICE inline std::uint64_t folded_product(std::uint64_t left, std::uint64_t right) {
#ifdef __CUDA_ARCH__
  return (left * right) ^ __umul64hi(left, right);
#else
  __extension__ using Wide = unsigned __int128;
  const Wide product = static_cast<Wide>(left) * right;
  return static_cast<std::uint64_t>(product) ^ static_cast<std::uint64_t>(product >> 64);
#endif
}

// Calls `action` with a word of the widest type that may be loaded at `address`.
template <typename Action>
MOEVEMENT_HOST_DEVICE inline Lane with_widest(std::uint64_t address, const Action& action) {
  if (address % 16 == 0) return action(Wide16{});
  if (address % 8 == 0) return action(Wide8{});
  if (address % 4 == 0) return action(Wide4{});
  if (address % 2 == 0) return action(Wide2{});
  return action(Wide1{});
}

// What one lane adds to the two halves of a leaf's digest.
MOEVEMENT_HOST_DEVICE inline Lane leaf_share(std::uint64_t address, std::uint32_t bytes, std::uint32_t lane,
                                             const LeafKeys& keys) {
  Lane sums = with_widest(address, [&](auto word) {
    return accumulate_stripes<decltype(word)>(address, bytes, lane, keys);
  });
  const std::uint64_t last = address + bytes - kStripeBytes + 16 * lane;
  const Lane data = with_widest(last, [&](auto word) { return load_lane<decltype(word)>(last); });
  const std::uint32_t even = 2 * lane;
  accumulate(sums, data, keys.last[even], keys.last[even + 1]);
  return {folded_product(sums.even ^ keys.low[even], sums.odd ^ keys.low[even + 1]),
          folded_product(sums.even ^ keys.high[even], sums.odd ^ keys.high[even + 1])};
}

MOEVEMENT_HOST_DEVICE inline std::uint64_t avalanched(std::uint64_t value) {
  value = (value ^ (value >> 37)) * kPrimeAvalanche;
  return value ^ (value >> 32);
}

MOEVEMENT_HOST_DEVICE inline std::uint64_t byte_swapped(std::uint64_t value) {
  value = ((value & 0x00FF00FF00FF00FFULL) << 8) | ((value >> 8) & 0x00FF00FF00FF00FFULL);
  value = ((value & 0x0000FFFF0000FFFFULL) << 16) | ((value >> 16) & 0x0000FFFF0000FFFFULL);
  return (value << 32) | (value >> 32);
}

// The canonical form of a leaf's digest, from the sum of its lanes' shares.
MOEVEMENT_HOST_DEVICE inline Wide16 leaf_digest(const Lane& total, std::uint64_t bytes) {
  const std::uint64_t low = avalanched(total.even + bytes * kPrimeLow);
  const std::uint64_t high = avalanched(total.odd + ~(bytes * kPrimeHigh));
  return {byte_swapped(high), byte_swapped(low)};
}

struct Leaf {
  std::uint64_t address;
  std::uint32_t bytes;
  std::uint32_t unit;
};

// Leaf number `leaf` of all ranges.
MOEVEMENT_HOST_DEVICE inline Leaf find_leaf(const LeafRange* ranges, std::uint32_t count, std::uint32_t leaf) {
  std::uint32_t low = 0;  // the last range whose first leaf is not beyond: in [low, high)
  std::uint32_t high = count;
  while (high - low > 1) {
    const std::uint32_t middle = low + (high - low) / 2;
    if (ranges[middle].first_leaf <= leaf) {
      low = middle;
    } else {
      high = middle;
    }
  }
  const LeafRange& range = ranges[low];
  const std::uint32_t within = leaf - range.first_leaf;
  const std::uint64_t offset = within * kDigestLeafBytes;
  const std::uint64_t left = range.bytes - offset;
  const std::uint64_t bytes = left < kDigestLeafBytes ? left : kDigestLeafBytes;
  return {range.address + offset, static_cast<std::uint32_t>(bytes), range.first_unit + within};
}

// Lane `lane` copies its share of a leaf that is taken along as it is.
MOEVEMENT_HOST_DEVICE inline void take_along(const Leaf& leaf, std::uint64_t results, std::uint32_t lane) {
  const Wide1* source = reinterpret_cast<const Wide1*>(leaf.address);
  Wide1* target = reinterpret_cast<Wide1*>(results + std::uint64_t{leaf.unit} * kUnitBytes);
  for (std::uint32_t index = lane; index < leaf.bytes; index += kLanesPerLeaf) target[index] = source[index];
}

// `results`: address of the units. Starts the kernel on `stream` (a cudaStream_t) of the current device; the code of a
// cudaError_t.
int launch_leaf_digests(const LeafRange* ranges, std::uint32_t count, std::uint32_t leaves, std::uint64_t results,
                        std::uint32_t blocks, void* stream) noexcept;
// The same by this thread.
void digest_leaves(const LeafRange* ranges, std::uint32_t count, std::uint32_t leaves, std::uint64_t results) noexcept;

}  // namespace moevement
