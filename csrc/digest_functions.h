// XXH3-128 of some bytes, in its canonical (big-endian) form, with the vector instructions that the name says. No C++
// header: what one defines inline in a file that is compiled for AVX2 could be linked into the rest of the program.
#pragma once

#include <stddef.h>

namespace moevement {

using DigestFunction = void (*)(const void* bytes, size_t nbytes, unsigned char digest[16]);

void digest_baseline(const void* bytes, size_t nbytes, unsigned char digest[16]);
// False where the processor lacks AVX2, or the build is for another one than x86-64; digest_avx2 is not called then.
bool avx2_usable() noexcept;
void digest_avx2(const void* bytes, size_t nbytes, unsigned char digest[16]);
// The fastest of them that this processor has.
DigestFunction best_digest() noexcept;

}  // namespace moevement
