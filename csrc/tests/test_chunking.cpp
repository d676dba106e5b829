// Chunks, the staging ring, and what the gather kernel does with them, done here lane by lane.
#include <cstring>
#include <deque>
#include <random>
#include <vector>

#include "gather.h"
#include "suites.h"
#include "support.h"

using namespace moevement;

namespace {

// Copies a chunk as the CUDA device does: gathered runs through the staging memory.
void perform(const Chunk& chunk, Bytes& staging) {
  constexpr std::uint32_t kLanes = 5;
  const auto table = descriptors(chunk);
  const auto run_kernel = [&](bool scatter) {
    for (const Descriptor& item : table) {
      for (std::uint32_t lane = 0; lane < kLanes; ++lane) {
        move_piece(item, address(staging.data()), scatter, lane, kLanes);
      }
    }
  };
  if (chunk.direction == Direction::to_host) run_kernel(false);
  for (const Run& run : chunk.runs) {
    const CopyPiece& first = chunk.pieces[run.first];
    auto from = first.source, to = first.destination;
    if (run.gathered()) (chunk.direction == Direction::to_host ? from : to) = address(staging.data()) + run.staging;
    std::memcpy(reinterpret_cast<void*>(to), reinterpret_cast<const void*>(from), run.bytes);
  }
  if (chunk.direction == Direction::to_device) run_kernel(true);
}

void check_chunk(const Chunk& chunk, const ChunkRules& rules) {
  CHECK(chunk.bytes >= 1 && chunk.bytes <= rules.chunk_bytes && chunk.staging_bytes <= rules.staging_bytes);
  CHECK(chunk.pieces.size() <= kMaxPiecesPerChunk && chunk.runs.size() <= kMaxRunsPerChunk);
  std::size_t next = 0;
  std::uint64_t total = 0;
  for (const Run& run : chunk.runs) {
    CHECK(run.first == next && run.count >= 1);
    std::uint64_t bytes = 0;
    for (std::size_t index = run.first; index < run.first + run.count; ++index) {
      bytes += chunk.pieces[index].bytes;
      CHECK(!run.gathered() || chunk.pieces[index].bytes < kDirectBytes);
    }
    CHECK(bytes == run.bytes);
    total += bytes;
    next += run.count;
  }
  CHECK(next == chunk.pieces.size() && total == chunk.bytes);
}

// Pieces with gaps now and then, on the host contiguous most of the time.
std::vector<CopyPiece> random_batch(const Bytes& from, Bytes& to, Direction direction, std::mt19937_64& random) {
  std::vector<CopyPiece> batch;
  std::size_t host = random() % 8;
  while (true) {
    const std::size_t bytes = random() % 5 == 0 ? random() % 900 : random() % 40;
    if (host + bytes > 6000) return batch;
    const std::size_t device = random() % (to.size() - bytes);
    const std::size_t source = direction == Direction::to_device ? host : device;
    const std::size_t target = direction == Direction::to_device ? device : host;
    batch.push_back({address(from.data()) + source, address(to.data()) + target, bytes});
    host += bytes + (random() % 6 == 0 ? random() % 64 : 0);
  }
}

void gathered_chunks_copy_every_byte_in_order() {
  std::mt19937_64 random(5);
  std::size_t gathered = 0;
  for (int round = 0; round < 600; ++round) {
    const Direction direction = round % 3 == 0   ? Direction::to_host
                                : round % 3 == 1 ? Direction::to_device
                                                 : Direction::other;
    const Bytes from = random_bytes(8000, random);
    Bytes to(8000, 0), expected(8000, 0);
    const auto batch = random_batch(from, to, direction, random);
    for (const CopyPiece& item : batch) {
      std::memcpy(expected.data() + (item.destination - address(to.data())),
                  reinterpret_cast<const void*>(item.source), item.bytes);
    }
    ChunkCursor cursor(batch);
    std::uint64_t offset = 0;
    while (!cursor.at_end()) {
      const ChunkRules rules{1 + random() % 3000, random() % 2000, direction};
      const Chunk chunk = cursor.next(rules);
      check_chunk(chunk, rules);
      CHECK(chunk.offset == offset);
      offset += chunk.bytes;
      Bytes staging(chunk.staging_bytes + 16, 0);
      perform(chunk, staging);
      gathered += descriptors(chunk).size();
    }
    CHECK(to == expected);
  }
  CHECK(gathered > 1000);
}

void the_kernel_copies_at_every_alignment() {
  std::mt19937_64 random(6);
  const Bytes from = random_bytes(256, random);
  for (std::size_t source = 0; source < 17; ++source) {
    for (std::size_t target = 0; target < 17; ++target) {
      for (const std::uint32_t bytes : {0u, 1u, 2u, 3u, 7u, 15u, 16u, 17u, 33u, 64u, 100u, 200u}) {
        for (const std::uint32_t lanes : {1u, 3u, 32u}) {
          Bytes to(256, 0), expected(256, 0);
          std::memcpy(expected.data() + target, from.data() + source, bytes);
          for (std::uint32_t lane = 0; lane < lanes; ++lane) {
            copy_bytes(address(to.data()) + target, address(from.data()) + source, bytes, lane, lanes);
          }
          CHECK(to == expected);
        }
      }
    }
  }
  CHECK(widest(32, 48) == 16 && widest(32, 40) == 8 && widest(34, 38) == 4 && widest(34, 36) == 2);
  CHECK(widest(33, 36) == 1 && widest(33, 17) == 16);
}

void large_pieces_and_gaps_are_direct() {
  constexpr std::uint64_t kMib = 1 << 20;
  const ChunkRules rules{8 * kMib, 8 * kMib, Direction::to_host};
  // Small, small | large | small (alone) | gap | small, small: the host side is `destination`.
  ChunkCursor cursor({{0x10000000, 0x20000000, 64},
                      {0x11000000, 0x20000040, 64},
                      {0x12000000, 0x20000080, kDirectBytes},
                      {0x13000000, 0x20000080 + kDirectBytes, 64},
                      {0x14000000, 0x20000100 + kDirectBytes, 64},
                      {0x15000000, 0x20000140 + kDirectBytes, 64}});
  const Chunk chunk = cursor.next(rules);
  CHECK(cursor.at_end() && chunk.runs.size() == 4);
  CHECK(chunk.runs[0].count == 2 && !chunk.runs[1].gathered() && !chunk.runs[2].gathered());
  CHECK(chunk.runs[3].count == 2 && descriptors(chunk).size() == 4 && chunk.staging_bytes == 256 + 128);
  CHECK(descriptors(chunk)[3].address == 0x15000000 && descriptors(chunk)[3].offset == 256 + 64);
}

void pieces_are_limited_per_chunk() {
  std::vector<CopyPiece> batch;
  for (std::uint64_t index = 0; index < 300; ++index) batch.push_back({4096 + 16 * index, 1 << 20 | 8 * index, 8});
  ChunkCursor gathered(batch), apart(batch);
  CHECK(gathered.next({1 << 20, 1 << 20, Direction::to_host}).pieces.size() == kMaxPiecesPerChunk);
  CHECK(apart.next({1 << 20, 0, Direction::to_host}).pieces.size() == kMaxRunsPerChunk);
  CHECK(apart.next({1 << 20, 1 << 20, Direction::other}).pieces.size() == kMaxRunsPerChunk);
}

void pieces_that_follow_each_other_stay_apart() {
  for (const Direction direction : {Direction::to_host, Direction::to_device, Direction::other}) {
    for (const std::uint64_t bytes : {std::uint64_t{1000}, kDirectBytes}) {
      ChunkCursor cursor({{1 << 30, 1 << 20, bytes}, {(1 << 30) + bytes, (1 << 20) + bytes, bytes}, {1, 1, 0}});
      const Chunk chunk = cursor.next({1 << 30, 0, direction});
      CHECK(cursor.at_end() && chunk.pieces.size() == 2 && chunk.runs.size() == 2 && chunk.bytes == 2 * bytes);
      CHECK(chunk.runs[0].bytes == bytes && chunk.runs[1].bytes == bytes);
    }
  }
  CHECK(ChunkCursor(std::vector<CopyPiece>{}).at_end() && ChunkCursor(std::vector<CopyPiece>{{0, 0, 0}}).at_end());
}

void the_staging_ring_never_hands_out_a_byte_twice() {
  std::mt19937_64 random(8);
  for (const std::size_t flights : {1u, 2u, 4u, 9u}) {
    constexpr std::uint64_t kBytes = 1 << 16;
    const std::uint64_t most = kBytes / (flights + 1) / 256 * 256;
    StagingRing ring(kBytes);
    std::deque<std::pair<std::uint64_t, std::uint64_t>> taken;
    for (int step = 0; step < 5000; ++step) {
      if (taken.size() == flights || (!taken.empty() && random() % 3 == 0)) {
        ring.give_back_oldest();
        taken.pop_front();
      }
      const std::uint64_t bytes = 1 + random() % most;
      const auto begin = ring.take(bytes);
      // There is always room for one chunk more of its share.
      CHECK(begin && *begin % 256 == 0 && *begin + bytes <= kBytes);
      for (const auto& [other, end] : taken) CHECK(*begin >= end || *begin + bytes <= other);
      taken.emplace_back(*begin, *begin + bytes);
    }
    CHECK(!ring.take(kBytes));
    ring.clear();
    CHECK(ring.take(kBytes) && !ring.take(1));
  }
}

}  // namespace

int test_chunking() {
  return RUN(gathered_chunks_copy_every_byte_in_order) + RUN(the_kernel_copies_at_every_alignment) +
         RUN(large_pieces_and_gaps_are_direct) + RUN(pieces_are_limited_per_chunk) +
         RUN(pieces_that_follow_each_other_stay_apart) + RUN(the_staging_ring_never_hands_out_a_byte_twice);
}
