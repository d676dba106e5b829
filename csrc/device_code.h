// What code that is compiled for the GPU and for the host shares. Little-endian, as both are.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define MOEVEMENT_HOST_DEVICE __host__ __device__
#define MOEVEMENT_UNROLL _Pragma("unroll")
#else
#define MOEVEMENT_HOST_DEVICE
#define MOEVEMENT_UNROLL _Pragma("GCC unroll 32")
#endif

namespace moevement {

// One load and one store of 1 to 16 bytes; they may stand for bytes of any type.
struct __attribute__((may_alias, aligned(16))) Wide16 {
  std::uint64_t low;
  std::uint64_t high;
};
struct __attribute__((may_alias)) Wide8 {
  std::uint64_t bits;
};
struct __attribute__((may_alias)) Wide4 {
  std::uint32_t bits;
};
struct __attribute__((may_alias)) Wide2 {
  std::uint16_t bits;
};
struct __attribute__((may_alias)) Wide1 {
  std::uint8_t bits;
};

}  // namespace moevement
