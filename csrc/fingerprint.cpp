#include "fingerprint.h"

#include <string>

#include "errors.h"

#if defined(MOEVEMENT_WITH_CUDA) && defined(MOEVEMENT_WITH_GATHER)
#include "cuda_support.h"
#endif

namespace moevement {

std::uint64_t fingerprint(std::uint64_t address, std::uint64_t bytes) noexcept {
  return fingerprint_share(address, bytes, 0, 1);
}

#if defined(MOEVEMENT_WITH_CUDA) && defined(MOEVEMENT_WITH_GATHER)

void add_fingerprint(int index, std::uint64_t address, std::uint64_t bytes, std::uint64_t result,
                     std::uint64_t stream) {
  const DeviceGuard guard(index);
  check_cuda(static_cast<cudaError_t>(launch_fingerprint(address, bytes, result, reinterpret_cast<void*>(stream))),
             "fingerprint kernel", MOEVEMENT_HERE);
}

#else

void add_fingerprint(int, std::uint64_t, std::uint64_t, std::uint64_t, std::uint64_t) {
  throw EngineError(std::string("this build has no kernels; build again where the CUDA toolkit with nvcc is found") +
                    MOEVEMENT_HERE);
}

#endif

}  // namespace moevement
