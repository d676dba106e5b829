#include "chunking.h"

#include <algorithm>
#include <utility>

namespace moevement {
namespace {

// Vector loads and stores are this wide at most.
constexpr std::uint64_t kVectorBytes = 16;

bool overlap(std::uint64_t first, std::uint64_t first_bytes, std::uint64_t second, std::uint64_t second_bytes) {
  return first < second + second_bytes && second < first + first_bytes;
}

std::uint64_t host_side(const CopyPiece& piece, Direction direction) {
  return direction == Direction::to_host ? piece.destination : piece.source;
}

std::uint64_t device_side(const CopyPiece& piece, Direction direction) {
  return direction == Direction::to_host ? piece.source : piece.destination;
}

// Builds one chunk piece by piece.
class Builder {
 public:
  Builder(const ChunkRules& rules, std::uint64_t offset) : rules_(rules) {
    chunk_.direction = rules.direction;
    chunk_.offset = offset;
  }

  std::uint64_t room() const { return rules_.chunk_bytes - chunk_.bytes; }

  // False when the piece must wait for the next chunk. `piece` has at most room() bytes.
  bool add(const CopyPiece& piece) {
    if (chunk_.pieces.size() == kMaxPiecesPerChunk) return false;
    if (lacks_staging(piece)) return false;
    const bool joined = joins_last(piece);
    if (!joined && chunk_.runs.size() == kMaxRunsPerChunk) return false;
    if (writes_again(piece)) return false;
    if (joined) {
      ++chunk_.runs.back().count;
      chunk_.runs.back().bytes += piece.bytes;
    } else {
      close_run();
      chunk_.runs.push_back({chunk_.pieces.size(), 1, piece.bytes, staging_for(piece)});
    }
    chunk_.pieces.push_back(piece);
    chunk_.bytes += piece.bytes;
    highest_written_ = std::max(highest_written_, piece.destination + piece.bytes);
    return true;
  }

  Chunk finish() {
    close_run();
    chunk_.staging_bytes = staged_;
    return std::move(chunk_);
  }

 private:
  bool small(const CopyPiece& piece) const {
    return rules_.direction != Direction::other && rules_.staging_bytes != 0 && piece.bytes < kDirectBytes;
  }

  bool follows_last(const CopyPiece& piece) const {
    if (chunk_.runs.empty() || !small(piece) || !small(chunk_.pieces.back())) return false;
    const CopyPiece& last = chunk_.pieces.back();
    return host_side(last, rules_.direction) + last.bytes == host_side(piece, rules_.direction);
  }

  bool fits_staging(const CopyPiece& piece) const {
    const Run& run = chunk_.runs.back();
    return run.staging + run.bytes + piece.bytes <= rules_.staging_bytes;
  }

  bool joins_last(const CopyPiece& piece) const { return follows_last(piece) && fits_staging(piece); }

  // In the next chunk there is room to gather it; here it would be a copy of its own.
  bool lacks_staging(const CopyPiece& piece) const {
    return follows_last(piece) && chunk_.runs.back().gathered() && !fits_staging(piece);
  }

  // All pieces are scattered at once: which of two that write the same byte is the later one would be lost.
  bool writes_again(const CopyPiece& piece) const {
    if (rules_.direction != Direction::to_device || piece.destination >= highest_written_) return false;
    return std::any_of(chunk_.pieces.begin(), chunk_.pieces.end(), [&](const CopyPiece& other) {
      return overlap(piece.destination, piece.bytes, other.destination, other.bytes);
    });
  }

  // As aligned as the device's side of the first piece, so that the kernel can use its widest loads.
  std::uint64_t staging_for(const CopyPiece& piece) const {
    const std::uint64_t base = (staged_ + kStagingAlignment - 1) / kStagingAlignment * kStagingAlignment;
    return base + device_side(piece, rules_.direction) % kVectorBytes;
  }

  void close_run() {
    if (!chunk_.runs.empty() && chunk_.runs.back().gathered()) {
      staged_ = chunk_.runs.back().staging + chunk_.runs.back().bytes;
    }
  }

  const ChunkRules& rules_;
  Chunk chunk_;
  std::uint64_t staged_ = 0;
  std::uint64_t highest_written_ = 0;
};

}  // namespace

std::vector<Descriptor> descriptors(const Chunk& chunk) {
  std::vector<Descriptor> found;
  for (const Run& run : chunk.runs) {
    if (!run.gathered()) continue;
    std::uint64_t offset = run.staging;
    for (std::size_t index = run.first; index < run.first + run.count; ++index) {
      const CopyPiece& piece = chunk.pieces[index];
      found.push_back({device_side(piece, chunk.direction), static_cast<std::uint32_t>(offset),
                       static_cast<std::uint32_t>(piece.bytes)});
      offset += piece.bytes;
    }
  }
  return found;
}

ChunkCursor::ChunkCursor(std::vector<CopyPiece> pieces) : pieces_(std::move(pieces)) {
  pieces_.erase(
      std::remove_if(pieces_.begin(), pieces_.end(), [](const CopyPiece& piece) { return piece.bytes == 0; }),
      pieces_.end());
}

Chunk ChunkCursor::next(const ChunkRules& rules) {
  Builder builder(rules, offset_);
  while (!at_end() && builder.room() != 0) {
    const CopyPiece& piece = pieces_[piece_];
    const std::uint64_t bytes = std::min(builder.room(), piece.bytes - within_);
    if (bytes != 0 && !builder.add({piece.source + within_, piece.destination + within_, bytes})) break;
    within_ += bytes;
    offset_ += bytes;
    if (within_ == piece.bytes) {
      ++piece_;
      within_ = 0;
    }
  }
  return builder.finish();
}

std::optional<std::uint64_t> StagingRing::take(std::uint64_t bytes) {
  std::uint64_t begin = 0;
  std::uint64_t limit = bytes_;
  if (!taken_.empty()) {
    const std::uint64_t oldest = taken_.front().begin;
    begin = (taken_.back().end + kStagingAlignment - 1) / kStagingAlignment * kStagingAlignment;
    const bool wrapped = taken_.back().begin < oldest;
    if (wrapped) {
      limit = oldest;
    } else if (begin + bytes > bytes_) {
      begin = 0;
      limit = oldest;
    }
  }
  if (begin + bytes > limit) return std::nullopt;
  taken_.push_back({begin, begin + bytes});
  return begin;
}

void StagingRing::give_back_oldest() { taken_.erase(taken_.begin()); }

}  // namespace moevement
