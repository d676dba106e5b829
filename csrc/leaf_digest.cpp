#include "leaf_digest.h"

#include <cstring>

#define XXH_INLINE_ALL
#include "third_party/xxhash/xxhash.h"

namespace moevement {
namespace {

void take_secret(std::uint64_t* words, std::size_t count, std::size_t offset) {
  std::memcpy(words, XXH3_kSecret + offset, count * sizeof(*words));
}

}  // namespace

LeafKeys leaf_keys() noexcept {
  static_assert(kPrime32 == XXH_PRIME32_1 && kPrimeLow == XXH_PRIME64_1 && kPrimeHigh == XXH_PRIME64_2,
                "the header has them apart, because the library's can't be compiled for a GPU");
  static_assert(sizeof(XXH3_kSecret) == sizeof(LeafKeys::secret), "a block ends where the secret does");
  LeafKeys keys{{XXH_PRIME32_3, XXH_PRIME64_1, XXH_PRIME64_2, XXH_PRIME64_3, XXH_PRIME64_4, XXH_PRIME32_2,
                 XXH_PRIME64_5, XXH_PRIME32_1},
                {},
                {},
                {},
                {}};
  take_secret(keys.secret, kStripesPerBlock + 8, 0);
  const std::size_t end = sizeof(XXH3_kSecret) - sizeof(keys.last);
  take_secret(keys.last, 8, end - XXH_SECRET_LASTACC_START);
  take_secret(keys.low, 8, XXH_SECRET_MERGEACCS_START);
  take_secret(keys.high, 8, end - XXH_SECRET_MERGEACCS_START);
  return keys;
}

void digest_leaves(const LeafRange* ranges, std::uint32_t count, std::uint32_t leaves, std::uint64_t results) noexcept {
  const LeafKeys keys = leaf_keys();
  for (std::uint32_t number = 0; number < leaves; ++number) {
    const Leaf leaf = find_leaf(ranges, count, number);
    Lane total{0, 0};
    for (std::uint32_t lane = 0; lane < kLanesPerLeaf; ++lane) {
      if (leaf.bytes <= kRawBytes) {
        take_along(leaf, results, lane);
      } else {
        const Lane share = leaf_share(leaf.address, leaf.bytes, lane, keys);
        total.even += share.even;
        total.odd += share.odd;
      }
    }
    if (leaf.bytes > kRawBytes) {
      reinterpret_cast<Wide16*>(results)[leaf.unit] = leaf_digest(total, leaf.bytes);
    }
  }
}

}  // namespace moevement
