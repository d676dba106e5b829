// Digests memory behind the caller's back with a few threads, in chunks, so that one large range keeps them all busy.
// What a range's digest is: leaf_digest.h.
#pragma once

#include <sys/types.h>

#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <unordered_map>
#include <vector>

#include "digest_functions.h"
#include "leaf_digest.h"

namespace moevement {

struct DigestRange {
  std::uint64_t address;
  std::uint64_t bytes;
};
// Throws std::invalid_argument for a null or wrapping range; `index` names it.
void check_range(const DigestRange& range, std::size_t index);

class DigestPool {
 public:
  // Called about every 50 ms by calls that block; an exception from it ends the call and passes through.
  using Poll = std::function<void()>;

  // Throws std::invalid_argument unless `threads` is 1 to 64, EngineError when the system has no threads left.
  explicit DigestPool(std::size_t threads);
  // Does what close() does.
  ~DigestPool();
  DigestPool(const DigestPool&) = delete;
  DigestPool& operator=(const DigestPool&) = delete;

  // Queues ranges and returns a ticket. The memory must stay mapped until the ticket is finished. Throws
  // std::invalid_argument for a null or wrapping range; EngineError when 8 tickets are unfinished and after close().
  std::uint64_t submit(const std::vector<DigestRange>& ranges);
  // 16 bytes per range, or none when `timeout_seconds` pass first. Throws UnknownTicket; EngineError when cancelled.
  std::optional<std::string> wait(std::uint64_t ticket, double timeout_seconds, const Poll& poll = {});
  // Returns when no thread reads the ticket's memory any more. True when it is cancelled, false when it was done.
  bool cancel(std::uint64_t ticket);
  // One range, before all that is queued, with all threads. Throws as submit does, whatever is queued.
  std::string digest(std::uint64_t address, std::uint64_t bytes, const Poll& poll = {});

  std::size_t threads() const noexcept { return count_; }
  // Cancels what is not finished and joins the threads. A second call does nothing, nor does a call in a fork.
  void close();
  bool closed() const;
  bool in_owner_process() const noexcept;

 private:
  using Clock = std::chrono::steady_clock;
  using Lock = std::unique_lock<std::mutex>;
  enum class State { unfinished, done, cancelled };

  struct Part {
    std::uint64_t address;
    std::uint64_t bytes;
  };
  struct Ticket {
    std::uint64_t id = 0;
    bool urgent = false;  // not counted as queued
    State state = State::unfinished;
    bool cancel_requested = false;
    std::vector<Part> parts;
    std::vector<std::size_t> ends;  // of each range, in parts
    std::size_t next = 0;           // part to start
    std::size_t left = 0;           // parts that are not digested
    std::size_t readers = 0;        // threads at work
    std::string parts_digests;      // each thread writes its own parts' bytes
    std::string digest;
  };
  using TicketRef = std::shared_ptr<Ticket>;

  void require_owner() const;
  TicketRef find(std::uint64_t ticket) const;
  std::uint64_t enqueue(const std::vector<DigestRange>& ranges, bool urgent);
  void finish(Ticket& ticket, State state);
  void work(std::size_t number);
  void digest_parts(Ticket& ticket, std::size_t first, std::size_t last) const;
  std::string combine(const Ticket& ticket) const;

  const pid_t owner_;
  const std::size_t count_;
  const DigestFunction function_;
  mutable std::mutex mutex_;
  std::mutex close_mutex_;
  std::condition_variable work_;      // threads sleep here
  std::condition_variable finished_;  // callers sleep here
  std::unordered_map<std::uint64_t, TicketRef> tickets_;
  std::deque<TicketRef> queue_;  // tickets with parts to start
  std::deque<std::uint64_t> finished_order_;
  std::uint64_t last_ticket_ = 0;
  std::size_t unfinished_ = 0;  // without the urgent ones
  bool closing_ = false;
  std::vector<std::thread> threads_;
};

}  // namespace moevement
