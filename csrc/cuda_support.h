// What the files share that call the CUDA runtime: errors that throw, and handles that are given back.
#pragma once

#ifdef MOEVEMENT_WITH_CUDA

#include <cuda_runtime_api.h>
#include <dlfcn.h>

#include <cstdint>
#include <string>

#include "errors.h"

namespace moevement {

inline void check_cuda(cudaError_t code, const char* call, const char* here) {
  if (code == cudaSuccess) return;
  // Clears the error of this thread when it is not sticky, so that the next call does not report it again.
  (void)cudaGetLastError();
  throw EngineError(std::string(call) + ": " + cudaGetErrorName(code) + ", " + cudaGetErrorString(code) + here);
}

// Whether what was queried is through, by what the query returned.
inline bool is_over(cudaError_t queried, const char* call, const char* here) {
  if (queried == cudaErrorNotReady) {
    (void)cudaGetLastError();
    return false;
  }
  check_cuda(queried, call, here);
  return true;
}

#define MOEVEMENT_CUDA(call) ::moevement::check_cuda((call), #call, MOEVEMENT_HERE)

// Throws EngineError.
inline void check_device_index(int index) {
  int count = 0;
  MOEVEMENT_CUDA(cudaGetDeviceCount(&count));
  if (index < 0 || index >= count) {
    throw EngineError("no CUDA device " + std::to_string(index) + ": " + std::to_string(count) + " visible" +
                      MOEVEMENT_HERE);
  }
}

// Whether this process uses a device already. To make it current would begin to, which takes half a gigabyte of it.
inline bool in_use(int index) {
  using Query = int (*)(int device, unsigned int* flags, int* active);
  static const Query query = [] {
    void* driver = ::dlopen("libcuda.so.1", RTLD_LAZY | RTLD_NOLOAD);
    return driver == nullptr ? nullptr : reinterpret_cast<Query>(::dlsym(driver, "cuDevicePrimaryCtxGetState"));
  }();
  unsigned int flags = 0;
  int active = 1;
  return query == nullptr || query(index, &flags, &active) != 0 || active != 0;
}

// Callers keep their own current device; an engine's differs from it on a node with several GPUs. A thread that has had
// none is said to have device 0, and keeps the engine's.
class DeviceGuard {
 public:
  explicit DeviceGuard(int index) {
    MOEVEMENT_CUDA(cudaGetDevice(&before_));
    if (before_ != index) MOEVEMENT_CUDA(cudaSetDevice(index));
    changed_ = before_ != index;
  }
  ~DeviceGuard() {
    if (changed_ && in_use(before_)) (void)cudaSetDevice(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

class CudaEvent {
 public:
  explicit CudaEvent(bool timed = false) {
    MOEVEMENT_CUDA(cudaEventCreateWithFlags(&event_, timed ? cudaEventDefault : cudaEventDisableTiming));
  }
  ~CudaEvent() { (void)cudaEventDestroy(event_); }
  CudaEvent(const CudaEvent&) = delete;
  CudaEvent& operator=(const CudaEvent&) = delete;
  cudaEvent_t get() const { return event_; }

 private:
  cudaEvent_t event_ = nullptr;
};

enum class StreamPriority { least, greatest };

// Non-blocking: work on the legacy default stream must not wait for snapshots, nor they for it.
class SideStream {
 public:
  explicit SideStream(StreamPriority priority) {
    int least = 0;
    int greatest = 0;
    MOEVEMENT_CUDA(cudaDeviceGetStreamPriorityRange(&least, &greatest));
    MOEVEMENT_CUDA(cudaStreamCreateWithPriority(&stream_, cudaStreamNonBlocking,
                                                priority == StreamPriority::least ? least : greatest));
  }
  ~SideStream() { (void)cudaStreamDestroy(stream_); }
  SideStream(const SideStream&) = delete;
  SideStream& operator=(const SideStream&) = delete;
  cudaStream_t get() const { return stream_; }

 private:
  cudaStream_t stream_ = nullptr;
};

class DeviceMemory {
 public:
  explicit DeviceMemory(std::uint64_t bytes) {
    if (bytes != 0) MOEVEMENT_CUDA(cudaMalloc(&pointer_, bytes));
  }
  ~DeviceMemory() { (void)cudaFree(pointer_); }
  DeviceMemory(const DeviceMemory&) = delete;
  DeviceMemory& operator=(const DeviceMemory&) = delete;
  std::uint64_t address() const { return reinterpret_cast<std::uintptr_t>(pointer_); }

 private:
  void* pointer_ = nullptr;
};

// Host memory that kernels of all devices reach at the same address.
class PinnedMemory {
 public:
  explicit PinnedMemory(std::uint64_t bytes) {
    MOEVEMENT_CUDA(cudaHostAlloc(&pointer_, bytes, cudaHostAllocPortable | cudaHostAllocMapped));
  }
  ~PinnedMemory() { (void)cudaFreeHost(pointer_); }
  PinnedMemory(const PinnedMemory&) = delete;
  PinnedMemory& operator=(const PinnedMemory&) = delete;
  void* get() const { return pointer_; }

 private:
  void* pointer_ = nullptr;
};

}  // namespace moevement

#endif  // MOEVEMENT_WITH_CUDA
