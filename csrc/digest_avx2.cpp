// Compiled for AVX2 where there is such a thing, and called only on processors that have it.
#include "digest_functions.h"

#ifdef __AVX2__

#define XXH_INLINE_ALL
#include "third_party/xxhash/xxhash.h"

namespace moevement {

bool avx2_usable() noexcept { return __builtin_cpu_supports("avx2") != 0; }

void digest_avx2(const void* bytes, size_t nbytes, unsigned char digest[16]) {
  XXH128_canonicalFromHash(reinterpret_cast<XXH128_canonical_t*>(digest), XXH3_128bits(bytes, nbytes));
}

}  // namespace moevement

#else

namespace moevement {

bool avx2_usable() noexcept { return false; }

void digest_avx2(const void* bytes, size_t nbytes, unsigned char digest[16]) { digest_baseline(bytes, nbytes, digest); }

}  // namespace moevement

#endif
