// Digests memory of a device where it lies, before it is copied. The digests are those of DigestPool.
//
// One batch is under way at a time, as one slot is. A batch waits on the device for the work that its stream was given
// before; no thread waits with it.
#pragma once

#include <sys/types.h>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "digest_device.h"
#include "digest_functions.h"
#include "digest_pool.h"

namespace moevement {

// What a DeviceDigests has room for, in one batch.
struct DigestLimits {
  std::uint64_t ranges;
  std::uint64_t bytes;
};
// Throws std::invalid_argument for limits of 0 or beyond 2^32 leaves or units.
DigestRoom digest_room(const DigestLimits& limits);

constexpr std::uint32_t kDigestBlocks = 16;
constexpr std::uint32_t kMaxDigestBlocks = 65535;

class DeviceDigests {
 public:
  using Poll = DigestPool::Poll;

  // `device` has digest_room(limits). Throws std::invalid_argument.
  DeviceDigests(std::unique_ptr<DigestDevice> device, const DigestLimits& limits, std::uint32_t blocks);
  // Does what close() does.
  ~DeviceDigests();
  DeviceDigests(const DeviceDigests&) = delete;
  DeviceDigests& operator=(const DeviceDigests&) = delete;

  // Starts to digest ranges of device memory behind the work given to `stream` so far and returns a ticket. The memory
  // must stay allocated until the next submit or close() returns, and unchanged until wait() has given digests.
  // Throws std::invalid_argument for a null or wrapping range and beyond the limits; EngineError when the batch before
  // is not over or not asked for, after close(), and for errors of the device.
  std::uint64_t submit(const std::vector<DigestRange>& ranges, std::uint64_t stream, std::string label);
  // 16 bytes per range, or none when `timeout_seconds` pass first; may be asked again until the next submit. Throws
  // UnknownTicket; EngineError when cancelled or failed.
  std::optional<std::string> wait(std::uint64_t ticket, double timeout_seconds, const Poll& poll = {});
  // Seconds that the device digested for a ticket that wait() has given. Throws UnknownTicket, EngineError.
  double seconds(std::uint64_t ticket) const;
  // Gives up a ticket without waiting: its stream may never get there. The device may go on to read the memory. True
  // when the ticket is cancelled, false when it was done or failed before.
  bool cancel(std::uint64_t ticket);
  // Blocks of threads on the GPU for batches from now on. Throws std::invalid_argument.
  void set_blocks(std::uint32_t blocks);

  std::uint64_t device_bytes() const noexcept { return device_bytes_; }
  // Waits for the device, 10 s at most: beyond that its memory is leaked. A second call does nothing, nor does a call in
  // a fork.
  void close();
  bool closed() const;
  bool in_owner_process() const noexcept;

 private:
  enum class State { none, unfinished, done, cancelled, failed };
  using Lock = std::unique_lock<std::mutex>;

  void require_owner() const;
  void require_latest(std::uint64_t ticket) const;
  void require_idle();
  void fill_table(const std::vector<DigestRange>& ranges);
  void raise_failed() const;
  void fail(const std::string& why);
  bool collect();
  std::string combine() const;

  const pid_t owner_;
  const DigestLimits limits_;
  const DigestRoom room_;
  const DigestFunction function_;
  const std::uint64_t device_bytes_;
  mutable std::mutex mutex_;
  std::unique_ptr<DigestDevice> device_;  // null once closed
  std::uint32_t blocks_;
  // Of the latest ticket.
  std::uint64_t ticket_ = 0;
  State state_ = State::none;
  std::string label_;
  std::string error_;
  std::string digests_;
  double seconds_ = 0;
  std::vector<std::uint64_t> sizes_;  // of all ranges, the empty ones too
  std::uint32_t table_size_ = 0;
  std::uint32_t leaves_ = 0;
};

}  // namespace moevement
