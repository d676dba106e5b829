// When no chunk is started, and how large one is: pauses, and chunks that grow while the link runs dry.
#include <algorithm>
#include <cstdint>
#include <optional>
#include <vector>

#include "suites.h"
#include "support.h"

using namespace moevement;

namespace {

EngineLimits long_pauses() {
  EngineLimits limits = small_chunks(4);
  limits.longest_pause_seconds = 60;
  return limits;
}

void a_pause_holds_back_plain_tickets() {
  Script script;
  CopyEngine engine(fake(script), long_pauses());
  Batch plain(1), urgent(1), waited(1);
  const auto first = engine.pause(), second = engine.pause();
  const auto held = plain.submit(engine);
  CHECK(engine.wait(urgent.submit(engine, priority(1)), 10));
  engine.resume(first);
  engine.resume(first);
  engine.resume(99);
  CHECK(!engine.wait(held, 0.05));
  engine.resume(second);
  CHECK(engine.wait(held, 10));
  engine.pause();
  const auto hurried = waited.submit(engine);
  CHECK(!engine.wait(hurried, 0.02));
  engine.hurry(hurried);
  CHECK(engine.wait(hurried, 10));
}

void a_pause_ends_by_itself() {
  Script script;
  CopyEngine engine(fake(script), small_chunks(4));
  Batch plain(1);
  for (int count = 0; count < 40; ++count) engine.pause(count % 2 == 0 ? std::nullopt : std::optional<std::uint64_t>(7));
  CHECK(engine.wait(plain.submit(engine), 10));
}

void a_pause_of_a_stream_begins_when_the_device_comes_to_it() {
  Script script;
  script.shut_stream = 9;
  script.chunk_gate_open = false;
  CopyEngine engine(fake(script), long_pauses());
  Batch bulk(40), urgent(1);
  const auto pause = engine.pause(9);
  const auto ticket = bulk.submit(engine);
  script.permits = 3;
  until([&] { return script.started == 5; });
  // The device comes to the pause: the two in flight go on, and no further one is started.
  script.shut_stream = 0;
  script.permits = 2;
  until([&] { return script.finished == 5; });
  script.permits = 1;
  CHECK(engine.wait(urgent.submit(engine, priority(1)), 10) && script.started == 6);
  // One stream's pause doesn't wait for another's, and one that can't be asked for holds nothing.
  script.shut_stream = 9;
  script.broken_stream = 7;
  script.chunk_gate_open = true;
  for (const std::uint64_t stream : {9, 7}) engine.pause(stream);
  const auto begun = engine.pause(8);
  engine.resume(pause);
  CHECK(!engine.wait(ticket, 0.05) && script.started == 6);
  engine.resume(begun);
  CHECK(engine.wait(ticket, 10) && bulk.to == bulk.from);
}

void chunks_grow_while_the_link_runs_dry() {
  Script script;
  script.dry = true;
  CopyEngine engine(fake(script), small_chunks(4));
  Batch bulk(40);
  CHECK(engine.wait(bulk.submit(engine), 10) && bulk.to == bulk.from);
  CHECK((script.sizes() == std::vector<std::uint64_t>{4, 8, 16, 32, 32, 32, 32, 4}));
  CHECK(engine.wait(bulk.submit(engine), 10));
  CHECK(script.sizes()[8] == 4);
  engine.set_chunks(4, 2, 1);
  script.started = 0;
  CHECK(engine.wait(bulk.submit(engine), 10) && script.started == 40);
  for (const std::size_t times : {0, 65}) CHECK_THROWS(std::invalid_argument, (engine.set_chunks(4, 2, times), 0));
}

void grown_chunks_become_small_again() {
  Script script;
  script.dry = true;
  script.chunk_gate_open = false;
  CopyEngine engine(fake(script), long_pauses());
  Batch bulk(400), other(400);
  const auto ticket = bulk.submit(engine);
  script.permits = 2;
  until([&] { return script.started == 4; });
  // The worker waits for the first of two chunks.
  script.dry = false;
  script.chunk_gate_open = true;
  CHECK(engine.wait(ticket, 10) && bulk.to == bulk.from);
  std::vector<std::uint64_t> expected{4, 8, 16, 32};
  expected.insert(expected.end(), 7, 32);
  expected.insert(expected.end(), 8, 16);
  expected.insert(expected.end(), 8, 8);
  auto sizes = script.sizes();
  CHECK(sizes.size() > 40 && std::equal(expected.begin(), expected.end(), sizes.begin()) && sizes[30] == 4);
  // By a pause at once.
  script.dry = true;
  script.chunk_gate_open = false;
  script.started = script.finished = 0;
  const auto next = other.submit(engine);
  script.permits = 2;
  until([&] { return script.started == 4; });
  const auto pause = engine.pause();
  script.permits = 2;
  until([&] { return script.finished == 4; });
  CHECK(!engine.wait(next, 0.02) && script.started == 4);
  script.chunk_gate_open = true;
  engine.resume(pause);
  CHECK(engine.wait(next, 10) && other.to == other.from);
  const auto first = static_cast<std::ptrdiff_t>(sizes.size());
  sizes = script.sizes();
  CHECK((std::vector<std::uint64_t>(sizes.begin() + first, sizes.begin() + first + 5) ==
         std::vector<std::uint64_t>{4, 8, 16, 32, 4}));
}

}  // namespace

int test_pace() {
  return RUN(a_pause_holds_back_plain_tickets) + RUN(a_pause_ends_by_itself) +
         RUN(a_pause_of_a_stream_begins_when_the_device_comes_to_it) + RUN(chunks_grow_while_the_link_runs_dry) +
         RUN(grown_chunks_become_small_again);
}
