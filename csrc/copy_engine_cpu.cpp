#include <cstring>

#include "copy_device.h"

namespace moevement {
namespace {

// Copies with the worker thread itself: a copy is over when the call returns, so that fences and marks are empty.
class CpuDevice final : public CopyDevice {
 public:
  void enter_worker() override {}
  std::unique_ptr<Fence> fence(std::uint64_t) override { return nullptr; }
  void copy(std::uint64_t source, std::uint64_t destination, std::uint64_t bytes) override {
    std::memcpy(reinterpret_cast<void*>(destination), reinterpret_cast<const void*>(source), bytes);
  }
  void mark(std::size_t) override {}
  void finish(std::size_t) override {}
  void drain() noexcept override {}
  bool usable() noexcept override { return true; }
  bool register_host(std::uint64_t, std::uint64_t) override { return false; }
  bool unregister_host(std::uint64_t) override { return false; }
};

}  // namespace

std::unique_ptr<CopyDevice> make_cpu_device() { return std::make_unique<CpuDevice>(); }

}  // namespace moevement
