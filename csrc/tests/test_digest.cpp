// The digest pool against its definition, and its tickets.
#include <atomic>
#include <cstring>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "digest_pool.h"
#include "suites.h"
#include "support.h"

using namespace moevement;

namespace {

std::string one(const void* bytes, std::size_t nbytes) {
  std::string digest(kDigestBytes, '\0');
  digest_baseline(bytes, nbytes, reinterpret_cast<unsigned char*>(digest.data()));
  return digest;
}

std::string expected(const DigestRange& range) {
  std::string chunks;
  const auto* bytes = reinterpret_cast<const unsigned char*>(range.address);
  for (std::uint64_t offset = 0; offset < range.bytes; offset += kDigestLeafBytes) {
    chunks += one(bytes + offset, std::min(kDigestLeafBytes, range.bytes - offset));
  }
  return one(chunks.data(), chunks.size());
}

void the_digest_is_that_of_the_library() {
  // The known XXH3-128 of nothing.
  const std::string none("\x99\xaa\x06\xd3\x01\x47\x98\xd8\x60\x01\xc3\x24\x46\x8d\x49\x7f", kDigestBytes);
  CHECK(one(nullptr, 0) == none);
  std::mt19937_64 random(1);
  const Bytes bytes = random_bytes(5000, random);
  for (std::size_t size = 0; avx2_usable() && size < bytes.size(); size += 1 + size / 7) {
    std::string digest(kDigestBytes, '\0');
    digest_avx2(bytes.data() + size % 31, size - size % 31, reinterpret_cast<unsigned char*>(digest.data()));
    CHECK(digest == one(bytes.data() + size % 31, size - size % 31));
  }
}

void ranges_of_all_sizes_are_digested_by_any_number_of_threads() {
  std::mt19937_64 random(2);
  const Bytes bytes = random_bytes((9 << 20) + 77, random);
  std::vector<DigestRange> ranges{{0, 0}, {address(bytes.data()) + 5, bytes.size() - 5}};
  for (int count = 0; count < 600; ++count) {
    const std::uint64_t size = random() % 300;
    ranges.push_back({address(bytes.data()) + random() % (bytes.size() - size), size});
  }
  for (const std::uint64_t size : {kDigestLeafBytes - 1, kDigestLeafBytes, kDigestLeafBytes + 1}) {
    ranges.push_back({address(bytes.data()), size});
  }
  std::string all;
  for (const DigestRange& range : ranges) all += expected(range);
  for (const std::size_t threads : {1u, 2u, 5u}) {
    DigestPool pool(threads);
    CHECK(pool.threads() == threads);
    const auto ticket = pool.submit(ranges);
    CHECK(pool.digest(ranges[1].address, ranges[1].bytes) == expected(ranges[1]));
    CHECK(pool.wait(ticket, 60).value() == all);
    CHECK(pool.wait(ticket, 0).value() == all && !pool.cancel(ticket));
    CHECK(pool.wait(pool.submit({}), 0).value().empty());
  }
}

void bad_ranges_and_tickets_are_refused() {
  DigestPool pool(1);
  CHECK_THROWS(std::invalid_argument, pool.submit({{0, 1}}));
  CHECK_THROWS(std::invalid_argument, pool.digest(~std::uint64_t{0}, 2));
  CHECK_THROWS(UnknownTicket, pool.wait(1, 0));
  CHECK_THROWS(std::invalid_argument, DigestPool(0));
  CHECK_THROWS(std::invalid_argument, DigestPool(65));
}

void tickets_are_bounded_cancelled_and_closed() {
  const Bytes bytes(64 << 20, 1);
  DigestPool pool(2);
  std::vector<std::uint64_t> tickets;
  // Large enough that the queue is full before the first is done.
  for (int count = 0; count < 8; ++count) {
    tickets.push_back(pool.submit(std::vector<DigestRange>(8, {address(bytes.data()), bytes.size()})));
  }
  CHECK_THROWS(EngineError, pool.submit({}));
  CHECK(!pool.wait(tickets.back(), 0));
  CHECK(pool.cancel(tickets.back()) && pool.cancel(tickets.front()) && pool.cancel(tickets.front()));
  CHECK_THROWS(EngineError, pool.wait(tickets.front(), 0));
  CHECK(pool.wait(pool.submit({}), 0));
  std::atomic<bool> woken{false};
  std::thread waiter([&] {
    try {
      pool.wait(tickets[5], 60);
    } catch (const EngineError&) {
      woken = true;
    }
  });
  std::this_thread::sleep_for(std::chrono::milliseconds(2));
  pool.close();
  waiter.join();
  pool.close();
  CHECK(woken && pool.closed());
  CHECK_THROWS(EngineError, pool.submit({}));
}

void many_threads_submit_wait_and_cancel() {
  DigestPool pool(3);
  std::atomic<int> wrong{0};
  std::vector<std::thread> threads;
  for (unsigned number = 0; number < 4; ++number) {
    threads.emplace_back([&, number] {
      std::mt19937_64 random(number);
      for (int count = 0; count < 150; ++count) {
        const Bytes bytes = random_bytes(random() % 5000, random);
        const DigestRange range{address(bytes.data()), bytes.size()};
        if (random() % 3 == 0 && pool.digest(range.address, range.bytes) != expected(range)) ++wrong;
        try {
          const auto ticket = pool.submit({range, range});
          if (random() % 3 == 0 && pool.cancel(ticket)) continue;
          if (pool.wait(ticket, 60) != expected(range) + expected(range)) ++wrong;
        } catch (const EngineError&) {
          std::this_thread::yield();
        } catch (const UnknownTicket&) {
          // The others finished so many meanwhile that the record is dropped.
          std::this_thread::yield();
        }
      }
    });
  }
  for (auto& thread : threads) thread.join();
  CHECK(wrong == 0);
}

}  // namespace

int test_digest() {
  return RUN(the_digest_is_that_of_the_library) + RUN(ranges_of_all_sizes_are_digested_by_any_number_of_threads) +
         RUN(bad_ranges_and_tickets_are_refused) + RUN(tickets_are_bounded_cancelled_and_closed) +
         RUN(many_threads_submit_wait_and_cancel);
}
