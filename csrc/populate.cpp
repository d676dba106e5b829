#include "populate.h"

#include <pthread.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <condition_variable>
#include <cstring>
#include <fstream>
#include <mutex>
#include <stdexcept>
#include <system_error>
#include <thread>
#include <vector>

#include "errors.h"

namespace moevement {
namespace {

constexpr std::size_t kMaxThreads = 64;
constexpr std::uint64_t kBlockBytes = std::uint64_t{256} << 20;
constexpr auto kProgressEvery = std::chrono::milliseconds(200);
constexpr int kMaxTries = 64;
// The kernel's numbers: the C library's headers may be older than the kernel, or lack them altogether.
constexpr int kPopulateRead = 22;
constexpr int kPopulateWrite = 23;
constexpr int kPreferNode = 1;
constexpr unsigned kMaxNodes = 1024;

// What the threads share; the caller watches it.
class Filling {
 public:
  Filling(void* address, std::size_t nbytes, Access access)
      : address_(static_cast<unsigned char*>(address)), nbytes_(nbytes),
        advice_(access == Access::write ? kPopulateWrite : kPopulateRead) {}

  ~Filling() {
    stop();
    for (std::thread& thread : threads_) thread.join();
  }
  Filling(const Filling&) = delete;
  Filling& operator=(const Filling&) = delete;

  void start(std::size_t threads) {
    for (std::size_t number = 0; number < threads; ++number) {
      {
        const std::lock_guard<std::mutex> lock(mutex_);
        ++working_;
      }
      try {
        threads_.emplace_back([this] { work(); });
      } catch (const std::system_error&) {
        const std::lock_guard<std::mutex> lock(mutex_);
        --working_;
        throw;
      }
    }
  }
  // False when it is over.
  bool wait() {
    std::unique_lock<std::mutex> lock(mutex_);
    return !ended_.wait_for(lock, kProgressEvery, [this] { return working_ == 0; });
  }
  void stop() { stopped_ = true; }
  std::uint64_t done() const { return done_; }
  int error() const { return error_; }

 private:
  void work() {
    (void)::pthread_setname_np(::pthread_self(), "moe-populate");
    while (!stopped_) {
      const std::uint64_t begin = next_.fetch_add(kBlockBytes);
      if (begin >= nbytes_) break;
      const std::uint64_t bytes = std::min(kBlockBytes, nbytes_ - begin);
      const int code = fill(address_ + begin, bytes);
      if (code != 0) {
        error_ = code;
        stop();
        break;
      }
      done_ += bytes;
    }
    const std::lock_guard<std::mutex> lock(mutex_);
    --working_;
    ended_.notify_all();
  }

  int fill(void* address, std::uint64_t bytes) const {
    int code = EINTR;
    for (int attempt = 0; attempt < kMaxTries && (code == EINTR || code == EAGAIN); ++attempt) {
      code = ::madvise(address, bytes, advice_) == 0 ? 0 : errno;
    }
    return code;
  }

  unsigned char* const address_;
  const std::uint64_t nbytes_;
  const int advice_;
  std::atomic<std::uint64_t> next_{0};
  std::atomic<std::uint64_t> done_{0};
  std::atomic<int> error_{0};
  std::atomic<bool> stopped_{false};
  std::mutex mutex_;
  std::condition_variable ended_;
  std::size_t working_ = 0;
  std::vector<std::thread> threads_;
};

// "0" or "0-1,3": whether the list has more than one entry.
bool several_nodes() {
  std::ifstream file("/sys/devices/system/node/has_memory");
  std::string nodes;
  return std::getline(file, nodes) && nodes.find_first_of(",-") != std::string::npos;
}

OsError populate_error(int code, const std::string& path, const char* here) {
  // Where a full file system has no page for a fault, a program gets SIGBUS and this call EFAULT. It says EFAULT for
  // nothing else here, where the mapping ends with the file.
  if (code == EFAULT) code = ENOSPC;
  return OsError(code, std::string(std::strerror(code)) + " in madvise(MADV_POPULATE)" + here, path);
}

}  // namespace

void check_populate_threads(std::size_t threads) {
  if (threads < 1 || threads > kMaxThreads) {
    throw std::invalid_argument("threads must be 1 to 64, got " + std::to_string(threads) + MOEVEMENT_HERE);
  }
}

bool populate(void* address, std::size_t nbytes, Access access, std::size_t threads, const Progress& progress,
              const std::string& path) {
  Filling filling(address, nbytes, access);
  const std::size_t blocks = (nbytes + kBlockBytes - 1) / kBlockBytes;
  try {
    filling.start(std::min(threads, blocks));
  } catch (const std::system_error& problem) {
    throw OsError(problem.code().value(), std::string(problem.what()) + " when starting a thread" + MOEVEMENT_HERE,
                  path);
  }
  while (filling.wait()) {
    if (progress) progress(filling.done());
  }
  if (filling.error() == EINVAL) return false;
  if (filling.error() != 0) throw populate_error(filling.error(), path, MOEVEMENT_HERE);
  return true;
}

void prefer_local_memory(void* address, std::size_t nbytes) noexcept {
  unsigned cpu = 0;
  unsigned node = 0;
  try {
    if (!several_nodes()) return;
  } catch (const std::exception&) {
    return;
  }
  if (::syscall(SYS_getcpu, &cpu, &node, nullptr) != 0 || node >= kMaxNodes) return;
  constexpr unsigned kBits = 8 * sizeof(unsigned long);
  unsigned long nodes[kMaxNodes / kBits] = {};
  nodes[node / kBits] = 1UL << (node % kBits);
  (void)::syscall(SYS_mbind, address, nbytes, kPreferNode, nodes, static_cast<unsigned long>(kMaxNodes), 0U);
}

void prefer_huge_pages(void* address, std::size_t nbytes) noexcept {
#ifdef MADV_HUGEPAGE
  (void)::madvise(address, nbytes, MADV_HUGEPAGE);
#else
  (void)address;
  (void)nbytes;
#endif
}

}  // namespace moevement
