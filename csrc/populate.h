// Maps the pages of a region in, and takes their space, with several threads.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>

namespace moevement {

// Called by the calling thread about five times a second with the bytes done; an exception from it ends the call and
// passes through.
using Progress = std::function<void(std::uint64_t)>;

enum class Access { read, write };

// Throws std::invalid_argument unless `threads` is 1 to 64.
void check_populate_threads(std::size_t threads);
// Maps every page of [address, address + nbytes), which is a mapping of the file `path`, for the access; a page that
// the file lacks is made. False when the kernel cannot do that (before Linux 5.14). Throws OsError: ENOSPC when the file
// system is full, EAGAIN when there are no threads left.
bool populate(void* address, std::size_t nbytes, Access access, std::size_t threads, const Progress& progress,
              const std::string& path);
// Asks for the memory of the node that this thread runs on, where there is more than one; a hint without an error.
void prefer_local_memory(void* address, std::size_t nbytes) noexcept;
// Asks for huge pages, where the kernel offers them; a hint without an error.
void prefer_huge_pages(void* address, std::size_t nbytes) noexcept;

}  // namespace moevement
