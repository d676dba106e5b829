// What the tests on a GPU share.
#pragma once

#include <cuda_runtime_api.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <thread>

#include "check.h"

#define CUDA(call) CHECK((call) == cudaSuccess)

namespace moevement {

inline std::uint64_t address(const void* pointer) { return reinterpret_cast<std::uintptr_t>(pointer); }

// For cudaLaunchHostFunc: the stream goes on when the std::atomic<bool> at `gate` is true.
inline void CUDART_CB hold(void* gate) {
  while (!*static_cast<std::atomic<bool>*>(gate)) std::this_thread::sleep_for(std::chrono::milliseconds(1));
}

}  // namespace moevement
