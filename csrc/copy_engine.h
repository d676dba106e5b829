// Copies batches of memory pieces behind the caller's back, in order, in small chunks, with one worker thread.
//
// Why chunks: a bulk device-to-host copy stands in front of the small read-backs that a training step waits for; a few
// megabytes at a time, a few in flight, let those in between at almost no loss of bandwidth.
#pragma once

#include <sys/types.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <string>
#include <thread>
#include <unordered_map>
#include <vector>

#include "copy_device.h"

namespace moevement {

struct CopyPiece {
  std::uint64_t source;
  std::uint64_t destination;
  std::uint64_t bytes;
};

enum class TicketState { queued, running, done, cancelled, failed };
const char* state_name(TicketState state);

struct EngineLimits {
  std::uint64_t chunk_bytes = std::uint64_t{4} << 20;
  std::size_t chunks_in_flight = 2;
  std::size_t max_queued_tickets = 64;       // unfinished tickets, the running one included
  std::size_t max_finished_tickets = 1024;   // finished tickets whose record is kept
  double bytes_per_second_limit = 0;         // 0: none
};

// Throws std::invalid_argument for a limit out of its range.
void check_limits(const EngineLimits& limits);

struct CopyStats {
  std::uint64_t bytes;        // copied so far
  std::uint64_t total_bytes;  // asked for
  double copy_seconds;        // from the first chunk's start to the finish (or to now)
  double queue_seconds;       // from submit to the first chunk's start (or to the finish, or to now)
};

class CopyEngine {
 public:
  // Called about every 50 ms by calls that block; an exception from it ends the call and passes through.
  using Poll = std::function<void()>;

  // Throws std::invalid_argument for limits out of range.
  CopyEngine(std::unique_ptr<CopyDevice> device, const EngineLimits& limits);
  // Does what close() does.
  ~CopyEngine();
  CopyEngine(const CopyEngine&) = delete;
  CopyEngine& operator=(const CopyEngine&) = delete;

  // Queues a batch behind the work given to `stream` so far (0: the device's default stream) and returns its ticket.
  // The memory must stay as it is until the ticket is finished. Throws std::invalid_argument for a null, wrapping or
  // self-overlapping piece; EngineError when the queue is full, the engine is closed or has failed.
  std::uint64_t submit(std::vector<CopyPiece> batch, std::uint64_t stream, std::string label);
  // True when every byte of the ticket is copied. Throws UnknownTicket, and EngineError when the copy failed.
  bool done(std::uint64_t ticket) const;
  // True when the ticket is done or cancelled, false when `timeout_seconds` pass first. Throws as done() does.
  bool wait(std::uint64_t ticket, double timeout_seconds, const Poll& poll = {});
  // Drops what is not started and returns when nothing of the ticket is in flight. True when the ticket is cancelled,
  // false when it was done or failed before.
  bool cancel(std::uint64_t ticket);
  TicketState state(std::uint64_t ticket) const;
  CopyStats stats(std::uint64_t ticket) const;
  // submit and wait in one. Throws EngineError when the copy fails, is cancelled or takes longer than the time-out; no
  // chunk is in flight after it returns or throws.
  CopyStats copy_now(std::vector<CopyPiece> batch, std::uint64_t stream, std::string label, double timeout_seconds,
                     const Poll& poll = {});

  // Pins host memory until it is unregistered or the engine closes; false on the CPU. Throw EngineError.
  bool register_host(std::uint64_t address, std::uint64_t nbytes);
  bool unregister_host(std::uint64_t address);

  // Cancels what is not finished and joins the worker. A second call does nothing, nor does a call in a fork. Finished
  // tickets stay readable.
  void close();
  bool closed() const;
  // Why the engine ended by itself, if it did.
  std::optional<std::string> failure() const;
  // The worker thread exists only in the process that made the engine: a fork can neither use nor destroy it, and must
  // leak it.
  bool in_owner_process() const noexcept;

 private:
  using Clock = std::chrono::steady_clock;
  using Lock = std::unique_lock<std::mutex>;

  struct Ticket {
    std::vector<CopyPiece> pieces;
    std::unique_ptr<Fence> fence;
    std::string label;
    std::string error;
    std::uint64_t id = 0;
    std::uint64_t total_bytes = 0;
    TicketState state = TicketState::queued;
    Clock::time_point submitted, started, finished;
    bool has_started = false;
    std::atomic<bool> cancel_requested{false};
    std::atomic<std::uint64_t> copied{0};
  };
  using TicketRef = std::shared_ptr<Ticket>;

  void require_owner() const;
  void require_accepting() const;
  TicketRef find(std::uint64_t ticket) const;
  static bool is_finished(const Ticket& ticket);
  static void raise_failed(const Ticket& ticket);
  CopyStats stats_of(const Ticket& ticket) const;
  void finish(Ticket& ticket, TicketState state, const std::string& error);
  void fail_engine(const std::string& error);

  void run();
  bool await_fence(Ticket& ticket);
  bool pace(Ticket& ticket, std::uint64_t bytes);
  bool copy_chunks(Ticket& ticket);

  const pid_t owner_;
  const EngineLimits limits_;
  const std::unique_ptr<CopyDevice> device_;

  mutable std::mutex mutex_;
  std::mutex close_mutex_;
  std::condition_variable work_;      // the worker sleeps here: new work, a cancel, the end
  std::condition_variable finished_;  // callers sleep here
  std::unordered_map<std::uint64_t, TicketRef> tickets_;
  std::deque<TicketRef> queue_;
  std::deque<std::uint64_t> finished_order_;
  std::set<std::uint64_t> registered_;
  TicketRef running_;
  std::string failure_;
  std::uint64_t last_ticket_ = 0;
  Clock::time_point next_copy_at_{};  // worker thread only
  bool closing_ = false;
  std::thread worker_;
};

}  // namespace moevement
