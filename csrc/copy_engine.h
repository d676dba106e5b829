// Copies batches of memory pieces behind the caller's back, in small chunks, with one worker thread.
//
// Why chunks: a bulk device-to-host copy stands in front of the small read-backs that a training step waits for; a few
// megabytes at a time, a few in flight, let those in between at almost no loss of bandwidth. Between two chunks the
// worker also changes over to a ticket of higher priority.
#pragma once

#include <sys/types.h>

#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <string>
#include <thread>
#include <unordered_map>
#include <utility>
#include <vector>

#include "chunking.h"
#include "copy_device.h"
#include "copy_limits.h"

namespace moevement {

enum class TicketState { queued, running, done, cancelled, failed };
const char* state_name(TicketState state);

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
  // The memory must stay as it is until the ticket is finished. All pieces go in one direction between host and device.
  // Throws std::invalid_argument for a null, wrapping or self-overlapping piece and for options out of range; EngineError
  // when the queue is full, the engine is closed or has failed.
  std::uint64_t submit(std::vector<CopyPiece> batch, std::uint64_t stream, std::string label,
                       SubmitOptions options = {});
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

  // The caller is about to wait for the ticket: it and the tickets before it of its priority are not spread out nor
  // paused any more, and may have more chunks in flight. Nothing happens to a finished one. Throws UnknownTicket.
  void hurry(std::uint64_t ticket);
  // A small copy of somebody else will be awaited: tickets of priority 0 that nobody waits for start no chunk until
  // resume(), or for longest_pause_seconds: a lost resume must not stop snapshots. The pause begins at once, or, with a
  // stream, when the device is through with what the stream was given so far. Pauses may overlap. Returns what resume()
  // takes, which does nothing for a pause that is over.
  std::uint64_t pause(std::optional<std::uint64_t> stream = std::nullopt);
  void resume(std::uint64_t pause);
  // For chunks started from now on. Throws std::invalid_argument.
  void set_chunks(std::uint64_t chunk_bytes, std::size_t chunks_in_flight);

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

  // Guarded by the lock, except what is the worker's own.
  struct Ticket {
    std::shared_ptr<Fence> fence;  // shared with the worker while it asks
    std::string label;
    std::string error;
    std::uint64_t id = 0;
    std::uint64_t total_bytes = 0;
    std::uint64_t copied = 0;
    std::size_t in_flight = 0;  // chunks
    int priority = 0;
    TicketState state = TicketState::queued;
    Clock::time_point submitted, started, finished;
    bool has_started = false;
    bool hurried = false;
    bool cancel_requested = false;
    // The worker's own once the ticket is queued.
    ChunkCursor cursor;
    std::vector<std::pair<std::string, std::uint64_t>> groups;  // name, and the batch's bytes up to the group's end
    std::optional<Direction> direction;
    std::optional<Clock::time_point> spread_until;  // its last chunk is due then
    Clock::time_point next_at{};    // when the spreading allows the next chunk
    Clock::time_point fence_at{};   // when the fence is asked for again
  };
  using TicketRef = std::shared_ptr<Ticket>;
  struct Flight {
    TicketRef ticket;
    std::size_t slot;
    std::uint64_t offset, bytes;
  };
  struct Pause {
    std::uint64_t id;
    std::shared_ptr<Fence> fence;  // shared with the worker while it asks; null once the pause has begun
    Clock::time_point end;         // once it has begun
  };
  // Highest priority first, then the oldest.
  using Pending = std::map<std::pair<int, std::uint64_t>, TicketRef>;

  void require_owner() const;
  void require_accepting() const;
  TicketRef find(std::uint64_t ticket) const;
  static bool is_finished(const Ticket& ticket);
  static void raise_failed(const Ticket& ticket);
  static std::pair<int, std::uint64_t> key(const Ticket& ticket) { return {-ticket.priority, ticket.id}; }
  CopyStats stats_of(const Ticket& ticket) const;
  void notify_worker();

  // Worker, or with the lock held.
  void finish(Ticket& ticket, TicketState state, const std::string& error);
  void settle(Ticket& ticket);
  void fail_engine(const std::string& error);
  void drop_cancelled();
  std::vector<TicketRef> heads() const;
  Clock::time_point pause_end(Clock::time_point now) const;
  Clock::time_point longest_pause() const;
  std::size_t burst() const;
  std::uint64_t staging_share() const;

  // Worker thread, without the lock.
  void run();
  bool step();
  void begin_pauses();
  bool ready(Ticket& ticket, Clock::time_point& wake);
  bool serve(const TicketRef& ticket);
  bool has_room(const Ticket& ticket);
  std::optional<ChunkRules> begin_chunk(Ticket& ticket);
  void pay(Ticket& ticket, const Chunk& chunk);
  bool finish_oldest();
  bool fail(const TicketRef& ticket, const std::string& error, bool doubt_others);
  void sleep(std::uint64_t seen, Clock::time_point wake);

  const pid_t owner_;
  const EngineLimits limits_;
  const std::unique_ptr<CopyDevice> device_;

  mutable std::mutex mutex_;
  std::mutex close_mutex_;
  std::condition_variable work_;      // the worker sleeps here: new work, a cancel, the end
  std::condition_variable finished_;  // callers sleep here
  std::unordered_map<std::uint64_t, TicketRef> tickets_;
  Pending pending_;  // tickets with chunks to start
  std::deque<std::uint64_t> finished_order_;
  std::set<std::uint64_t> registered_;
  std::string failure_;
  std::uint64_t last_ticket_ = 0;
  std::uint64_t changes_ = 0;  // counts what the worker must not sleep through
  std::size_t unfinished_ = 0;
  std::uint64_t chunk_bytes_;
  std::size_t chunks_in_flight_;
  std::deque<Pause> pauses_;  // oldest first
  std::uint64_t last_pause_ = 0;
  bool closing_ = false;

  // Worker thread only.
  std::deque<Flight> flights_;  // oldest first
  std::size_t next_slot_ = 0;
  Clock::time_point next_copy_at_{};
  std::thread worker_;
};

}  // namespace moevement
