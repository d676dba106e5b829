// When no chunk is started: pauses, and fences that aren't passed.
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

void a_fence_is_asked_for_less_and_less() {
  Script script;
  script.fence_open = false;
  CopyEngine engine(fake(script), small_chunks(4));
  Batch bulk(40);
  const auto ticket = bulk.submit(engine);
  CHECK(!engine.wait(ticket, 0.2));
  // Every 50 us would be 4,000 times.
  CHECK(script.fences_asked > 8 && script.fences_asked < 1000);
  const int before = script.fences_asked;
  engine.hurry(ticket);
  until([&] { return script.fences_asked > before + 100; });
  script.fence_open = true;
  CHECK(engine.wait(ticket, 10) && bulk.to == bulk.from);
}

}  // namespace

int test_pace() {
  return RUN(a_fence_is_asked_for_less_and_less) + RUN(a_pause_holds_back_plain_tickets) + RUN(a_pause_ends_by_itself) +
         RUN(a_pause_of_a_stream_begins_when_the_device_comes_to_it);
}
