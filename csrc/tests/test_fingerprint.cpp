// Fingerprints: a known value, and the same one however the work is shared out, at every alignment and length.
#include "fingerprint.h"

#include <cstring>
#include <random>
#include <vector>

#include "check.h"
#include "suites.h"

using namespace moevement;

namespace {

std::uint64_t of(const unsigned char* bytes, std::size_t count) {
  return fingerprint(reinterpret_cast<std::uintptr_t>(bytes), count);
}

// Written into transcripts: it must not change without a new format.
void a_known_value() {
  std::vector<std::int32_t> words(1000);
  for (std::size_t index = 0; index < words.size(); ++index) words[index] = static_cast<std::int32_t>(index);
  CHECK(of(reinterpret_cast<const unsigned char*>(words.data()), 4000) == 3689837706994822412U);
  CHECK(of(nullptr, 0) == 0);
}

void any_alignment_and_number_of_lanes() {
  std::mt19937_64 random(5);
  std::vector<unsigned char> room(1 << 12);
  for (unsigned char& one : room) one = static_cast<unsigned char>(random());
  for (int round = 0; round < 200; ++round) {
    const std::size_t count = random() % 3000;
    const std::size_t skew = random() % 64;
    std::vector<unsigned char> aligned(room.begin() + static_cast<std::ptrdiff_t>(skew),
                                       room.begin() + static_cast<std::ptrdiff_t>(skew + count));
    const std::uint64_t whole = of(room.data() + skew, count);
    CHECK(whole == of(aligned.data(), count));
    const std::uint64_t lanes = 1 + random() % 70;
    std::uint64_t shared = 0;
    for (std::uint64_t lane = 0; lane < lanes; ++lane) {
      shared += fingerprint_share(reinterpret_cast<std::uintptr_t>(room.data() + skew), count, lane, lanes);
    }
    CHECK(shared == whole);
    if (count == 0) continue;
    aligned[random() % count] ^= static_cast<unsigned char>(1 << random() % 8);
    CHECK(of(aligned.data(), count) != whole);
  }
}

void blocks_have_keys_of_their_own() {
  std::vector<unsigned char> room(4 * (2 * kFingerprintBlockWords + 3));
  const std::uint64_t none = of(room.data(), room.size());
  room[0] = 1;
  const std::uint64_t first = of(room.data(), room.size());
  room[0] = 0;
  room[4 * kFingerprintBlockWords] = 1;
  const std::uint64_t second = of(room.data(), room.size());
  CHECK(first != none && second != none && first != second);
}

}  // namespace

int test_fingerprint() {
  return RUN(a_known_value) + RUN(any_alignment_and_number_of_lanes) + RUN(blocks_have_keys_of_their_own);
}
