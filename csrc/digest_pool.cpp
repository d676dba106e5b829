#include "digest_pool.h"

#include <pthread.h>
#include <unistd.h>

#include <algorithm>
#include <stdexcept>
#include <system_error>

#include "copy_limits.h"
#include "errors.h"

#define XXH_INLINE_ALL
#include "third_party/xxhash/xxhash.h"

namespace moevement {
namespace {

constexpr std::size_t kMaxThreads = 64;
constexpr std::size_t kMaxUnfinished = 8;
constexpr std::size_t kMaxFinished = 64;  // finished tickets whose digests are kept
// Small parts are taken together, but not so many that a cancel waits long for them.
constexpr std::size_t kMaxPartsAtOnce = 256;
constexpr std::uint64_t kBytesAtOnce = std::uint64_t{4} << 20;
constexpr auto kPollEvery = std::chrono::milliseconds(50);

std::size_t checked_threads(std::size_t threads) {
  if (threads < 1 || threads > kMaxThreads) {
    throw std::invalid_argument("threads must be 1 to 64, got " + std::to_string(threads) + MOEVEMENT_HERE);
  }
  return threads;
}

}  // namespace

void check_range(const DigestRange& range, std::size_t index) {
  if (range.bytes == 0) return;
  if (range.address == 0 || range.address + range.bytes < range.address) {
    throw std::invalid_argument("range " + std::to_string(index) + " of " + std::to_string(range.bytes) + " bytes " +
                                (range.address == 0 ? "has a null address" : "wraps around the address space") +
                                MOEVEMENT_HERE);
  }
}

void digest_baseline(const void* bytes, size_t nbytes, unsigned char digest[16]) {
  XXH128_canonicalFromHash(reinterpret_cast<XXH128_canonical_t*>(digest), XXH3_128bits(bytes, nbytes));
}

DigestFunction best_digest() noexcept { return avx2_usable() ? digest_avx2 : digest_baseline; }

DigestPool::DigestPool(std::size_t threads)
    : owner_(::getpid()), count_(checked_threads(threads)), function_(best_digest()) {
  try {
    for (std::size_t number = 0; number < count_; ++number) threads_.emplace_back([this, number] { work(number); });
  } catch (const std::system_error& problem) {
    close();
    throw EngineError(std::string("cannot start a digest thread: ") + problem.what() + MOEVEMENT_HERE);
  }
}

DigestPool::~DigestPool() { close(); }

bool DigestPool::in_owner_process() const noexcept { return ::getpid() == owner_; }

void DigestPool::require_owner() const {
  if (!in_owner_process()) {
    throw EngineError(std::string("the digest pool belongs to the process that made it, not to its fork") +
                      MOEVEMENT_HERE);
  }
}

DigestPool::TicketRef DigestPool::find(std::uint64_t ticket) const {
  const auto found = tickets_.find(ticket);
  if (found != tickets_.end()) return found->second;
  throw UnknownTicket("digest ticket " + std::to_string(ticket) +
                      (ticket >= 1 && ticket <= last_ticket_ ? " finished long ago and its record is dropped"
                                                             : " was never given out") +
                      MOEVEMENT_HERE);
}

std::uint64_t DigestPool::submit(const std::vector<DigestRange>& ranges) { return enqueue(ranges, false); }

std::uint64_t DigestPool::enqueue(const std::vector<DigestRange>& ranges, bool urgent) {
  require_owner();
  auto ticket = std::make_shared<Ticket>();
  for (std::size_t index = 0; index < ranges.size(); ++index) {
    const DigestRange& range = ranges[index];
    check_range(range, index);
    for (std::uint64_t offset = 0; offset < range.bytes; offset += kDigestLeafBytes) {
      ticket->parts.push_back({range.address + offset, std::min(kDigestLeafBytes, range.bytes - offset)});
    }
    ticket->ends.push_back(ticket->parts.size());
  }
  ticket->left = ticket->parts.size();
  ticket->urgent = urgent;
  ticket->parts_digests.resize(ticket->parts.size() * kDigestBytes);
  const Lock lock(mutex_);
  if (closing_) throw EngineError(std::string("the digest pool is closed") + MOEVEMENT_HERE);
  if (!urgent && unfinished_ >= kMaxUnfinished) {
    throw EngineError("the digest queue is full: " + std::to_string(kMaxUnfinished) + " tickets are unfinished" +
                      MOEVEMENT_HERE);
  }
  ticket->id = ++last_ticket_;
  tickets_.emplace(ticket->id, ticket);
  unfinished_ += urgent ? 0 : 1;
  if (ticket->left == 0) {
    ticket->digest = combine(*ticket);
    finish(*ticket, State::done);
  } else {
    queue_.insert(urgent ? queue_.begin() : queue_.end(), ticket);
    work_.notify_all();
  }
  return ticket->id;
}

std::optional<std::string> DigestPool::wait(std::uint64_t ticket, double timeout_seconds, const Poll& poll) {
  require_owner();
  const auto deadline = Clock::now() + duration_of(checked_timeout(timeout_seconds));
  Lock lock(mutex_);
  const TicketRef found = find(ticket);
  while (found->state == State::unfinished) {
    const auto now = Clock::now();
    if (now >= deadline) return std::nullopt;
    finished_.wait_until(lock, poll ? std::min(deadline, now + kPollEvery) : deadline);
    if (poll && found->state == State::unfinished) {
      lock.unlock();
      poll();
      lock.lock();
    }
  }
  if (found->state == State::cancelled) {
    throw EngineError("digest " + std::to_string(ticket) + " is cancelled" + MOEVEMENT_HERE);
  }
  return found->digest;
}

bool DigestPool::cancel(std::uint64_t ticket) {
  require_owner();
  Lock lock(mutex_);
  const TicketRef found = find(ticket);
  if (found->state == State::unfinished) {
    found->cancel_requested = true;
    queue_.erase(std::remove(queue_.begin(), queue_.end(), found), queue_.end());
    if (found->readers == 0) finish(*found, State::cancelled);
    finished_.wait(lock, [&] { return found->state != State::unfinished; });
  }
  return found->state == State::cancelled;
}

std::string DigestPool::digest(std::uint64_t address, std::uint64_t bytes, const Poll& poll) {
  const std::uint64_t ticket = enqueue({{address, bytes}}, true);
  try {
    while (true) {
      if (const auto found = wait(ticket, 3600, poll)) return *found;
    }
  } catch (...) {
    cancel(ticket);
    throw;
  }
}

// Caller holds the lock.
void DigestPool::finish(Ticket& ticket, State state) {
  ticket.state = state;
  ticket.parts = {};
  ticket.parts_digests = {};
  unfinished_ -= ticket.urgent ? 0 : 1;
  finished_order_.push_back(ticket.id);
  while (finished_order_.size() > kMaxFinished) {
    tickets_.erase(finished_order_.front());
    finished_order_.pop_front();
  }
  finished_.notify_all();
}

void DigestPool::work(std::size_t number) {
  (void)::pthread_setname_np(::pthread_self(), ("moe-digest-" + std::to_string(number)).c_str());
  Lock lock(mutex_);
  while (true) {
    work_.wait(lock, [this] { return closing_ || !queue_.empty(); });
    if (closing_) return;
    const TicketRef ticket = queue_.front();
    const std::size_t first = ticket->next;
    std::uint64_t bytes = 0;
    while (ticket->next < ticket->parts.size() && bytes < kBytesAtOnce && ticket->next - first < kMaxPartsAtOnce) {
      bytes += ticket->parts[ticket->next++].bytes;
    }
    const std::size_t last = ticket->next;
    if (last == ticket->parts.size()) queue_.pop_front();
    ++ticket->readers;
    lock.unlock();
    digest_parts(*ticket, first, last);
    lock.lock();
    ticket->left -= last - first;
    if (ticket->left == 0) {
      lock.unlock();
      std::string digest = combine(*ticket);
      lock.lock();
      ticket->digest = std::move(digest);
    }
    --ticket->readers;
    if (ticket->left == 0) {
      finish(*ticket, State::done);
    } else if (ticket->cancel_requested && ticket->readers == 0) {
      finish(*ticket, State::cancelled);
    }
  }
}

void DigestPool::digest_parts(Ticket& ticket, std::size_t first, std::size_t last) const {
  auto* digests = reinterpret_cast<unsigned char*>(ticket.parts_digests.data());
  for (std::size_t index = first; index < last; ++index) {
    const Part& part = ticket.parts[index];
    function_(reinterpret_cast<const void*>(part.address), part.bytes, digests + index * kDigestBytes);
  }
}

// All parts are digested and nobody else uses the ticket's parts.
std::string DigestPool::combine(const Ticket& ticket) const {
  std::string digest(ticket.ends.size() * kDigestBytes, '\0');
  std::size_t begin = 0;
  for (std::size_t range = 0; range < ticket.ends.size(); ++range) {
    function_(ticket.parts_digests.data() + begin * kDigestBytes, (ticket.ends[range] - begin) * kDigestBytes,
              reinterpret_cast<unsigned char*>(digest.data()) + range * kDigestBytes);
    begin = ticket.ends[range];
  }
  return digest;
}

void DigestPool::close() {
  if (!in_owner_process()) return;
  const std::lock_guard<std::mutex> only_one(close_mutex_);
  {
    const Lock lock(mutex_);
    closing_ = true;
    for (const TicketRef& ticket : queue_) {
      ticket->cancel_requested = true;
      if (ticket->readers == 0) finish(*ticket, State::cancelled);
    }
    queue_.clear();
    work_.notify_all();
  }
  for (std::thread& thread : threads_) {
    if (thread.joinable()) thread.join();
  }
}

bool DigestPool::closed() const {
  require_owner();
  const Lock lock(mutex_);
  return closing_;
}

}  // namespace moevement
