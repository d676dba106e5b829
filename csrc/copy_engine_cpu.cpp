#include <cstring>

#include "copy_device.h"

namespace moevement {
namespace {

// Copies with the worker thread itself: a chunk is over when the call returns, so that there is nothing to wait for.
class CpuDevice final : public CopyDevice {
 public:
  void enter_worker() override {}
  std::unique_ptr<Fence> fence(std::uint64_t) override { return nullptr; }
  std::unique_ptr<Fence> mark(std::uint64_t) override { return nullptr; }
  std::uint64_t staging_bytes() const noexcept override { return 0; }
  Direction direction(const CopyPiece&) override { return Direction::other; }
  void copy_chunk(const Chunk& chunk, std::size_t) override {
    for (const CopyPiece& piece : chunk.pieces) {
      std::memcpy(reinterpret_cast<void*>(piece.destination), reinterpret_cast<const void*>(piece.source),
                  piece.bytes);
    }
  }
  void finish(std::size_t) override {}
  void drain() noexcept override {}
  bool usable() noexcept override { return true; }
  bool register_host(std::uint64_t, std::uint64_t) override { return false; }
  bool unregister_host(std::uint64_t) override { return false; }
};

}  // namespace

std::unique_ptr<CopyDevice> make_cpu_device() { return std::make_unique<CpuDevice>(); }

}  // namespace moevement
