// Stands in for the CUDA runtime, so that test_cuda.cpp and the CUDA device run where there is no GPU, also under
// sanitizers: every stream is a thread that does its work late and in order, device memory is plain memory. It shows
// wrong order, wrong addresses and races; it says nothing about speed, nor about what a real driver refuses.
#include <cuda_runtime_api.h>
#include <sys/mman.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <set>
#include <thread>

#include "gather.h"
#include "fingerprint.h"
#include "leaf_digest.h"

namespace {

// What an event was last recorded as.
class Mark {
 public:
  void set() {
    const std::lock_guard<std::mutex> lock(mutex_);
    done_ = true;
    at_ = std::chrono::steady_clock::now();
    changed_.notify_all();
  }
  std::chrono::steady_clock::time_point at() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return at_;
  }
  void wait() {
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait(lock, [this] { return done_; });
  }
  bool done() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return done_;
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  std::chrono::steady_clock::time_point at_;
  bool done_ = false;
};

class Event {
 public:
  std::shared_ptr<Mark> record() {
    const std::lock_guard<std::mutex> lock(mutex_);
    mark_ = std::make_shared<Mark>();
    return mark_;
  }
  std::shared_ptr<Mark> mark() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return mark_;
  }

 private:
  std::mutex mutex_;
  std::shared_ptr<Mark> mark_;
};

class Stream {
 public:
  Stream() : thread_([this] { run(); }) {}
  ~Stream() {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      ended_ = true;
      changed_.notify_all();
    }
    thread_.join();
  }
  void add(std::function<void()> work) {
    const std::lock_guard<std::mutex> lock(mutex_);
    queue_.push_back(std::move(work));
    changed_.notify_all();
  }
  void wait() {
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait(lock, [this] { return queue_.empty() && !busy_; });
  }
  bool idle() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return queue_.empty() && !busy_;
  }

 private:
  void run() {
    std::mt19937 random(7);
    std::unique_lock<std::mutex> lock(mutex_);
    while (true) {
      changed_.wait(lock, [this] { return ended_ || !queue_.empty(); });
      if (queue_.empty()) return;
      const auto work = std::move(queue_.front());
      queue_.pop_front();
      busy_ = true;
      lock.unlock();
      // Now and then late, so that who does not wait is found out.
      if (random() % 4 == 0) std::this_thread::sleep_for(std::chrono::microseconds(random() % 60));
      work();
      lock.lock();
      busy_ = false;
      changed_.notify_all();
    }
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<std::function<void()>> queue_;
  bool busy_ = false;
  bool ended_ = false;
  std::thread thread_;
};

Event& event_of(cudaEvent_t event) { return *reinterpret_cast<Event*>(event); }

Stream& stream_of(cudaStream_t stream) {
  static Stream standard;
  return stream == nullptr ? standard : *reinterpret_cast<Stream*>(stream);
}

std::mutex memory_mutex;
std::map<std::uint64_t, std::uint64_t> allocations;  // address and bytes
std::set<void*> registered;

std::uint64_t number(const void* pointer) { return reinterpret_cast<std::uintptr_t>(pointer); }

// The bytes from `address` to the end of its allocation; 0 where it is in none.
std::uint64_t left_in_allocation(std::uint64_t address) {
  const std::lock_guard<std::mutex> lock(memory_mutex);
  auto found = allocations.upper_bound(address);
  if (found == allocations.begin()) return 0;
  --found;
  const std::uint64_t end = found->first + found->second;
  return address < end ? end - address : 0;
}

bool overruns(const void* pointer, std::size_t bytes) {
  const std::uint64_t left = left_in_allocation(number(pointer));
  return left != 0 && bytes > left;
}

cudaError_t new_stream(cudaStream_t* stream) {
  *stream = reinterpret_cast<cudaStream_t>(new Stream);
  return cudaSuccess;
}

}  // namespace

extern "C" {

cudaError_t cudaGetLastError() { return cudaSuccess; }
const char* cudaGetErrorName(cudaError_t) { return "fake error"; }
const char* cudaGetErrorString(cudaError_t) { return "of the fake runtime"; }
cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
cudaError_t cudaSetDevice(int) { return cudaSuccess; }
cudaError_t cudaGetDeviceCount(int* count) { return *count = 1, cudaSuccess; }
cudaError_t cudaDeviceSynchronize() { return stream_of(nullptr).wait(), cudaSuccess; }
cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  return *least = 0, *greatest = -5, cudaSuccess;
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  *event = reinterpret_cast<cudaEvent_t>(new Event);
  return cudaSuccess;
}
cudaError_t cudaEventDestroy(cudaEvent_t event) { return delete &event_of(event), cudaSuccess; }
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  stream_of(stream).add([mark = event_of(event).record()] { mark->set(); });
  return cudaSuccess;
}
cudaError_t cudaEventQuery(cudaEvent_t event) {
  const auto mark = event_of(event).mark();
  return !mark || mark->done() ? cudaSuccess : cudaErrorNotReady;
}
cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  if (const auto mark = event_of(event).mark()) mark->wait();
  return cudaSuccess;
}

cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t first, cudaEvent_t second) {
  const auto from = event_of(first).mark();
  const auto to = event_of(second).mark();
  if (!from || !to) return cudaErrorInvalidResourceHandle;
  if (!from->done() || !to->done()) return cudaErrorNotReady;
  *milliseconds = std::chrono::duration<float, std::milli>(to->at() - from->at()).count();
  return cudaSuccess;
}

cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned, int) { return new_stream(stream); }
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) { return new_stream(stream); }
cudaError_t cudaStreamDestroy(cudaStream_t stream) { return delete &stream_of(stream), cudaSuccess; }
cudaError_t cudaStreamSynchronize(cudaStream_t stream) { return stream_of(stream).wait(), cudaSuccess; }
cudaError_t cudaStreamQuery(cudaStream_t stream) {
  return stream_of(stream).idle() ? cudaSuccess : cudaErrorNotReady;
}
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
  if (const auto mark = event_of(event).mark()) stream_of(stream).add([mark] { mark->wait(); });
  return cudaSuccess;
}
cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t function, void* argument) {
  stream_of(stream).add([=] { function(argument); });
  return cudaSuccess;
}

cudaError_t cudaMalloc(void** pointer, size_t bytes) {
  // Far from all other memory, as a GPU's is, and where the thread sanitizer allows it; one next to the other.
  static std::atomic<std::uint64_t> next{0x7e8000000000};
  constexpr std::uint64_t kSegment = 2 << 20;
  void* wanted = reinterpret_cast<void*>(next.fetch_add((bytes + kSegment - 1) / kSegment * kSegment));
  *pointer = ::mmap(wanted, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (*pointer == MAP_FAILED) return cudaErrorMemoryAllocation;
  const std::lock_guard<std::mutex> lock(memory_mutex);
  allocations[number(*pointer)] = bytes;
  return cudaSuccess;
}
cudaError_t cudaFree(void* pointer) {
  const std::lock_guard<std::mutex> lock(memory_mutex);
  const auto found = allocations.find(number(pointer));
  if (found == allocations.end()) return cudaSuccess;
  ::munmap(pointer, found->second);
  allocations.erase(found);
  return cudaSuccess;
}
cudaError_t cudaMallocHost(void** pointer, size_t bytes) { return *pointer = ::operator new(bytes), cudaSuccess; }
cudaError_t cudaHostAlloc(void** pointer, size_t bytes, unsigned) { return cudaMallocHost(pointer, bytes); }
cudaError_t cudaFreeHost(void* pointer) { return ::operator delete(pointer), cudaSuccess; }

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t stream) {
  if (overruns(to, bytes) || overruns(from, bytes)) return cudaErrorInvalidValue;
  stream_of(stream).add([=] { std::memcpy(to, from, bytes); });
  return cudaSuccess;
}
cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind) {
  const cudaError_t code = cudaMemcpyAsync(to, from, bytes, kind, nullptr);
  stream_of(nullptr).wait();
  return code;
}
cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t stream) {
  stream_of(stream).add([=] { std::memset(to, value, bytes); });
  return cudaSuccess;
}
cudaError_t cudaMemset(void* to, int value, size_t bytes) { return cudaMemsetAsync(to, value, bytes, nullptr); }

cudaError_t cudaHostRegister(void* pointer, size_t, unsigned) {
  const std::lock_guard<std::mutex> lock(memory_mutex);
  return registered.insert(pointer).second ? cudaSuccess : cudaErrorHostMemoryAlreadyRegistered;
}
cudaError_t cudaHostUnregister(void* pointer) {
  const std::lock_guard<std::mutex> lock(memory_mutex);
  return registered.erase(pointer) != 0 ? cudaSuccess : cudaErrorHostMemoryNotRegistered;
}
cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* found, const void* pointer) {
  found->device = 0;
  found->type = left_in_allocation(number(pointer)) != 0 ? cudaMemoryTypeDevice : cudaMemoryTypeUnregistered;
  return cudaSuccess;
}

}  // extern "C"

namespace moevement {

int launch_gather(const GatherTable& table, std::uint64_t staging, bool scatter, void* stream) noexcept {
  constexpr std::uint32_t kLanes = 8;
  for (std::uint32_t index = 0; index < table.count; ++index) {
    const Descriptor& item = table.items[index];
    if (item.bytes > left_in_allocation(item.address)) return cudaErrorInvalidValue;
    if (item.bytes > left_in_allocation(staging + item.offset)) return cudaErrorInvalidValue;
  }
  stream_of(static_cast<cudaStream_t>(stream)).add([=] {
    for (std::uint32_t index = 0; index < table.count; ++index) {
      for (std::uint32_t lane = 0; lane < kLanes; ++lane) {
        move_piece(table.items[index], staging, scatter, lane, kLanes);
      }
    }
  });
  return cudaSuccess;
}

int launch_leaf_digests(const LeafRange* ranges, std::uint32_t count, std::uint32_t leaves, std::uint64_t results,
                        std::uint32_t blocks, void* stream) noexcept {
  if (blocks == 0 || count * sizeof(LeafRange) > left_in_allocation(number(ranges))) return cudaErrorInvalidValue;
  stream_of(static_cast<cudaStream_t>(stream)).add([=] { digest_leaves(ranges, count, leaves, results); });
  return cudaSuccess;
}

int launch_fingerprint(std::uint64_t address, std::uint64_t bytes, std::uint64_t result, void* stream) noexcept {
  constexpr std::uint64_t kLanes = 8;
  if (bytes > left_in_allocation(address) || left_in_allocation(result) < 8) return cudaErrorInvalidValue;
  stream_of(static_cast<cudaStream_t>(stream)).add([=] {
    for (std::uint64_t lane = 0; lane < kLanes; ++lane) {
      *reinterpret_cast<std::uint64_t*>(result) += fingerprint_share(address, bytes, lane, kLanes);
    }
  });
  return cudaSuccess;
}

}  // namespace moevement
