// What the native tests share.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include "check.h"
#include "copy_engine.h"
#include "fake_device.h"

namespace moevement {

using Bytes = std::vector<unsigned char>;

inline std::uint64_t address(const void* pointer) { return reinterpret_cast<std::uintptr_t>(pointer); }
inline CopyPiece piece(const Bytes& from, Bytes& to) { return {address(from.data()), address(to.data()), from.size()}; }

inline Bytes random_bytes(std::size_t size, std::mt19937_64& random) {
  Bytes bytes(size);
  for (auto& byte : bytes) byte = static_cast<unsigned char>(random());
  return bytes;
}

inline EngineLimits small_chunks(std::uint64_t chunk_bytes) {
  EngineLimits limits;
  limits.chunk_bytes = chunk_bytes;
  return limits;
}

inline std::unique_ptr<FakeDevice> fake(Script& script) { return std::make_unique<FakeDevice>(script); }

inline void until(const std::function<bool()>& condition) {
  for (int tries = 0; tries < 10000 && !condition(); ++tries) {
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  CHECK(condition());
}

// A ticket of `count` chunks of 4 bytes; `mine` tells its chunks from others in the script's log.
struct Batch {
  explicit Batch(std::size_t chunks) : from(4 * chunks, 7), to(4 * chunks, 0) {}
  std::uint64_t submit(CopyEngine& engine, SubmitOptions options = {}, std::uint64_t stream = 0) {
    return engine.submit({piece(from, to)}, stream, "", std::move(options));
  }
  bool mine(std::uint64_t source) const {
    return source >= address(from.data()) && source < address(from.data()) + from.size();
  }
  Bytes from, to;
};

inline SubmitOptions priority(int value) {
  SubmitOptions options;
  options.priority = value;
  return options;
}

}  // namespace moevement
