#include "device_digests.h"

#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <limits>
#include <stdexcept>
#include <thread>
#include <utility>

#include "copy_limits.h"
#include "errors.h"

namespace moevement {
namespace {

using Clock = std::chrono::steady_clock;

constexpr auto kPollEvery = std::chrono::milliseconds(50);
// As a rule the device was ready long before anybody asks.
constexpr auto kFirstSleep = std::chrono::microseconds(20);
constexpr auto kLongestSleep = std::chrono::microseconds(500);
constexpr auto kCloseLimit = std::chrono::seconds(10);

std::uint64_t leaves_of(std::uint64_t bytes) { return bytes / kDigestLeafBytes + (bytes % kDigestLeafBytes != 0); }

// The bytes of a range's last leaf if it is taken along as it is, else 0.
std::uint64_t raw_bytes_of(std::uint64_t bytes) {
  const std::uint64_t tail = bytes % kDigestLeafBytes;
  return tail <= kRawBytes ? tail : 0;
}

std::uint64_t units_of(std::uint64_t bytes) {
  const std::uint64_t raw = raw_bytes_of(bytes);
  return leaves_of(bytes) - (raw != 0) + (raw + kUnitBytes - 1) / kUnitBytes;
}

std::uint32_t checked_blocks(std::uint32_t blocks) {
  if (blocks < 1 || blocks > kMaxDigestBlocks) {
    throw std::invalid_argument("blocks must be 1 to " + std::to_string(kMaxDigestBlocks) + ", got " +
                                std::to_string(blocks) + MOEVEMENT_HERE);
  }
  return blocks;
}

}  // namespace

DigestRoom digest_room(const DigestLimits& limits) {
  constexpr std::uint64_t kMost = std::numeric_limits<std::uint32_t>::max();
  // Every range can have a last leaf of its own.
  if (limits.ranges < 1 || limits.bytes < 1 || limits.ranges > kMost / (2 * kMaxRawUnits) ||
      limits.bytes / kDigestLeafBytes > kMost / 2) {
    throw std::invalid_argument("ranges_limit and bytes_limit must be at least 1, and come to less than 2^32 digests" +
                                std::string(MOEVEMENT_HERE));
  }
  return {limits.ranges, limits.bytes / kDigestLeafBytes + limits.ranges * kMaxRawUnits};
}

DeviceDigests::DeviceDigests(std::unique_ptr<DigestDevice> device, const DigestLimits& limits, std::uint32_t blocks)
    : owner_(::getpid()),
      limits_(limits),
      room_(digest_room(limits)),
      function_(best_digest()),
      device_bytes_(device->device_bytes()),
      device_(std::move(device)),
      blocks_(checked_blocks(blocks)) {}

DeviceDigests::~DeviceDigests() { close(); }

bool DeviceDigests::in_owner_process() const noexcept { return ::getpid() == owner_; }

void DeviceDigests::require_owner() const {
  if (!in_owner_process()) {
    throw EngineError(std::string("the device's digests belong to the process that made them, not to its fork") +
                      MOEVEMENT_HERE);
  }
}

// The following have the lock.
void DeviceDigests::require_latest(std::uint64_t ticket) const {
  if (ticket >= 1 && ticket == ticket_) return;
  throw UnknownTicket("device digest ticket " + std::to_string(ticket) +
                      (ticket >= 1 && ticket < ticket_ ? " is not the latest and its record is dropped"
                                                       : " was never given out") +
                      MOEVEMENT_HERE);
}

void DeviceDigests::require_idle() {
  if (device_ == nullptr) throw EngineError(std::string("the device's digests are closed") + MOEVEMENT_HERE);
  // What was cancelled may still be read and written by the device.
  if (state_ == State::unfinished || !device_->over()) {
    throw EngineError("the digests of " + label_ + " are not over: one batch at a time" + MOEVEMENT_HERE);
  }
}

void DeviceDigests::raise_failed() const { throw EngineError("digests of " + label_ + ": " + error_); }

void DeviceDigests::fail(const std::string& why) {
  state_ = State::failed;
  error_ = why;
}

void DeviceDigests::fill_table(const std::vector<DigestRange>& ranges) {
  std::uint64_t bytes = 0;
  for (std::size_t index = 0; index < ranges.size(); ++index) {
    check_range(ranges[index], index);
    // No sum of the limit's size wraps around.
    bytes += std::min(ranges[index].bytes, limits_.bytes + 1);
    if (index >= limits_.ranges || bytes > limits_.bytes) {
      throw std::invalid_argument("there is room for " + std::to_string(limits_.ranges) + " ranges of " +
                                  std::to_string(limits_.bytes) + " bytes together" + MOEVEMENT_HERE);
    }
  }
  sizes_.clear();
  table_size_ = leaves_ = 0;
  std::uint32_t units = 0;
  for (const DigestRange& range : ranges) {
    sizes_.push_back(range.bytes);
    if (range.bytes == 0) continue;
    device_->table()[table_size_++] = {range.address, range.bytes, leaves_, units};
    leaves_ += static_cast<std::uint32_t>(leaves_of(range.bytes));
    units += static_cast<std::uint32_t>(units_of(range.bytes));
  }
}

std::uint64_t DeviceDigests::submit(const std::vector<DigestRange>& ranges, std::uint64_t stream, std::string label) {
  require_owner();
  const Lock lock(mutex_);
  require_idle();
  fill_table(ranges);
  label_ = std::move(label);
  digests_.clear();
  seconds_ = 0;
  ++ticket_;
  state_ = State::unfinished;
  if (leaves_ == 0) {
    digests_ = combine();
    state_ = State::done;
    return ticket_;
  }
  try {
    device_->start(table_size_, leaves_, blocks_, stream);
  } catch (const EngineError& problem) {
    fail(problem.what());
    raise_failed();
  }
  return ticket_;
}

// Whether the latest ticket, which is unfinished, is finished now.
bool DeviceDigests::collect() {
  if (device_ == nullptr) {
    fail(std::string("closed") + MOEVEMENT_HERE);
    return true;
  }
  try {
    if (!device_->over()) return false;
    seconds_ = device_->seconds();
  } catch (const EngineError& problem) {
    fail(problem.what());
    return true;
  }
  digests_ = combine();
  state_ = State::done;
  return true;
}

std::optional<std::string> DeviceDigests::wait(std::uint64_t ticket, double timeout_seconds, const Poll& poll) {
  require_owner();
  const auto deadline = Clock::now() + duration_of(checked_timeout(timeout_seconds));
  auto poll_at = Clock::now() + kPollEvery;
  std::chrono::microseconds sleep = kFirstSleep;
  Lock lock(mutex_);
  require_latest(ticket);
  while (state_ == State::unfinished && !collect()) {
    const auto now = Clock::now();
    if (now >= deadline) return std::nullopt;
    lock.unlock();
    if (poll && now >= poll_at) {
      poll();
      poll_at = now + kPollEvery;
    }
    std::this_thread::sleep_for(std::min<Clock::duration>(sleep, deadline - now));
    sleep = std::min(2 * sleep, kLongestSleep);
    lock.lock();
    require_latest(ticket);
  }
  if (state_ == State::failed) raise_failed();
  if (state_ == State::cancelled) throw EngineError("the digests of " + label_ + " are cancelled" + MOEVEMENT_HERE);
  return digests_;
}

double DeviceDigests::seconds(std::uint64_t ticket) const {
  require_owner();
  const Lock lock(mutex_);
  require_latest(ticket);
  if (state_ != State::done) throw EngineError("the digests of " + label_ + " are not done" + MOEVEMENT_HERE);
  return seconds_;
}

bool DeviceDigests::cancel(std::uint64_t ticket) {
  require_owner();
  const Lock lock(mutex_);
  require_latest(ticket);
  if (state_ == State::unfinished) state_ = State::cancelled;
  return state_ == State::cancelled;
}

void DeviceDigests::set_blocks(std::uint32_t blocks) {
  require_owner();
  const Lock lock(mutex_);
  blocks_ = checked_blocks(blocks);
}

std::string DeviceDigests::combine() const {
  std::string digests(sizes_.size() * kDigestBytes, '\0');
  const unsigned char* from = device_ != nullptr ? device_->results() : nullptr;
  std::string leaves;
  for (std::size_t index = 0; index < sizes_.size(); ++index) {
    const std::uint64_t raw = raw_bytes_of(sizes_[index]);
    const std::uint64_t found = (leaves_of(sizes_[index]) - (raw != 0)) * kDigestBytes;
    const unsigned char* all = from;
    std::uint64_t nbytes = found;
    if (raw != 0) {
      leaves.assign(reinterpret_cast<const char*>(from), found);
      leaves.resize(found + kDigestBytes);
      function_(from + found, raw, reinterpret_cast<unsigned char*>(leaves.data()) + found);
      all = reinterpret_cast<const unsigned char*>(leaves.data());
      nbytes = leaves.size();
    }
    function_(all, nbytes, reinterpret_cast<unsigned char*>(digests.data()) + index * kDigestBytes);
    from += units_of(sizes_[index]) * kUnitBytes;
  }
  return digests;
}

void DeviceDigests::close() {
  if (!in_owner_process()) return;
  const Lock lock(mutex_);
  if (device_ == nullptr) return;
  if (state_ == State::unfinished) state_ = State::cancelled;
  bool over = false;
  try {
    for (const auto deadline = Clock::now() + kCloseLimit; !over && Clock::now() < deadline;) {
      over = device_->over();
      if (!over) std::this_thread::sleep_for(kLongestSleep);
    }
  } catch (const EngineError&) {
    // The device is lost, and writes nothing any more.
    over = true;
  }
  // To free memory would wait for a stream that never gets there.
  if (!over) (void)device_.release();
  device_.reset();
}

bool DeviceDigests::closed() const {
  require_owner();
  const Lock lock(mutex_);
  return device_ == nullptr;
}

}  // namespace moevement
