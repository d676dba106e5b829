// The copy engine over the CPU device and over a fake that stalls and fails.
#include <atomic>
#include <cstring>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "suites.h"
#include "support.h"

using namespace moevement;

namespace {

void random_batches_arrive() {
  std::mt19937_64 random(1);
  for (const std::uint64_t chunk : {1u, 7u, 64u, 1u << 20}) {
    for (const std::size_t slots : {1u, 2u, 5u}) {
      EngineLimits limits = small_chunks(chunk);
      limits.chunks_in_flight = slots;
      Script script;
      CopyEngine over_cpu(make_cpu_device(), limits);
      CopyEngine over_fake(fake(script), limits);
      for (CopyEngine* engine : {&over_cpu, &over_fake}) {
        const Bytes from = random_bytes(1000, random);
        Bytes to(1000, 0), expected(1000, 0);
        std::vector<CopyPiece> batch;
        for (int count = 0; count < 200; ++count) {
          const std::size_t bytes = random() % 40, source = random() % 960, target = random() % 960;
          batch.push_back({address(from.data() + source), address(to.data() + target), bytes});
          std::memcpy(expected.data() + target, from.data() + source, bytes);
        }
        const auto ticket = engine->submit(batch, 0, "random");
        CHECK(engine->wait(ticket, 60));
        CHECK(engine->done(ticket));
        CHECK(to == expected);
        CHECK(engine->stats(ticket).bytes == engine->stats(ticket).total_bytes);
      }
      CHECK(script.chunks == 0 && script.most_chunks <= static_cast<int>(slots));
    }
  }
}

void bad_pieces_and_limits_are_refused() {
  CopyEngine engine(make_cpu_device(), {});
  Bytes memory(16);
  const std::uint64_t here = address(memory.data());
  CHECK_THROWS(std::invalid_argument, engine.submit({{0, here, 1}}, 0, ""));
  CHECK_THROWS(std::invalid_argument, engine.submit({{here, 0, 1}}, 0, ""));
  CHECK_THROWS(std::invalid_argument, engine.submit({{here, ~std::uint64_t{0}, 2}}, 0, ""));
  CHECK_THROWS(std::invalid_argument, engine.submit({{here, here + 4, 5}}, 0, ""));
  CHECK(engine.wait(engine.submit({{0, 0, 0}}, 0, ""), 10));
  CHECK(engine.wait(engine.submit({}, 0, ""), 10));
  CHECK_THROWS(std::invalid_argument, engine.wait(1, -1));
  CHECK_THROWS(UnknownTicket, engine.state(3));
  EngineLimits none;
  none.chunks_in_flight = 0;
  CHECK_THROWS(std::invalid_argument, CopyEngine(make_cpu_device(), none));
}

void one_failed_copy_does_not_end_the_engine() {
  Script script;
  script.fail_at_chunk = 3;
  const EngineLimits limits = small_chunks(4);
  CopyEngine engine(fake(script), limits);
  const Bytes from(40, 9);
  Bytes to(40, 0);
  const auto broken = engine.submit({piece(from, to)}, 0, "layer 3");
  try {
    engine.wait(broken, 10);
    CHECK(false);
  } catch (const EngineError& problem) {
    const std::string text = problem.what();
    CHECK(text.find("layer 3") != std::string::npos && text.find("planted error") != std::string::npos);
    CHECK(text.find("fake_device.h:") != std::string::npos);
  }
  CHECK(script.chunks == 0 && script.drains == 1);
  CHECK(engine.state(broken) == TicketState::failed);
  CHECK_THROWS(EngineError, engine.done(broken));
  CHECK(!engine.cancel(broken));
  CHECK(!engine.failure());
  CHECK(engine.wait(engine.submit({piece(from, to)}, 0, ""), 10));
  CHECK(to == from);
}

void a_sticky_error_ends_the_engine() {
  Script script;
  script.fail_at_chunk = 0;
  script.sticky = true;
  script.fence_open = false;
  CopyEngine engine(fake(script), {});
  const Bytes from(8, 1);
  Bytes to(8, 0);
  const auto first = engine.submit({piece(from, to)}, 0, "");
  const auto second = engine.submit({piece(from, to)}, 0, "");
  script.fence_open = true;
  CHECK_THROWS(EngineError, engine.wait(first, 10));
  CHECK_THROWS(EngineError, engine.wait(second, 10));
  CHECK_THROWS(EngineError, engine.submit({piece(from, to)}, 0, ""));
  CHECK(engine.failure().has_value());
  engine.close();
  CHECK(engine.state(second) == TicketState::failed);
}

void a_fence_that_never_passes_can_be_cancelled_and_closed() {
  Script script;
  script.fence_open = false;
  CopyEngine engine(fake(script), {});
  const Bytes from(8, 1);
  Bytes to(8, 0);
  const auto stuck = engine.submit({piece(from, to)}, 0, "");
  const auto behind = engine.submit({piece(from, to)}, 0, "");
  CHECK(!engine.wait(stuck, 0.01));
  CHECK(engine.cancel(stuck));
  CHECK(engine.wait(stuck, 0));
  CHECK(engine.state(behind) != TicketState::cancelled);
  engine.close();
  CHECK(engine.state(behind) == TicketState::cancelled);
  CHECK(script.started == 0 && to == Bytes(8, 0));
  CHECK_THROWS(EngineError, engine.submit({piece(from, to)}, 0, ""));
}

void cancel_returns_only_when_nothing_is_in_flight() {
  Script script;
  script.chunk_gate_open = false;
  const EngineLimits limits = small_chunks(4);
  CopyEngine engine(fake(script), limits);
  const Bytes from(64, 5);
  Bytes to(64, 0);
  const auto ticket = engine.submit({piece(from, to)}, 0, "");
  until([&] { return script.chunks == 2; });
  std::thread opener([&] {
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
    script.chunk_gate_open = true;
  });
  const bool cancelled = engine.cancel(ticket);
  const int in_flight = script.chunks;
  const Bytes seen = to;
  opener.join();
  CHECK(cancelled && in_flight == 0);
  std::this_thread::sleep_for(std::chrono::milliseconds(5));
  CHECK(seen == to && to != from);
  const auto copied = engine.stats(ticket).bytes;
  CHECK(std::memcmp(to.data(), from.data(), copied) == 0);
  CHECK(Bytes(to.begin() + static_cast<std::ptrdiff_t>(copied), to.end()) == Bytes(64 - copied, 0));
}

void queue_and_records_are_bounded() {
  Script script;
  script.fence_open = false;
  EngineLimits limits;
  limits.max_queued_tickets = 2;
  limits.max_finished_tickets = 3;
  CopyEngine engine(fake(script), limits);
  const auto first = engine.submit({}, 0, "");
  engine.submit({}, 0, "");
  CHECK_THROWS(EngineError, engine.submit({}, 0, ""));
  script.fence_open = true;
  CHECK(engine.wait(2, 10));
  for (int count = 0; count < 3; ++count) CHECK(engine.wait(engine.submit({}, 0, ""), 10));
  CHECK_THROWS(UnknownTicket, engine.state(first));
  CHECK(engine.done(3));
}

void copy_now_keeps_its_promises() {
  Script script;
  CopyEngine engine(fake(script), {});
  const Bytes from(8, 1);
  Bytes to(8, 0);
  CHECK(engine.copy_now({piece(from, to)}, 0, "", 10).bytes == 8 && to == from);
  script.fence_open = false;
  CHECK_THROWS(EngineError, engine.copy_now({piece(from, to)}, 0, "", 0.02));
  CHECK(engine.state(2) == TicketState::cancelled);
  const auto interrupt = [] { throw std::logic_error("interrupted"); };
  CHECK_THROWS(std::logic_error, engine.copy_now({piece(from, to)}, 0, "", 10, interrupt));
  CHECK(engine.state(3) == TicketState::cancelled);
}

void bandwidth_limit_holds() {
  EngineLimits limits = small_chunks(1000);
  limits.bytes_per_second_limit = 100000;
  CopyEngine engine(make_cpu_device(), limits);
  const Bytes from(11000, 3);
  Bytes to(11000, 0);
  const auto ticket = engine.submit({piece(from, to)}, 0, "");
  CHECK(engine.wait(ticket, 60));
  // The first chunk starts at once, the other ten are 10 ms apart.
  CHECK(engine.stats(ticket).copy_seconds >= 0.099 && to == from);
}

void many_threads_at_once() {
  EngineLimits limits = small_chunks(256);
  limits.max_queued_tickets = 8;
  limits.max_finished_tickets = 1000000;
  CopyEngine engine(make_cpu_device(), limits);
  std::atomic<int> wrong{0};
  std::vector<std::thread> threads;
  for (unsigned number = 0; number < 4; ++number) {
    threads.emplace_back([&, number] {
      std::mt19937_64 random(number);
      const Bytes from = random_bytes(4096, random);
      for (int count = 0; count < 200; ++count) {
        Bytes to(4096, 0);
        std::uint64_t ticket = 0;
        try {
          ticket = engine.submit({piece(from, to)}, 0, "");
        } catch (const EngineError&) {
          std::this_thread::yield();
          continue;
        }
        const bool cancelled = random() % 2 == 0 && engine.cancel(ticket);
        if (!engine.wait(ticket, 60)) ++wrong;
        if (engine.done(ticket) == cancelled || (!cancelled && to != from)) ++wrong;
      }
    });
  }
  for (auto& thread : threads) thread.join();
  CHECK(wrong == 0);
}

void close_meets_waiters_and_submitters() {
  for (int round = 0; round < 20; ++round) {
    Script script;
    script.fence_open = false;
    CopyEngine engine(fake(script), {});
    const auto ticket = engine.submit({}, 0, "");
    std::atomic<bool> woken{false};
    std::thread waiter([&] { woken = engine.wait(ticket, 60); });
    std::thread closer([&] { engine.close(); });
    engine.close();
    closer.join();
    waiter.join();
    CHECK(woken && engine.state(ticket) == TicketState::cancelled);
  }
}

}  // namespace

int test_engine() {
  return RUN(random_batches_arrive) +
         RUN(bad_pieces_and_limits_are_refused) +
         RUN(one_failed_copy_does_not_end_the_engine) +
         RUN(a_sticky_error_ends_the_engine) +
         RUN(a_fence_that_never_passes_can_be_cancelled_and_closed) +
         RUN(cancel_returns_only_when_nothing_is_in_flight) +
         RUN(queue_and_records_are_bounded) +
         RUN(copy_now_keeps_its_promises) +
         RUN(bandwidth_limit_holds) +
         RUN(many_threads_at_once) +
         RUN(close_meets_waiters_and_submitters);
}
