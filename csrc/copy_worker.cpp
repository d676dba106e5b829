// The worker thread's half of the copy engine: it picks the next chunk and feeds the device with it.
#include <pthread.h>

#include <algorithm>
#include <exception>
#include <iterator>
#include <utility>

#include "copy_engine.h"
#include "errors.h"

namespace moevement {
namespace {

// How often a fence is asked for: the longer it has been waited for, the less often. Each question is a call of the
// driver, and what the boundary transcript copies may wait for a good part of an iteration.
constexpr auto kFencePollEvery = std::chrono::microseconds(50);
constexpr auto kFencePollAtLeastEvery = std::chrono::milliseconds(1);
constexpr int kFencePolls = 8;
// Descriptors hold 32-bit offsets.
constexpr std::uint64_t kMaxStagingShare = std::uint64_t{1} << 31;
constexpr std::size_t kMaxNamedGroups = 4;

// The names of the groups that have bytes between `begin` and `end`, as the start of an error.
template <typename Groups>
std::string copying(const Groups& groups, std::uint64_t begin, std::uint64_t end) {
  std::string text;
  std::size_t found = 0;
  std::uint64_t group_begin = 0;
  for (const auto& [name, group_end] : groups) {
    if (group_begin < end && group_end > begin && ++found <= kMaxNamedGroups) text += (found > 1 ? ", " : "") + name;
    group_begin = group_end;
  }
  if (found == 0) return "";
  if (found > kMaxNamedGroups) text += " and " + std::to_string(found - kMaxNamedGroups) + " more";
  return "copying " + text + ": ";
}

}  // namespace

// Caller holds the lock.
void CopyEngine::finish(Ticket& ticket, TicketState state, const std::string& error) {
  ticket.state = state;
  ticket.error = error;
  ticket.finished = Clock::now();
  ticket.cursor = {};
  ticket.groups = {};
  ticket.fence.reset();
  --unfinished_;
  finished_order_.push_back(ticket.id);
  while (finished_order_.size() > limits_.max_finished_tickets) {
    tickets_.erase(finished_order_.front());
    finished_order_.pop_front();
  }
  finished_.notify_all();
}

// Caller holds the lock. Ends a ticket that has nothing in flight and nothing to start.
void CopyEngine::settle(Ticket& ticket) {
  if (is_finished(ticket) || ticket.in_flight != 0 || pending_.count(key(ticket)) != 0) return;
  finish(ticket, ticket.copied == ticket.total_bytes ? TicketState::done : TicketState::cancelled, "");
}

// Caller holds the lock.
void CopyEngine::fail_engine(const std::string& error) {
  failure_ = error;
  flights_.clear();
  pending_.clear();
  std::vector<TicketRef> unfinished;
  for (const auto& [id, ticket] : tickets_) {
    if (!is_finished(*ticket)) unfinished.push_back(ticket);
  }
  for (const TicketRef& ticket : unfinished) {
    finish(*ticket, TicketState::failed, "the copy engine ended before it: " + error);
  }
}

// Caller holds the lock.
void CopyEngine::drop_cancelled() {
  for (auto next = pending_.begin(); next != pending_.end();) {
    const TicketRef ticket = next->second;
    const auto here = next++;
    if (!ticket->cancel_requested) continue;
    pending_.erase(here);
    if (ticket->state == TicketState::queued) {
      finish(*ticket, TicketState::cancelled, "");
    } else {
      settle(*ticket);
    }
  }
}

// Caller holds the lock. The oldest ticket of each priority, the highest priority first.
std::vector<CopyEngine::TicketRef> CopyEngine::heads() const {
  std::vector<TicketRef> found;
  for (const auto& [key, ticket] : pending_) {
    if (found.empty() || found.back()->priority != ticket->priority) found.push_back(ticket);
  }
  return found;
}

// Caller holds the lock. When the last of the pauses that have begun ends by itself; `now` when there is none.
CopyEngine::Clock::time_point CopyEngine::pause_end(Clock::time_point now) const {
  auto end = now;
  for (const Pause& pause : pauses_) {
    if (!pause.fence) end = std::max(end, pause.end);
  }
  return end;
}

// Caller holds the lock.
std::size_t CopyEngine::burst() const {
  return std::max(limits_.burst_chunks_in_flight, chunks_in_flight_);
}

// Caller holds the lock. One part more than chunks in flight, so that the end of the staging memory can stay unused.
std::uint64_t CopyEngine::staging_share() const {
  const std::uint64_t share = device_->staging_bytes() / (burst() + 1) / kStagingAlignment * kStagingAlignment;
  return std::min(share, kMaxStagingShare);
}

void CopyEngine::run() {
  (void)::pthread_setname_np(::pthread_self(), "moe-copy");
  try {
    device_->enter_worker();
    while (step()) {
    }
  } catch (const std::exception& problem) {
    // Of the device at the start, or of a system without memory later on.
    device_->drain();
    const Lock lock(mutex_);
    fail_engine(problem.what());
  }
}

// Starts one chunk, finishes one, or sleeps. False when the engine is over.
bool CopyEngine::step() {
  std::vector<TicketRef> candidates;
  std::uint64_t seen = 0;
  {
    const Lock lock(mutex_);
    drop_cancelled();
    if (closing_ && pending_.empty() && flights_.empty()) return false;
    candidates = heads();
    seen = changes_;
  }
  auto wake = Clock::time_point::max();
  for (const TicketRef& ticket : candidates) {
    try {
      if (!ready(*ticket, wake)) continue;
    } catch (const std::exception& problem) {
      return fail(ticket, problem.what(), false);
    }
    return serve(ticket);
  }
  if (!flights_.empty()) return finish_oldest();
  sleep(seen, wake);
  return true;
}

CopyEngine::Clock::time_point CopyEngine::longest_pause() const {
  return Clock::now() + duration_of(limits_.longest_pause_seconds);
}

// Begins the pauses whose streams have come to them.
void CopyEngine::begin_pauses() {
  std::vector<std::pair<std::uint64_t, std::shared_ptr<Fence>>> waiting;
  {
    const Lock lock(mutex_);
    for (const Pause& pause : pauses_) {
      if (pause.fence) waiting.emplace_back(pause.id, pause.fence);
    }
  }
  for (const auto& [id, fence] : waiting) {
    bool lost = false;
    try {
      // Without the lock, as for tickets.
      if (!fence->passed()) continue;
    } catch (const EngineError&) {
      // No copy fails for a hint. What ended the device, if anything did, the next copy meets.
      lost = true;
    }
    const Lock lock(mutex_);
    const auto here = std::find_if(pauses_.begin(), pauses_.end(), [id = id](const Pause& one) { return one.id == id; });
    if (here == pauses_.end()) continue;
    if (lost) {
      pauses_.erase(here);
    } else {
      *here = {id, nullptr, longest_pause()};
    }
  }
}

// Whether the ticket may start a chunk now; else `wake` is brought forward to when it is to be asked again.
bool CopyEngine::ready(Ticket& ticket, Clock::time_point& wake) {
  std::shared_ptr<Fence> fence;
  bool pausable = false;
  {
    const Lock lock(mutex_);
    if (is_finished(ticket)) return false;
    if (ticket.fence && !ticket.hurried && Clock::now() < ticket.fence_at) {
      wake = std::min(wake, ticket.fence_at);
      return false;
    }
    fence = ticket.fence;
    pausable = ticket.priority == 0 && !ticket.hurried && !pauses_.empty();
  }
  // Without the lock: a device that is busy for others must not hold up who only asks for a state.
  const bool passed = !fence || fence->passed();
  if (passed && pausable) begin_pauses();
  const Lock lock(mutex_);
  const auto now = Clock::now();
  auto at = next_copy_at_;
  if (!passed) {
    const Clock::duration share = (now - ticket.submitted) / kFencePolls;
    at = now + std::clamp<Clock::duration>(share, kFencePollEvery, kFencePollAtLeastEvery);
    if (ticket.hurried) at = now + kFencePollEvery;
    ticket.fence_at = at;
  } else {
    ticket.fence.reset();
    if (!ticket.hurried) {
      at = std::max(at, ticket.next_at);
      if (ticket.priority == 0) at = std::max(at, pause_end(now));
    }
  }
  if (passed && at <= now) return true;
  wake = std::min(wake, at);
  return false;
}

// Starts the ticket's next chunk, or finishes another one first.
bool CopyEngine::serve(const TicketRef& ticket) {
  if (!has_room(*ticket)) return finish_oldest();
  const auto rules = begin_chunk(*ticket);
  if (!rules) return true;
  Chunk chunk;
  try {
    if (!ticket->direction) ticket->direction = device_->direction(ticket->cursor.front());
    chunk = ticket->cursor.next({rules->chunk_bytes, rules->staging_bytes, *ticket->direction});
    pay(*ticket, chunk);
    device_->copy_chunk(chunk, next_slot_);
  } catch (const std::exception& problem) {
    return fail(ticket, copying(ticket->groups, chunk.offset, chunk.offset + chunk.bytes) + problem.what(), false);
  }
  const Lock lock(mutex_);
  flights_.push_back({ticket, next_slot_, chunk.offset, chunk.bytes});
  next_slot_ = (next_slot_ + 1) % kMaxChunksInFlight;
  ++ticket->in_flight;
  if (ticket->cursor.at_end()) pending_.erase(key(*ticket));
  return true;
}

bool CopyEngine::has_room(const Ticket& ticket) {
  const Lock lock(mutex_);
  // An empty ticket is done when everything before it is.
  if (ticket.total_bytes == 0) return flights_.empty();
  return flights_.size() < (ticket.hurried ? burst() : chunks_in_flight_);
}

// The rules for the ticket's next chunk (its direction is not known yet); none when it has none to start.
std::optional<ChunkRules> CopyEngine::begin_chunk(Ticket& ticket) {
  const Lock lock(mutex_);
  if (is_finished(ticket) || ticket.cancel_requested) return std::nullopt;
  if (!ticket.has_started) {
    ticket.state = TicketState::running;
    ticket.started = Clock::now();
    ticket.next_at = ticket.started;
    ticket.has_started = true;
  }
  if (ticket.total_bytes == 0) {
    pending_.erase(key(ticket));
    settle(ticket);
    return std::nullopt;
  }
  return ChunkRules{chunk_bytes_, staging_share(), Direction::other};
}

// Sets when the next chunk of the ticket, and of any ticket, may start.
void CopyEngine::pay(Ticket& ticket, const Chunk& chunk) {
  const auto now = Clock::now();
  const auto bytes = static_cast<double>(chunk.bytes);
  if (ticket.spread_until && *ticket.spread_until > now) {
    // An even share of what is left, so that a ticket that could not be served for a while goes faster from then on.
    const double left = static_cast<double>(ticket.total_bytes - chunk.offset);
    ticket.next_at = now + duration_of(std::chrono::duration<double>(*ticket.spread_until - now).count() * bytes / left);
  }
  if (limits_.bytes_per_second_limit > 0) {
    // Idle time earns no burst: the limit protects others on the link now, whatever happened before.
    next_copy_at_ = std::max(next_copy_at_, now) + duration_of(bytes / limits_.bytes_per_second_limit);
  }
}

bool CopyEngine::finish_oldest() {
  const Flight oldest = flights_.front();
  try {
    device_->finish(oldest.slot);
  } catch (const std::exception& problem) {
    const auto names = copying(oldest.ticket->groups, oldest.offset, oldest.offset + oldest.bytes);
    return fail(oldest.ticket, names + problem.what(), true);
  }
  const Lock lock(mutex_);
  flights_.pop_front();
  oldest.ticket->copied += oldest.bytes;
  --oldest.ticket->in_flight;
  settle(*oldest.ticket);
  return true;
}

// Ends the ticket, and with `doubt_others`, or when the device is lost, all that have chunks in flight. False when the
// engine is over.
bool CopyEngine::fail(const TicketRef& ticket, const std::string& error, bool doubt_others) {
  device_->drain();
  const bool usable = device_->usable();
  const Lock lock(mutex_);
  const auto end = [&](Ticket& failed) {
    if (is_finished(failed)) return;
    pending_.erase(key(failed));
    finish(failed, TicketState::failed, error);
  };
  const std::deque<Flight> flights = std::exchange(flights_, {});
  for (const Flight& flight : flights) {
    flight.ticket->copied += flight.bytes;
    --flight.ticket->in_flight;
    if (doubt_others || !usable) end(*flight.ticket);
  }
  end(*ticket);
  for (const Flight& flight : flights) settle(*flight.ticket);
  if (!usable) fail_engine(error);
  return usable;
}

void CopyEngine::sleep(std::uint64_t seen, Clock::time_point wake) {
  Lock lock(mutex_);
  const auto changed = [&] { return changes_ != seen; };
  if (wake == Clock::time_point::max()) {
    work_.wait(lock, changed);
  } else {
    work_.wait_until(lock, wake, changed);
  }
}

}  // namespace moevement
