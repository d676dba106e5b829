#include "copy_engine.h"

#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <utility>

#include "errors.h"

namespace moevement {
namespace {

constexpr std::uint64_t kMaxChunkBytes = std::uint64_t{1} << 30;
constexpr std::size_t kMaxChunksInFlight = 64;
constexpr double kMaxTimeoutSeconds = 1e8;
constexpr auto kPollEvery = std::chrono::milliseconds(50);

double seconds(std::chrono::steady_clock::duration duration) {
  return std::chrono::duration<double>(duration).count();
}

std::chrono::steady_clock::duration duration_of(double seconds) {
  return std::chrono::duration_cast<std::chrono::steady_clock::duration>(std::chrono::duration<double>(seconds));
}

void check_piece(const CopyPiece& piece, std::size_t index) {
  if (piece.bytes == 0) return;
  const char* wrong = nullptr;
  if (piece.source == 0 || piece.destination == 0) {
    wrong = "has a null address";
  } else if (piece.source + piece.bytes < piece.source || piece.destination + piece.bytes < piece.destination) {
    wrong = "wraps around the address space";
  } else if (piece.source < piece.destination + piece.bytes && piece.destination < piece.source + piece.bytes) {
    wrong = "overlaps itself: its source and destination share bytes";
  }
  if (wrong != nullptr) {
    throw std::invalid_argument("piece " + std::to_string(index) + " of " + std::to_string(piece.bytes) + " bytes " +
                                wrong + MOEVEMENT_HERE);
  }
}

double checked_timeout(double timeout_seconds) {
  if (!(timeout_seconds >= 0 && timeout_seconds <= kMaxTimeoutSeconds)) {
    throw std::invalid_argument("timeout_seconds must be 0 to 1e8, got " + std::to_string(timeout_seconds) +
                                MOEVEMENT_HERE);
  }
  return timeout_seconds;
}

const EngineLimits& checked(const EngineLimits& limits) {
  check_limits(limits);
  return limits;
}

}  // namespace

void check_limits(const EngineLimits& limits) {
  const auto require = [](bool good, const char* what) {
    if (!good) throw std::invalid_argument(std::string(what) + MOEVEMENT_HERE);
  };
  require(limits.chunk_bytes >= 1 && limits.chunk_bytes <= kMaxChunkBytes, "chunk_bytes must be 1 to 2^30");
  require(limits.chunks_in_flight >= 1 && limits.chunks_in_flight <= kMaxChunksInFlight,
          "chunks_in_flight must be 1 to 64");
  require(limits.max_queued_tickets >= 1, "max_queued_tickets must be at least 1");
  require(limits.max_finished_tickets >= 1, "max_finished_tickets must be at least 1");
  const double cap = limits.bytes_per_second_limit;
  require(cap == 0 || (std::isfinite(cap) && cap >= 1), "bytes_per_second_limit must be 0 (none) or at least 1");
}

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
    : owner_(::getpid()), limits_(checked(limits)), device_(std::move(device)), worker_([this] { run(); }) {}

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

std::uint64_t CopyEngine::submit(std::vector<CopyPiece> batch, std::uint64_t stream, std::string label) {
  require_owner();
  auto ticket = std::make_shared<Ticket>();
  for (std::size_t index = 0; index < batch.size(); ++index) {
    check_piece(batch[index], index);
    ticket->total_bytes += batch[index].bytes;
  }
  ticket->pieces = std::move(batch);
  ticket->label = std::move(label);
  const Lock lock(mutex_);
  require_accepting();
  const std::size_t unfinished = queue_.size() + (running_ ? 1 : 0);
  if (unfinished >= limits_.max_queued_tickets) {
    throw EngineError("the copy queue is full: max_queued_tickets is " + std::to_string(limits_.max_queued_tickets) +
                      MOEVEMENT_HERE);
  }
  // Under the lock, so that tickets stand in the queue in the order of their fences.
  ticket->fence = device_->fence(stream);
  ticket->submitted = Clock::now();
  ticket->id = last_ticket_ + 1;
  tickets_.emplace(ticket->id, ticket);
  queue_.push_back(ticket);
  last_ticket_ = ticket->id;
  work_.notify_all();
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
  return {ticket.copied.load(), ticket.total_bytes, seconds(end - start), seconds(start - ticket.submitted)};
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
    queue_.erase(std::find(queue_.begin(), queue_.end(), found));
    finish(*found, TicketState::cancelled, "");
  } else if (found->state == TicketState::running) {
    found->cancel_requested = true;
    work_.notify_all();
    finished_.wait(lock, [&] { return is_finished(*found); });
  }
  return found->state == TicketState::cancelled;
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
    if (running_) running_->cancel_requested = true;
    for (const TicketRef& ticket : std::exchange(queue_, {})) finish(*ticket, TicketState::cancelled, "");
    work_.notify_all();
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
