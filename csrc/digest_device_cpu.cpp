#include <chrono>
#include <vector>

#include "digest_device.h"

namespace moevement {
namespace {

class CpuDigestDevice final : public DigestDevice {
 public:
  explicit CpuDigestDevice(const DigestRoom& room) : table_(room.ranges), results_(room.units) {}
  LeafRange* table() noexcept override { return table_.data(); }
  const unsigned char* results() const noexcept override {
    return reinterpret_cast<const unsigned char*>(results_.data());
  }
  std::uint64_t device_bytes() const noexcept override { return 0; }
  void start(std::uint32_t ranges, std::uint32_t leaves, std::uint32_t, std::uint64_t) override {
    const auto began = std::chrono::steady_clock::now();
    digest_leaves(table_.data(), ranges, leaves, reinterpret_cast<std::uintptr_t>(results_.data()));
    seconds_ = std::chrono::duration<double>(std::chrono::steady_clock::now() - began).count();
  }
  bool over() override { return true; }
  double seconds() override { return seconds_; }

 private:
  std::vector<LeafRange> table_;
  std::vector<Wide16> results_;
  double seconds_ = 0;
};

}  // namespace

std::unique_ptr<DigestDevice> make_cpu_digest_device(const DigestRoom& room) {
  return std::make_unique<CpuDigestDevice>(room);
}

}  // namespace moevement
