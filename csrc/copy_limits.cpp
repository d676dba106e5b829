#include "copy_limits.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>

#include "copy_device.h"
#include "errors.h"

namespace moevement {
namespace {

constexpr std::uint64_t kLargestChunkBytes = std::uint64_t{1} << 30;
constexpr double kMaxSeconds = 1e8;

void require(bool good, const std::string& what, const char* here) {
  if (!good) throw std::invalid_argument(what + here);
}

void check_piece(const CopyPiece& piece, std::size_t index) {
  if (piece.bytes == 0) return;
  const char* wrong = nullptr;
  if (piece.source == 0 || piece.destination == 0) {
    wrong = "has a null address";
  } else if (piece.source + piece.bytes < piece.source || piece.destination + piece.bytes < piece.destination) {
    wrong = "wraps around the address space";
  } else if (piece.source < piece.destination + piece.bytes && piece.destination < piece.source + piece.bytes) {
    wrong = "overlaps itself: its source and destination share bytes";
  }
  if (wrong != nullptr) {
    throw std::invalid_argument("piece " + std::to_string(index) + " of " + std::to_string(piece.bytes) + " bytes " +
                                wrong + MOEVEMENT_HERE);
  }
}

bool is_seconds(double value) { return value >= 0 && value <= kMaxSeconds; }

}  // namespace

void check_chunks(std::uint64_t chunk_bytes, std::size_t chunks_in_flight, std::uint64_t max_chunk_bytes) {
  require(chunk_bytes >= 1 && chunk_bytes <= max_chunk_bytes,
          "chunk_bytes must be 1 to " + std::to_string(max_chunk_bytes), MOEVEMENT_HERE);
  require(chunks_in_flight >= 1 && chunks_in_flight <= kMaxChunksInFlight, "chunks_in_flight must be 1 to 64",
          MOEVEMENT_HERE);
}

void check_limits(const EngineLimits& limits) {
  check_chunks(limits.chunk_bytes, limits.chunks_in_flight, kLargestChunkBytes);
  require(is_seconds(limits.longest_pause_seconds), "longest_pause_seconds must be 0 to 1e8", MOEVEMENT_HERE);
  require(limits.max_chunk_bytes >= 1 && limits.max_chunk_bytes <= kLargestChunkBytes,
          "max_chunk_bytes must be 1 to 2^30", MOEVEMENT_HERE);
  require(limits.burst_chunks_in_flight <= kMaxChunksInFlight, "burst_chunks_in_flight must be 0 to 64",
          MOEVEMENT_HERE);
  require(limits.max_queued_tickets >= 1, "max_queued_tickets must be at least 1", MOEVEMENT_HERE);
  require(limits.max_finished_tickets >= 1, "max_finished_tickets must be at least 1", MOEVEMENT_HERE);
  const double cap = limits.bytes_per_second_limit;
  require(cap == 0 || (std::isfinite(cap) && cap >= 1), "bytes_per_second_limit must be 0 (none) or at least 1",
          MOEVEMENT_HERE);
}

void check_batch(const std::vector<CopyPiece>& batch, const SubmitOptions& options) {
  for (std::size_t index = 0; index < batch.size(); ++index) check_piece(batch[index], index);
  require(options.priority >= 0 && options.priority <= kMaxPriority,
          "priority must be 0 to 7, got " + std::to_string(options.priority), MOEVEMENT_HERE);
  require(is_seconds(options.spread_seconds),
          "spread_seconds must be 0 to 1e8, got " + std::to_string(options.spread_seconds), MOEVEMENT_HERE);
  if (options.groups.empty()) return;
  std::uint64_t left = batch.size();
  for (const PieceGroup& group : options.groups) {
    require(group.pieces <= left, "groups have more pieces than the batch", MOEVEMENT_HERE);
    left -= group.pieces;
  }
  require(left == 0, "groups leave out " + std::to_string(left) + " pieces of the batch", MOEVEMENT_HERE);
}

double checked_timeout(double timeout_seconds) {
  require(is_seconds(timeout_seconds), "timeout_seconds must be 0 to 1e8, got " + std::to_string(timeout_seconds),
          MOEVEMENT_HERE);
  return timeout_seconds;
}

}  // namespace moevement
