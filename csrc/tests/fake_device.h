// A copy device that stalls and fails as a test tells it to.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "check.h"
#include "copy_device.h"
#include "copy_engine.h"

namespace moevement {

// What the fakes do, shared with the test that watches them.
struct Script {
  std::atomic<bool> fence_open{true};
  std::atomic<int> fail_at_copy{-1};   // counted over all copies
  std::atomic<bool> sticky{false};
  std::atomic<bool> chunk_gate_open{true};
  std::atomic<int> copies{0};
  std::atomic<int> in_flight{0};       // copies started and not finished
  std::atomic<int> chunks{0};          // chunks marked and not finished
  std::atomic<int> most_chunks{0};
  std::atomic<int> drains{0};
};

class FakeFence final : public Fence {
 public:
  explicit FakeFence(Script& script) : script_(script) {}
  bool passed() override { return script_.fence_open; }

 private:
  Script& script_;
};

// Like a GPU: copies are only promised at the call, and are over when their chunk is finished or drained.
class FakeDevice final : public CopyDevice {
 public:
  FakeDevice(Script& script, std::size_t slots) : script_(script), marked_(slots) {}
  void enter_worker() override {}
  std::unique_ptr<Fence> fence(std::uint64_t) override { return std::make_unique<FakeFence>(script_); }
  void copy(std::uint64_t source, std::uint64_t destination, std::uint64_t bytes) override {
    if (script_.copies++ == script_.fail_at_copy) {
      broken_ = script_.sticky;
      throw EngineError(std::string("planted error") + MOEVEMENT_HERE);
    }
    open_.push_back({source, destination, bytes});
    ++script_.in_flight;
  }
  void mark(std::size_t slot) override {
    CHECK(marked_[slot].empty());
    marked_[slot].swap(open_);
    script_.most_chunks = std::max(script_.most_chunks.load(), ++script_.chunks);
  }
  void finish(std::size_t slot) override {
    await_gate();
    CHECK(!marked_[slot].empty());
    --script_.chunks;
    perform(marked_[slot]);
  }
  void drain() noexcept override {
    await_gate();
    ++script_.drains;
    script_.chunks = 0;
    for (auto& chunk : marked_) perform(chunk);
    perform(open_);
  }
  bool usable() noexcept override { return !broken_; }
  bool register_host(std::uint64_t, std::uint64_t) override { return true; }
  bool unregister_host(std::uint64_t) override { return true; }

 private:
  // Bounded, so that a test that fails with the gate closed still ends.
  void await_gate() const {
    for (int tries = 0; tries < 2000 && !script_.chunk_gate_open; ++tries) {
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
  }
  void perform(std::vector<CopyPiece>& pieces) {
    for (const CopyPiece& item : pieces) {
      std::memcpy(reinterpret_cast<void*>(item.destination), reinterpret_cast<const void*>(item.source), item.bytes);
      --script_.in_flight;
    }
    pieces.clear();
  }

  Script& script_;
  std::vector<std::vector<CopyPiece>> marked_;
  std::vector<CopyPiece> open_;
  bool broken_ = false;
};

}  // namespace moevement
