// A copy device that stalls and fails as a test tells it to.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <deque>
#include <memory>
#include <mutex>
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
  std::atomic<int> fences_asked{0};
  std::atomic<std::uint64_t> shut_stream{0};  // fences of this stream do not pass; 0: none
  std::atomic<std::uint64_t> broken_stream{0};  // asking for fences of this stream fails; 0: none
  std::atomic<int> fail_at_chunk{-1};         // counted over all chunks
  std::atomic<int> fail_at_finish{-1};
  std::atomic<bool> sticky{false};
  std::atomic<bool> chunk_gate_open{true};    // shut: a chunk is over only when a permit is there for it
  std::atomic<int> permits{0};
  std::atomic<int> started{0};                // chunks
  std::atomic<int> finished{0};
  std::atomic<int> chunks{0};                 // in flight
  std::atomic<int> most_chunks{0};
  std::atomic<int> drains{0};

  std::vector<std::uint64_t> sources() {
    const std::lock_guard<std::mutex> lock(mutex);
    return log;
  }
  std::mutex mutex;
  std::vector<std::uint64_t> log;    // source of each chunk's first piece
};

class FakeFence final : public Fence {
 public:
  FakeFence(Script& script, std::uint64_t stream) : script_(script), stream_(stream) {}
  bool passed() override {
    ++script_.fences_asked;
    if (stream_ != 0 && script_.broken_stream == stream_) throw EngineError("planted error of a fence");
    return script_.fence_open && (stream_ == 0 || script_.shut_stream != stream_);
  }

 private:
  Script& script_;
  std::uint64_t stream_;
};

// Like a GPU: copies are only promised at the call, and are over when their chunk is finished or drained.
class FakeDevice final : public CopyDevice {
 public:
  explicit FakeDevice(Script& script) : script_(script), chunks_(kMaxChunksInFlight) {}
  void enter_worker() override {}
  std::unique_ptr<Fence> fence(std::uint64_t stream) override { return std::make_unique<FakeFence>(script_, stream); }
  std::unique_ptr<Fence> mark(std::uint64_t stream) override { return fence(stream); }
  std::uint64_t staging_bytes() const noexcept override { return 0; }
  Direction direction(const CopyPiece&) override { return Direction::other; }
  void copy_chunk(const Chunk& chunk, std::size_t slot) override {
    CHECK(chunks_[slot].empty() && !chunk.pieces.empty());
    {
      const std::lock_guard<std::mutex> lock(script_.mutex);
      script_.log.push_back(chunk.pieces.front().source);
    }
    if (script_.started++ == script_.fail_at_chunk) {
      broken_ = script_.sticky;
      throw EngineError(std::string("planted error") + MOEVEMENT_HERE);
    }
    chunks_[slot] = chunk.pieces;
    order_.push_back(slot);
    script_.most_chunks = std::max(script_.most_chunks.load(), ++script_.chunks);
  }
  void finish(std::size_t slot) override {
    CHECK(!order_.empty() && order_.front() == slot);
    await_permit();
    if (script_.finished++ == script_.fail_at_finish) {
      broken_ = script_.sticky;
      throw EngineError(std::string("planted late error") + MOEVEMENT_HERE);
    }
    perform_oldest();
  }
  void drain() noexcept override {
    ++script_.drains;
    while (!order_.empty()) perform_oldest();
  }
  bool usable() noexcept override { return !broken_; }
  bool register_host(std::uint64_t, std::uint64_t) override { return true; }
  bool unregister_host(std::uint64_t) override { return true; }

 private:
  // Bounded, so that a test that fails with the gate shut still ends.
  void await_permit() const {
    for (int tries = 0; tries < 2000 && !script_.chunk_gate_open; ++tries) {
      if (script_.permits > 0) {
        --script_.permits;
        return;
      }
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
  }
  void perform_oldest() {
    auto& chunk = chunks_[order_.front()];
    for (const CopyPiece& item : chunk) {
      std::memcpy(reinterpret_cast<void*>(item.destination), reinterpret_cast<const void*>(item.source), item.bytes);
    }
    chunk.clear();
    order_.pop_front();
    --script_.chunks;
  }

  Script& script_;
  std::vector<std::vector<CopyPiece>> chunks_;
  std::deque<std::size_t> order_;
  bool broken_ = false;
};

}  // namespace moevement
