// The kernel's code on the host, and the device's digests around it, against the library.
#include <atomic>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "device_digests.h"
#include "suites.h"
#include "support.h"

using namespace moevement;

namespace {

std::string of_library(const void* bytes, std::size_t nbytes) {
  std::string digest(kDigestBytes, '\0');
  digest_baseline(bytes, nbytes, reinterpret_cast<unsigned char*>(digest.data()));
  return digest;
}

// What the kernel's code finds of one leaf.
std::string of_kernel(std::uint64_t address, std::uint64_t nbytes) {
  alignas(16) unsigned char units[kMaxRawUnits * kUnitBytes] = {};
  const LeafRange range{address, nbytes, 0, 0};
  digest_leaves(&range, 1, 1, moevement::address(units));
  return std::string(reinterpret_cast<const char*>(units), nbytes <= kRawBytes ? nbytes : kDigestBytes);
}

// In memory of its own, so that a sanitizer sees what is read beyond it.
void check_leaf(std::size_t nbytes, std::size_t skew, std::mt19937_64& random) {
  const auto memory = std::make_unique<unsigned char[]>(skew + nbytes);
  unsigned char* bytes = memory.get() + skew;
  for (std::size_t index = 0; index < nbytes; ++index) bytes[index] = static_cast<unsigned char>(random());
  const std::string found = of_kernel(address(bytes), nbytes);
  if (nbytes <= kRawBytes) {
    CHECK(std::memcmp(found.data(), bytes, nbytes) == 0);
    return;
  }
  CHECK(found == of_library(bytes, nbytes));
  const std::size_t bit = random() % (8 * nbytes);
  bytes[bit / 8] ^= static_cast<unsigned char>(1 << bit % 8);
  CHECK(found != of_kernel(address(bytes), nbytes));
}

void leaves_of_every_length_class_equal_the_library() {
  std::mt19937_64 random(3);
  for (std::size_t nbytes = 1; nbytes < 700; ++nbytes) check_leaf(nbytes, nbytes % 5 == 0 ? random() % 16 : 0, random);
  for (const std::size_t block : {1024u, 2048u, 5120u, 64512u, 65536u}) {
    for (const int apart : {-65, -64, -63, -2, -1, 0}) {
      for (const std::size_t skew : {0u, 1u, 2u, 4u, 8u}) {
        check_leaf(block + static_cast<std::size_t>(apart), skew, random);
      }
    }
  }
  for (std::size_t skew = 0; skew < 16; ++skew) check_leaf(kDigestLeafBytes, skew, random);
  for (int count = 0; count < 200; ++count) check_leaf(1 + random() % kDigestLeafBytes, random() % 16, random);
}

constexpr DigestLimits kLimits{3000, std::uint64_t{64} << 20};

std::unique_ptr<DeviceDigests> on_the_cpu(const DigestLimits& limits = kLimits) {
  return std::make_unique<DeviceDigests>(make_cpu_digest_device(digest_room(limits)), limits, kDigestBlocks);
}

std::uint64_t size_of_some_class(std::mt19937_64& random) {
  switch (random() % 6) {
    case 0:
      return random() % 20;
    case 1:
      return random() % 600;
    case 2:
      return kDigestLeafBytes * (random() % 4);
    case 3:
      return kDigestLeafBytes * (random() % 3) + random() % 260;
    default:
      return random() % (3 * kDigestLeafBytes);
  }
}

void many_ranges_have_the_digests_of_the_pool() {
  std::mt19937_64 random(4);
  Bytes bytes = random_bytes(4 << 20, random);
  DigestPool pool(2);
  const auto digests = on_the_cpu();
  for (const std::size_t count : {0u, 1u, 2u, 7u, 400u}) {
    std::vector<DigestRange> ranges;
    std::uint64_t total = 0;
    for (std::size_t index = 0; index < count; ++index) {
      const std::uint64_t size = size_of_some_class(random);
      ranges.push_back({address(bytes.data()) + random() % (bytes.size() - size), size});
      total += size;
    }
    if (count == 2) ranges.assign(2, {0, 0});
    CHECK(total <= kLimits.bytes);
    const std::string wanted = pool.wait(pool.submit(ranges), 60).value();
    const auto ticket = digests->submit(ranges, 0, "all");
    CHECK(digests->wait(ticket, 60).value() == wanted && digests->wait(ticket, 0).value() == wanted);
    CHECK(digests->seconds(ticket) >= 0 && !digests->cancel(ticket));
    if (count < 7) continue;
    // One wrong bit anywhere is noticed, in the range where it is.
    const std::size_t broken = random() % count;
    if (ranges[broken].bytes == 0) continue;
    reinterpret_cast<unsigned char*>(ranges[broken].address)[random() % ranges[broken].bytes] ^= 64;
    const std::string found = digests->wait(digests->submit(ranges, 0, "flipped"), 60).value();
    CHECK(found.compare(16 * broken, 16, wanted, 16 * broken, 16) != 0);
  }
}

void limits_are_kept() {
  const DigestLimits limits{3, 3 * kDigestLeafBytes + 5};
  const auto digests = on_the_cpu(limits);
  const Bytes bytes(limits.bytes, 7);
  const std::uint64_t at = address(bytes.data());
  // The fullest batch: as many digests as leaves fit, and a leaf that is taken along for each range.
  CHECK(digests->wait(digests->submit({{at, kDigestLeafBytes + 240}, {at, kDigestLeafBytes + 240}, {at, 240}}, 0, ""), 9));
  CHECK(digests->wait(digests->submit({{at, limits.bytes}}, 0, ""), 9));
  CHECK_THROWS(std::invalid_argument, digests->submit({{at, limits.bytes + 1}}, 0, ""));
  CHECK_THROWS(std::invalid_argument, digests->submit({{at, limits.bytes}, {at, 1}}, 0, ""));
  CHECK_THROWS(std::invalid_argument, digests->submit({{16, ~std::uint64_t{0} - 16}, {at, 99}}, 0, ""));
  CHECK_THROWS(std::invalid_argument, digests->submit({{at, 1}, {at, 1}, {at, 1}, {at, 1}}, 0, ""));
  CHECK_THROWS(std::invalid_argument, digests->submit({{0, 1}}, 0, ""));
  CHECK(digests->wait(digests->submit({{at, 1}}, 0, ""), 9));
  CHECK_THROWS(std::invalid_argument, digest_room({0, 1}));
  CHECK_THROWS(std::invalid_argument, digest_room({1, 0}));
  CHECK_THROWS(std::invalid_argument, digest_room({std::uint64_t{1} << 32, 1}));
  CHECK_THROWS(std::invalid_argument, digest_room({1, std::uint64_t{1} << 50}));
  CHECK_THROWS(std::invalid_argument, digests->set_blocks(0));
  CHECK_THROWS(std::invalid_argument, digests->set_blocks(kMaxDigestBlocks + 1));
  CHECK_THROWS(std::invalid_argument, DeviceDigests(make_cpu_digest_device(digest_room(limits)), limits, 0));
}

// What a device does as a test tells it to.
struct Behaviour {
  std::atomic<bool> is_over{true};
  std::atomic<bool> fails{false};
  std::atomic<int> alive{0};
};

class ScriptedDevice final : public DigestDevice {
 public:
  ScriptedDevice(Behaviour& behaviour, const DigestRoom& room)
      : behaviour_(behaviour), inner_(make_cpu_digest_device(room)) {
    ++behaviour_.alive;
  }
  ~ScriptedDevice() override { --behaviour_.alive; }
  LeafRange* table() noexcept override { return inner_->table(); }
  const unsigned char* results() const noexcept override { return inner_->results(); }
  std::uint64_t device_bytes() const noexcept override { return 5; }
  void start(std::uint32_t ranges, std::uint32_t leaves, std::uint32_t blocks, std::uint64_t stream) override {
    if (behaviour_.fails) throw EngineError(std::string("planted error") + MOEVEMENT_HERE);
    inner_->start(ranges, leaves, blocks, stream);
  }
  bool over() override {
    if (behaviour_.fails) throw EngineError(std::string("planted late error") + MOEVEMENT_HERE);
    return behaviour_.is_over;
  }
  double seconds() override { return 0.5; }

 private:
  Behaviour& behaviour_;
  std::unique_ptr<DigestDevice> inner_;
};

std::unique_ptr<DeviceDigests> scripted(Behaviour& behaviour) {
  return std::make_unique<DeviceDigests>(std::make_unique<ScriptedDevice>(behaviour, digest_room(kLimits)), kLimits, 1);
}

void one_batch_at_a_time() {
  Behaviour behaviour;
  const auto digests = scripted(behaviour);
  CHECK(digests->device_bytes() == 5);
  const Bytes bytes(1000, 1);
  const std::vector<DigestRange> ranges{{address(bytes.data()), bytes.size()}};
  behaviour.is_over = false;
  CHECK_THROWS(EngineError, digests->submit(ranges, 0, "early"));
  behaviour.is_over = true;
  CHECK_THROWS(UnknownTicket, digests->wait(1, 0));
  const auto first = digests->submit(ranges, 0, "first");
  // Over, but nobody has asked for it.
  CHECK_THROWS(EngineError, digests->submit(ranges, 0, "second"));
  CHECK_THROWS(EngineError, digests->seconds(first));
  behaviour.is_over = false;
  CHECK(!digests->wait(first, 0) && !digests->wait(first, 0.01));
  int polls = 0;
  CHECK_THROWS(std::length_error, digests->wait(first, 60, [&polls] {
    if (++polls == 2) throw std::length_error("interrupted");
  }));
  CHECK(digests->cancel(first) && digests->cancel(first));
  CHECK_THROWS(EngineError, digests->wait(first, 0));
  // The device still reads.
  CHECK_THROWS(EngineError, digests->submit(ranges, 0, "second"));
  behaviour.is_over = true;
  const auto second = digests->submit(ranges, 0, "second");
  const std::string leaf = of_library(bytes.data(), bytes.size());
  CHECK(digests->wait(second, 60).value() == of_library(leaf.data(), leaf.size()));
  CHECK(digests->seconds(second) == 0.5);
  CHECK_THROWS(UnknownTicket, digests->wait(first, 0));
}

void errors_stay_with_their_ticket_and_say_whose() {
  Behaviour behaviour;
  const auto digests = scripted(behaviour);
  const Bytes bytes(1000, 1);
  const std::vector<DigestRange> ranges{{address(bytes.data()), bytes.size()}};
  const auto late = digests->submit(ranges, 0, "Step 7");
  behaviour.fails = true;
  for (int count = 0; count < 2; ++count) {
    try {
      digests->wait(late, 60);
      CHECK(false);
    } catch (const EngineError& problem) {
      CHECK(std::string(problem.what()).find("digests of Step 7: planted late error [") == 0);
    }
  }
  CHECK_THROWS(EngineError, digests->submit(ranges, 0, ""));
  behaviour.fails = false;
  CHECK(digests->wait(digests->submit(ranges, 0, ""), 60));
}

void closing_ends_waits_and_gives_memory_back() {
  Behaviour behaviour;
  const auto digests = scripted(behaviour);
  const Bytes bytes(1000, 1);
  const auto ticket = digests->submit({{address(bytes.data()), bytes.size()}}, 0, "");
  behaviour.is_over = false;
  std::atomic<bool> woken{false};
  std::thread waiter([&] {
    try {
      digests->wait(ticket, 60);
    } catch (const EngineError&) {
      woken = true;
    }
  });
  std::thread opener([&] {
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
    behaviour.is_over = true;
  });
  digests->close();
  waiter.join();
  opener.join();
  // Whoever was first: the digests are done or cancelled, and the wait is over.
  CHECK(digests->closed() && behaviour.alive == 0);
  digests->close();
  CHECK_THROWS(EngineError, digests->submit({}, 0, ""));
}

}  // namespace

int test_leaf_digest() {
  return RUN(leaves_of_every_length_class_equal_the_library) + RUN(many_ranges_have_the_digests_of_the_pool) +
         RUN(limits_are_kept) + RUN(one_batch_at_a_time) + RUN(errors_stay_with_their_ticket_and_say_whose) +
         RUN(closing_ends_waits_and_gives_memory_back);
}
