// The worker thread's half of the copy engine: it takes ticket after ticket and feeds the device with chunks.
#include <algorithm>
#include <exception>
#include <numeric>
#include <utility>

#include "copy_engine.h"
#include "errors.h"

namespace moevement {
namespace {

// Small pieces share one chunk, but not so many that a cancel waits long for it.
constexpr std::size_t kMaxPiecesPerChunk = 64;
// Latency between the end of the work before a fence and the first chunk; a poll costs about a microsecond.
constexpr auto kFencePollEvery = std::chrono::microseconds(50);

}  // namespace

// Caller holds the lock.
void CopyEngine::finish(Ticket& ticket, TicketState state, const std::string& error) {
  ticket.state = state;
  ticket.error = error;
  ticket.finished = Clock::now();
  ticket.pieces = {};
  ticket.fence.reset();
  finished_order_.push_back(ticket.id);
  while (finished_order_.size() > limits_.max_finished_tickets) {
    tickets_.erase(finished_order_.front());
    finished_order_.pop_front();
  }
  finished_.notify_all();
}

// Caller holds the lock.
void CopyEngine::fail_engine(const std::string& error) {
  failure_ = error;
  for (const TicketRef& ticket : std::exchange(queue_, {})) {
    finish(*ticket, TicketState::failed, "the copy engine ended before it: " + error);
  }
}

void CopyEngine::run() {
  try {
    device_->enter_worker();
  } catch (const std::exception& problem) {
    const Lock lock(mutex_);
    fail_engine(problem.what());
    return;
  }
  Lock lock(mutex_);
  while (true) {
    work_.wait(lock, [this] { return closing_ || !queue_.empty(); });
    if (closing_) return;
    running_ = std::move(queue_.front());
    queue_.pop_front();
    Ticket& ticket = *running_;
    ticket.state = TicketState::running;
    lock.unlock();

    TicketState outcome = TicketState::failed;
    std::string error;
    bool usable = true;
    try {
      outcome = await_fence(ticket) && copy_chunks(ticket) ? TicketState::done : TicketState::cancelled;
    } catch (const std::exception& problem) {
      error = problem.what();
      device_->drain();
      usable = device_->usable();
    }

    lock.lock();
    const TicketRef finished = std::exchange(running_, nullptr);
    finish(*finished, outcome, error);
    if (!usable) {
      fail_engine(error);
      return;
    }
  }
}

// False when the ticket is cancelled first.
bool CopyEngine::await_fence(Ticket& ticket) {
  while (ticket.fence && !ticket.fence->passed()) {
    Lock lock(mutex_);
    if (work_.wait_for(lock, kFencePollEvery, [&] { return ticket.cancel_requested.load(); })) return false;
  }
  const Lock lock(mutex_);
  ticket.started = Clock::now();
  ticket.has_started = true;
  return true;
}

// Waits until `bytes` more keep within the bandwidth limit. False when the ticket is cancelled first.
bool CopyEngine::pace(Ticket& ticket, std::uint64_t bytes) {
  if (ticket.cancel_requested.load()) return false;
  if (limits_.bytes_per_second_limit == 0) return true;
  // Idle time earns no burst: the limit protects others on the link now, whatever happened before.
  const auto start = std::max(next_copy_at_, Clock::now());
  next_copy_at_ = start + std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(
                              static_cast<double>(bytes) / limits_.bytes_per_second_limit));
  Lock lock(mutex_);
  return !work_.wait_until(lock, start, [&] { return ticket.cancel_requested.load(); });
}

// False when the ticket is cancelled first; nothing is in flight after it returns.
bool CopyEngine::copy_chunks(Ticket& ticket) {
  std::vector<std::uint64_t> slots(limits_.chunks_in_flight, 0);  // bytes in flight in each slot
  std::size_t slot = 0;
  std::size_t pieces = 0;
  std::uint64_t filled = 0;
  const auto end_chunk = [&] {
    device_->mark(slot);
    slots[slot] = filled;
    slot = (slot + 1) % slots.size();
    pieces = 0;
    filled = 0;
  };
  for (const CopyPiece& piece : ticket.pieces) {
    for (std::uint64_t offset = 0; offset < piece.bytes;) {
      const std::uint64_t bytes = std::min(limits_.chunk_bytes - filled, piece.bytes - offset);
      if (!pace(ticket, bytes)) {
        device_->drain();
        ticket.copied += filled + std::accumulate(slots.begin(), slots.end(), std::uint64_t{0});
        return false;
      }
      if (slots[slot] != 0) {
        device_->finish(slot);
        ticket.copied += std::exchange(slots[slot], 0);
      }
      device_->copy(piece.source + offset, piece.destination + offset, bytes);
      offset += bytes;
      filled += bytes;
      ++pieces;
      if (filled == limits_.chunk_bytes || pieces == kMaxPiecesPerChunk) end_chunk();
    }
  }
  if (filled != 0) end_chunk();
  for (std::size_t step = 0; step < slots.size(); ++step) {
    const std::size_t oldest = (slot + step) % slots.size();
    if (slots[oldest] == 0) continue;
    device_->finish(oldest);
    ticket.copied += slots[oldest];
  }
  return true;
}

}  // namespace moevement
