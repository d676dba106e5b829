// What a copy engine can be asked for, and the checks of it. All throw std::invalid_argument.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "chunking.h"

namespace moevement {

struct EngineLimits {
  std::uint64_t chunk_bytes = std::uint64_t{4} << 20;
  std::size_t chunks_in_flight = 2;
  std::size_t max_queued_tickets = 64;       // unfinished tickets, running ones included
  std::size_t max_finished_tickets = 1024;   // finished tickets whose record is kept
  double bytes_per_second_limit = 0;         // 0: none
  std::size_t burst_chunks_in_flight = 0;    // for tickets that are waited for, if more than chunks_in_flight
  std::uint64_t max_chunk_bytes = std::uint64_t{16} << 20;  // for set_chunks; a larger chunk_bytes raises it
  double longest_pause_seconds = 0.005;
};

// A name for the next `pieces` pieces of a batch.
struct PieceGroup {
  std::string name;
  std::uint64_t pieces;
};

constexpr int kMaxPriority = 7;

struct SubmitOptions {
  int priority = 0;             // 0 to kMaxPriority, higher first
  double spread_seconds = 0;    // from submit on, evenly; 0: as fast as the link goes
  std::vector<PieceGroup> groups = {};  // empty, or covers all pieces in order
};

void check_limits(const EngineLimits& limits);
void check_chunks(std::uint64_t chunk_bytes, std::size_t chunks_in_flight, std::uint64_t max_chunk_bytes);
void check_batch(const std::vector<CopyPiece>& batch, const SubmitOptions& options);
double checked_timeout(double timeout_seconds);

inline std::chrono::steady_clock::duration duration_of(double seconds) {
  return std::chrono::duration_cast<std::chrono::steady_clock::duration>(std::chrono::duration<double>(seconds));
}

}  // namespace moevement
