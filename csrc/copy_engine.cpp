#include "copy_engine.h"

#include <unistd.h>

#include <algorithm>
#include <utility>

#include "errors.h"

namespace moevement {
namespace {

constexpr auto kPollEvery = std::chrono::milliseconds(50);
// More at a time are of resumes that were lost.
constexpr std::size_t kMostPauses = 16;

double seconds(std::chrono::steady_clock::duration duration) {
  return std::chrono::duration<double>(duration).count();
}

const EngineLimits& checked(const EngineLimits& limits) {
  check_limits(limits);
  return limits;
}

}  // namespace

const char* state_name(TicketState state) {
  switch (state) {
    case TicketState::queued:
      return "queued";
    case TicketState::running:
      return "running";
    case TicketState::done:
      return "done";
    case TicketState::cancelled:
      return "cancelled";
    case TicketState::failed:
      return "failed";
  }
  return "unknown";
}

CopyEngine::CopyEngine(std::unique_ptr<CopyDevice> device, const EngineLimits& limits)
    : owner_(::getpid()), limits_(checked(limits)), device_(std::move(device)),
      chunk_bytes_(limits.chunk_bytes), chunks_in_flight_(limits.chunks_in_flight),
      worker_([this] { run(); }) {}

CopyEngine::~CopyEngine() { close(); }

bool CopyEngine::in_owner_process() const noexcept { return ::getpid() == owner_; }

void CopyEngine::require_owner() const {
  if (!in_owner_process()) {
    throw EngineError(std::string("the copy engine belongs to the process that made it, not to its fork") +
                      MOEVEMENT_HERE);
  }
}

void CopyEngine::require_accepting() const {
  if (!failure_.empty()) throw EngineError("the copy engine has ended: " + failure_ + MOEVEMENT_HERE);
  if (closing_) throw EngineError(std::string("the copy engine is closed") + MOEVEMENT_HERE);
}

CopyEngine::TicketRef CopyEngine::find(std::uint64_t ticket) const {
  const auto found = tickets_.find(ticket);
  if (found != tickets_.end()) return found->second;
  throw UnknownTicket("ticket " + std::to_string(ticket) +
                      (ticket >= 1 && ticket <= last_ticket_ ? " finished long ago and its record is dropped"
                                                             : " was never given out") +
                      MOEVEMENT_HERE);
}

bool CopyEngine::is_finished(const Ticket& ticket) {
  return ticket.state != TicketState::queued && ticket.state != TicketState::running;
}

void CopyEngine::raise_failed(const Ticket& ticket) {
  if (ticket.state != TicketState::failed) return;
  const std::string label = ticket.label.empty() ? "" : " (" + ticket.label + ")";
  throw EngineError("copy " + std::to_string(ticket.id) + label + " failed: " + ticket.error);
}

// Caller holds the lock.
void CopyEngine::notify_worker() {
  ++changes_;
  work_.notify_all();
}

std::uint64_t CopyEngine::submit(std::vector<CopyPiece> batch, std::uint64_t stream, std::string label,
                                 SubmitOptions options) {
  require_owner();
  check_batch(batch, options);
  auto ticket = std::make_shared<Ticket>();
  std::size_t next_piece = 0;
  for (PieceGroup& group : options.groups) {
    for (std::uint64_t count = 0; count < group.pieces; ++count) ticket->total_bytes += batch[next_piece++].bytes;
    ticket->groups.emplace_back(std::move(group.name), ticket->total_bytes);
  }
  while (next_piece < batch.size()) ticket->total_bytes += batch[next_piece++].bytes;
  ticket->cursor = ChunkCursor(std::move(batch));
  ticket->label = std::move(label);
  ticket->priority = options.priority;
  const Lock lock(mutex_);
  require_accepting();
  if (unfinished_ >= limits_.max_queued_tickets) {
    throw EngineError("the copy queue is full: max_queued_tickets is " + std::to_string(limits_.max_queued_tickets) +
                      MOEVEMENT_HERE);
  }
  // Under the lock, so that tickets stand in the queue in the order of their fences.
  ticket->fence = device_->fence(stream);
  ticket->submitted = Clock::now();
  if (options.spread_seconds > 0) ticket->spread_until = ticket->submitted + duration_of(options.spread_seconds);
  ticket->id = last_ticket_ + 1;
  tickets_.emplace(ticket->id, ticket);
  pending_.emplace(key(*ticket), ticket);
  last_ticket_ = ticket->id;
  ++unfinished_;
  notify_worker();
  return ticket->id;
}

bool CopyEngine::done(std::uint64_t ticket) const {
  require_owner();
  const Lock lock(mutex_);
  const TicketRef found = find(ticket);
  raise_failed(*found);
  return found->state == TicketState::done;
}

TicketState CopyEngine::state(std::uint64_t ticket) const {
  require_owner();
  const Lock lock(mutex_);
  return find(ticket)->state;
}

CopyStats CopyEngine::stats(std::uint64_t ticket) const {
  require_owner();
  const Lock lock(mutex_);
  return stats_of(*find(ticket));
}

CopyStats CopyEngine::stats_of(const Ticket& ticket) const {
  const auto end = is_finished(ticket) ? ticket.finished : Clock::now();
  const auto start = ticket.has_started ? ticket.started : end;
  return {ticket.copied, ticket.total_bytes, seconds(end - start), seconds(start - ticket.submitted)};
}

bool CopyEngine::wait(std::uint64_t ticket, double timeout_seconds, const Poll& poll) {
  require_owner();
  const auto deadline = Clock::now() + duration_of(checked_timeout(timeout_seconds));
  Lock lock(mutex_);
  // Held here as well: the record may be dropped from the book between the finish and this thread's wake-up.
  const TicketRef found = find(ticket);
  while (!is_finished(*found)) {
    const auto now = Clock::now();
    if (now >= deadline) return false;
    finished_.wait_until(lock, poll ? std::min(deadline, now + kPollEvery) : deadline);
    if (poll && !is_finished(*found)) {
      lock.unlock();
      poll();
      lock.lock();
    }
  }
  raise_failed(*found);
  return true;
}

bool CopyEngine::cancel(std::uint64_t ticket) {
  require_owner();
  Lock lock(mutex_);
  const TicketRef found = find(ticket);
  if (found->state == TicketState::queued) {
    pending_.erase(key(*found));
    finish(*found, TicketState::cancelled, "");
    notify_worker();
  } else if (found->state == TicketState::running) {
    found->cancel_requested = true;
    notify_worker();
    finished_.wait(lock, [&] { return is_finished(*found); });
  }
  return found->state == TicketState::cancelled;
}

void CopyEngine::hurry(std::uint64_t ticket) {
  require_owner();
  const Lock lock(mutex_);
  const TicketRef found = find(ticket);
  if (is_finished(*found)) return;
  found->hurried = true;
  // Those before it are copied first, so that they must not dawdle either.
  const auto end = pending_.upper_bound(key(*found));
  for (auto next = pending_.lower_bound({-found->priority, 0}); next != end; ++next) next->second->hurried = true;
  notify_worker();
}

std::uint64_t CopyEngine::pause(std::optional<std::uint64_t> stream) {
  require_owner();
  std::shared_ptr<Fence> fence = stream ? device_->mark(*stream) : nullptr;
  std::shared_ptr<Fence> dropped;  // is given back to the device without the lock
  const Lock lock(mutex_);
  const auto is_over = [now = Clock::now()](const Pause& one) { return !one.fence && one.end <= now; };
  pauses_.erase(std::remove_if(pauses_.begin(), pauses_.end(), is_over), pauses_.end());
  if (pauses_.size() == kMostPauses) {
    dropped = std::move(pauses_.front().fence);
    pauses_.pop_front();
  }
  pauses_.push_back({++last_pause_, std::move(fence), longest_pause()});
  return last_pause_;
}

void CopyEngine::resume(std::uint64_t pause) {
  require_owner();
  std::shared_ptr<Fence> dropped;
  const Lock lock(mutex_);
  const auto found = std::find_if(pauses_.begin(), pauses_.end(), [&](const Pause& one) { return one.id == pause; });
  if (found == pauses_.end()) return;
  dropped = std::move(found->fence);
  pauses_.erase(found);
  notify_worker();
}

void CopyEngine::set_chunks(std::uint64_t chunk_bytes, std::size_t chunks_in_flight) {
  require_owner();
  check_chunks(chunk_bytes, chunks_in_flight, std::max(limits_.max_chunk_bytes, limits_.chunk_bytes));
  const Lock lock(mutex_);
  chunk_bytes_ = chunk_bytes;
  chunks_in_flight_ = chunks_in_flight;
  notify_worker();
}

CopyStats CopyEngine::copy_now(std::vector<CopyPiece> batch, std::uint64_t stream, std::string label,
                               double timeout_seconds, const Poll& poll) {
  checked_timeout(timeout_seconds);
  const std::string name = label.empty() ? "copy" : "copy (" + label + ")";
  const std::uint64_t ticket = submit(std::move(batch), stream, std::move(label));
  TicketRef found;
  {
    const Lock lock(mutex_);
    found = find(ticket);
  }
  bool in_time = false;
  try {
    hurry(ticket);
    in_time = wait(ticket, timeout_seconds, poll);
  } catch (...) {
    cancel(ticket);
    throw;
  }
  if (!in_time && cancel(ticket)) {
    throw EngineError(name + " takes longer than " + std::to_string(timeout_seconds) + " s and is cancelled" +
                      MOEVEMENT_HERE);
  }
  const Lock lock(mutex_);
  raise_failed(*found);
  if (found->state != TicketState::done) throw EngineError(name + " is cancelled" + MOEVEMENT_HERE);
  return stats_of(*found);
}

bool CopyEngine::register_host(std::uint64_t address, std::uint64_t nbytes) {
  require_owner();
  if (address == 0 || nbytes == 0) {
    throw std::invalid_argument(std::string("host memory to register needs an address and a size") + MOEVEMENT_HERE);
  }
  const std::lock_guard<std::mutex> registry(close_mutex_);
  {
    const Lock lock(mutex_);
    require_accepting();
  }
  if (!device_->register_host(address, nbytes)) return false;
  registered_.insert(address);
  return true;
}

bool CopyEngine::unregister_host(std::uint64_t address) {
  require_owner();
  const std::lock_guard<std::mutex> registry(close_mutex_);
  if (registered_.erase(address) == 0) return false;
  return device_->unregister_host(address);
}

void CopyEngine::close() {
  if (!in_owner_process()) return;
  const std::lock_guard<std::mutex> only_one(close_mutex_);
  {
    const Lock lock(mutex_);
    closing_ = true;
    for (const auto& [key, ticket] : pending_) ticket->cancel_requested = true;
    notify_worker();
  }
  if (worker_.joinable()) worker_.join();
  for (const std::uint64_t address : std::exchange(registered_, {})) {
    try {
      device_->unregister_host(address);
    } catch (const EngineError&) {
      // The process's own end or a failed device unpins it; closing must not fail for it.
    }
  }
}

bool CopyEngine::closed() const {
  require_owner();
  const Lock lock(mutex_);
  return closing_;
}

std::optional<std::string> CopyEngine::failure() const {
  require_owner();
  const Lock lock(mutex_);
  return failure_.empty() ? std::nullopt : std::optional<std::string>(failure_);
}

}  // namespace moevement
