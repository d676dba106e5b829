// Which chunk is next: priorities, preemption, spreading, hurry, chunk sizes that change; names in errors.
#include <atomic>
#include <chrono>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "suites.h"
#include "support.h"

using namespace moevement;

namespace {

SubmitOptions spread(double seconds) {
  SubmitOptions options;
  options.spread_seconds = seconds;
  return options;
}

// "aabba": whose chunks were started, in order.
std::string order(Script& script, const std::vector<const Batch*>& batches) {
  std::string text;
  for (const std::uint64_t source : script.sources()) {
    for (std::size_t index = 0; index < batches.size(); ++index) {
      if (batches[index]->mine(source)) text += static_cast<char>('a' + index);
    }
  }
  return text;
}

void a_higher_priority_takes_over_between_chunks() {
  Script script;
  script.chunk_gate_open = false;
  CopyEngine engine(fake(script), small_chunks(4));
  Batch low(6), high(3), next(2);
  const auto bulk = low.submit(engine);
  until([&] { return script.started == 2; });
  const auto first = high.submit(engine, priority(1));
  const auto second = next.submit(engine, priority(1));
  script.permits = 5;
  until([&] { return script.finished == 5; });
  CHECK(engine.done(first) && !engine.done(second) && engine.state(bulk) == TicketState::running);
  CHECK(engine.stats(bulk).bytes == 8);
  script.chunk_gate_open = true;
  CHECK(engine.wait(bulk, 10) && engine.done(second));
  CHECK(order(script, {&low, &high, &next}) == "aabbbccaaaa");
  CHECK(script.most_chunks == 2 && low.to == low.from && high.to == high.from && next.to == next.from);
}

void a_fence_blocks_its_own_priority_only() {
  Script script;
  script.shut_stream = 9;
  CopyEngine engine(fake(script), small_chunks(4));
  Batch fenced(2), behind(1), lower(1), higher(1);
  const auto stuck = fenced.submit(engine, priority(3), 9);
  const auto after = behind.submit(engine, priority(3));
  CHECK(engine.wait(lower.submit(engine, priority(2)), 10));
  CHECK(engine.wait(higher.submit(engine, priority(4)), 10));
  CHECK(engine.state(stuck) == TicketState::queued && engine.state(after) == TicketState::queued);
  script.shut_stream = 0;
  CHECK(engine.wait(after, 10) && engine.done(stuck));
  CHECK(order(script, {&fenced, &behind, &lower, &higher}) == "cdaab");
}

void a_partly_done_ticket_is_cancelled_while_others_are_in_flight() {
  Script script;
  script.chunk_gate_open = false;
  CopyEngine engine(fake(script), small_chunks(4));
  Batch low(6), high(6);
  const auto bulk = low.submit(engine);
  until([&] { return script.started == 2; });
  const auto urgent = high.submit(engine, priority(7));
  script.permits = 2;
  until([&] { return script.started == 4; });
  // Two chunks of the low ticket are over, two of the high one are in flight and stay there; the worker waits for one.
  std::thread opener([&] {
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
    script.permits = 1;
  });
  const bool cancelled = engine.cancel(bulk);
  opener.join();
  CHECK(cancelled && engine.state(urgent) == TicketState::running);
  CHECK(engine.stats(bulk).bytes == 8 && low.to[7] == 7 && low.to[8] == 0);
  script.chunk_gate_open = true;
  CHECK(engine.wait(urgent, 10) && high.to == high.from);
  CHECK(order(script, {&low, &high}) == "aabbbbbb");
}

void spreading_takes_its_time_and_hurry_ends_it() {
  CopyEngine engine(make_cpu_device(), small_chunks(4));
  Batch slow(20), waited(1000), empty(0);
  const auto spread_out = slow.submit(engine, spread(0.2));
  CHECK(engine.wait(spread_out, 60));
  // 20 chunks, 10 ms apart; the last one is not waited behind.
  const CopyStats stats = engine.stats(spread_out);
  CHECK(stats.queue_seconds + stats.copy_seconds >= 0.18 && slow.to == slow.from);
  const auto ticket = waited.submit(engine, spread(1000));
  const auto behind = empty.submit(engine, spread(5));
  CHECK(!engine.wait(ticket, 0.02));
  CHECK(engine.stats(ticket).bytes <= 8);
  engine.hurry(behind);
  CHECK(engine.wait(behind, 10) && engine.done(ticket) && waited.to == waited.from);
  engine.hurry(ticket);
  CHECK_THROWS(UnknownTicket, (engine.hurry(99), 0));
}

void a_spread_ticket_lets_others_use_the_gaps() {
  CopyEngine engine(make_cpu_device(), small_chunks(4));
  Batch slow(100), other(100);
  const auto spread_out = slow.submit(engine, [] {
    SubmitOptions options = spread(100);
    options.priority = 2;
    return options;
  }());
  CHECK(engine.wait(other.submit(engine), 10));
  CHECK(!engine.done(spread_out) && engine.cancel(spread_out));
}

void a_spread_ticket_that_was_held_up_makes_up_for_it() {
  Script script;
  script.chunk_gate_open = false;
  CopyEngine engine(fake(script), small_chunks(4));
  Batch slow(40);
  const auto ticket = slow.submit(engine, spread(0.4));
  std::this_thread::sleep_for(std::chrono::milliseconds(200));
  script.chunk_gate_open = true;
  CHECK(engine.wait(ticket, 10) && slow.to == slow.from);
  const CopyStats stats = engine.stats(ticket);
  const double seconds = stats.queue_seconds + stats.copy_seconds;
  // At the pace of its start it would have gone on until 0.58 s.
  CHECK(seconds >= 0.36);
  if (seconds >= 0.55) std::printf("     this machine is too busy to keep a pace\n");
}

void a_hurried_ticket_has_more_chunks_in_flight() {
  Script script;
  script.chunk_gate_open = false;
  EngineLimits limits = small_chunks(4);
  limits.burst_chunks_in_flight = 5;
  CopyEngine engine(fake(script), limits);
  Batch batch(20), later(20);
  const auto ticket = batch.submit(engine);
  until([&] { return script.started == 2; });
  std::this_thread::sleep_for(std::chrono::milliseconds(5));
  CHECK(script.chunks == 2);
  engine.hurry(ticket);
  script.permits = 1;
  until([&] { return script.chunks == 5; });
  script.chunk_gate_open = true;
  CHECK(engine.wait(ticket, 10) && script.most_chunks == 5);
  script.most_chunks = 0;
  engine.set_chunks(8, 3);
  CHECK(engine.wait(later.submit(engine), 10));
  CHECK(script.most_chunks <= 3 && later.to == later.from && script.started == 30);
}

void set_chunks_is_checked() {
  CopyEngine engine(make_cpu_device(), {});
  for (const std::uint64_t bytes : {std::uint64_t{0}, (std::uint64_t{16} << 20) + 1}) {
    CHECK_THROWS(std::invalid_argument, (engine.set_chunks(bytes, 1), 0));
  }
  for (const std::size_t count : {0, 65}) CHECK_THROWS(std::invalid_argument, (engine.set_chunks(1, count), 0));
  Bytes from(4, 1), to(4, 0);
  CHECK_THROWS(std::invalid_argument, engine.submit({piece(from, to)}, 0, "", priority(8)));
  CHECK_THROWS(std::invalid_argument, engine.submit({piece(from, to)}, 0, "", priority(-1)));
  CHECK_THROWS(std::invalid_argument, engine.submit({piece(from, to)}, 0, "", spread(-1)));
}

std::string error_of(CopyEngine& engine, std::uint64_t ticket) {
  try {
    engine.wait(ticket, 10);
  } catch (const EngineError& problem) {
    return problem.what();
  }
  return "";
}

void errors_name_the_groups_of_the_chunk() {
  const Bytes from(40, 1);
  Bytes to(40, 0);
  SubmitOptions named;
  named.groups = {{"router", 1}, {"none", 0}, {"expert.0", 2}, {"expert.1", 1}};
  for (const bool late : {false, true}) {
    Script script;
    // The second chunk holds bytes 16 to 31: the ends of both pieces of expert.0, and expert.1.
    (late ? script.fail_at_finish : script.fail_at_chunk) = 1;
    CopyEngine engine(fake(script), small_chunks(16));
    std::vector<CopyPiece> batch;
    for (std::size_t offset = 0; offset < 40; offset += 10) {
      batch.push_back({address(from.data()) + offset, address(to.data()) + offset, 10});
    }
    const std::string error = error_of(engine, engine.submit(batch, 0, "slot 5", named));
    CHECK(error.find("(slot 5) failed: copying expert.0, expert.1: planted") != std::string::npos);
    CHECK(error.find("fake_device.h:") != std::string::npos);
    named.groups.back().pieces = 2;
    CHECK_THROWS(std::invalid_argument, engine.submit(batch, 0, "", named));
    named.groups.back().pieces = 0;
    CHECK_THROWS(std::invalid_argument, engine.submit(batch, 0, "", named));
    named.groups.back().pieces = 1;
  }
}

void a_failed_copy_leaves_others_in_flight_right() {
  Script script;
  script.chunk_gate_open = false;
  script.fail_at_chunk = 2;
  CopyEngine engine(fake(script), small_chunks(4));
  Batch low(6), high(3);
  const auto bulk = low.submit(engine);
  until([&] { return script.started == 2; });
  const auto broken = high.submit(engine, priority(1));
  script.chunk_gate_open = true;
  CHECK(error_of(engine, broken).find("planted error") != std::string::npos);
  CHECK(engine.wait(bulk, 10) && low.to == low.from && !engine.failure());
}

void a_lost_device_leaves_no_copy_done() {
  Script script;
  script.sticky = true;
  script.fail_at_chunk = 1;
  script.shut_stream = 9;
  CopyEngine engine(fake(script), small_chunks(4));
  Batch high(1), low(6);
  const auto in_flight = high.submit(engine, priority(1), 9);
  const auto broken = low.submit(engine, {}, 9);
  script.shut_stream = 0;
  until([&] { return engine.failure().has_value(); });
  // Nobody knows whether the bytes that were in flight arrived.
  CHECK(engine.state(in_flight) == TicketState::failed && engine.state(broken) == TicketState::failed);
}

void random_schedules_lose_nothing() {
  std::mt19937_64 random(3);
  for (int round = 0; round < 60; ++round) {
    Script script;
    script.fail_at_chunk = round % 3 == 0 ? static_cast<int>(random() % 40) : -1;
    script.fail_at_finish = round % 5 == 0 ? static_cast<int>(random() % 40) : -1;
    CopyEngine engine(fake(script), small_chunks(1 + random() % 9));
    std::vector<Batch> batches(12, Batch(0));
    std::vector<std::uint64_t> tickets;
    std::vector<bool> cancelled;
    for (Batch& batch : batches) {
      batch = Batch(random() % 30);
      SubmitOptions options = priority(static_cast<int>(random() % 4));
      options.spread_seconds = random() % 4 == 0 ? 0.002 : 0;
      tickets.push_back(batch.submit(engine, std::move(options)));
      if (random() % 4 == 0) engine.set_chunks(1 + random() % 9, 1 + random() % 4);
      if (random() % 4 == 0) engine.pause(random() % 2 == 0 ? std::nullopt : std::optional<std::uint64_t>(7));
      if (random() % 4 == 0) engine.hurry(tickets[random() % tickets.size()]);
      if (random() % 3 == 0) engine.cancel(tickets[random() % tickets.size()]);
    }
    for (std::size_t index = 0; index < tickets.size(); ++index) {
      const std::string error = error_of(engine, tickets[index]);
      const Batch& batch = batches[index];
      const auto state = engine.state(tickets[index]);
      CHECK(error.empty() == (state != TicketState::failed));
      const auto copied = static_cast<std::ptrdiff_t>(engine.stats(tickets[index]).bytes);
      const std::size_t right = static_cast<std::size_t>(std::count(batch.to.begin(), batch.to.end(), 7));
      if (state == TicketState::done) CHECK(batch.to == batch.from);
      if (state == TicketState::cancelled) {
        CHECK(right == static_cast<std::size_t>(copied));
        CHECK(std::count(batch.to.begin(), batch.to.begin() + copied, 7) == copied);
      }
    }
    CHECK(script.chunks == 0 && script.most_chunks <= 8);
  }
}

}  // namespace

int test_schedule() {
  return RUN(a_higher_priority_takes_over_between_chunks) + RUN(a_fence_blocks_its_own_priority_only) +
         RUN(a_partly_done_ticket_is_cancelled_while_others_are_in_flight) +
         RUN(spreading_takes_its_time_and_hurry_ends_it) + RUN(a_spread_ticket_lets_others_use_the_gaps) +
         RUN(a_spread_ticket_that_was_held_up_makes_up_for_it) + RUN(a_hurried_ticket_has_more_chunks_in_flight) +
         RUN(a_lost_device_leaves_no_copy_done) + RUN(set_chunks_is_checked) +
         RUN(errors_name_the_groups_of_the_chunk) + RUN(a_failed_copy_leaves_others_in_flight_right) +
         RUN(random_schedules_lose_nothing);
}
