// Which bytes go into one chunk, and how they travel: plain functions of addresses, without a device.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <vector>

namespace moevement {

struct CopyPiece {
  std::uint64_t source;
  std::uint64_t destination;
  std::uint64_t bytes;
};

// Where a ticket's pieces go, as far as gathering is concerned. `other` is copied piece by piece.
enum class Direction { other, to_host, to_device };

// Pieces of this size and more gain nothing from being gathered.
constexpr std::uint64_t kDirectBytes = std::uint64_t{2} << 20;
// A kernel's parameters hold the descriptors of so many pieces.
constexpr std::size_t kMaxPiecesPerChunk = 128;
// Separate copies of one chunk: not so many that a cancel waits long for them.
constexpr std::size_t kMaxRunsPerChunk = 64;

// Parts of the staging memory begin at multiples of this, as transactions of the GPU's memory do.
constexpr std::uint64_t kStagingAlignment = 256;

struct ChunkRules {
  std::uint64_t chunk_bytes;
  std::uint64_t staging_bytes;  // device memory that the chunk may use to gather; 0: none
  Direction direction;
};

// One copy between host and device: a single piece, or gathered pieces that follow each other on the host.
struct Run {
  std::size_t first;
  std::size_t count;
  std::uint64_t bytes;
  std::uint64_t staging;  // offset in the chunk's staging memory, if gathered
  bool gathered() const { return count > 1; }
};

struct Chunk {
  std::vector<CopyPiece> pieces;
  std::vector<Run> runs;
  std::uint64_t bytes = 0;
  std::uint64_t staging_bytes = 0;
  std::uint64_t offset = 0;  // of its first byte, counted over the bytes of its batch
  Direction direction = Direction::other;
};

// A gathered piece: its address on the device, its place in the staging memory.
struct Descriptor {
  std::uint64_t address;
  std::uint32_t offset;
  std::uint32_t bytes;
};

std::vector<Descriptor> descriptors(const Chunk& chunk);

// Walks over a batch in order; every byte is in exactly one chunk. Pieces that follow each other stay apart: they may
// lie in two allocations of the device, and CUDA refuses a copy that crosses from one to the next.
class ChunkCursor {
 public:
  ChunkCursor() = default;
  explicit ChunkCursor(std::vector<CopyPiece> pieces);
  bool at_end() const { return piece_ == pieces_.size(); }
  const CopyPiece& front() const { return pieces_[piece_]; }
  Chunk next(const ChunkRules& rules);

 private:
  std::vector<CopyPiece> pieces_;
  std::size_t piece_ = 0;
  std::uint64_t within_ = 0;  // bytes of the current piece that are gone
  std::uint64_t offset_ = 0;
};

// Hands out memory that is given back in the order it was taken in.
class StagingRing {
 public:
  explicit StagingRing(std::uint64_t bytes) : bytes_(bytes) {}
  // Offset of `bytes` contiguous bytes, none where there is no room.
  std::optional<std::uint64_t> take(std::uint64_t bytes);
  void give_back_oldest();
  void clear() { taken_.clear(); }

 private:
  struct Taken {
    std::uint64_t begin, end;
  };
  std::uint64_t bytes_;
  std::vector<Taken> taken_;
};

}  // namespace moevement
