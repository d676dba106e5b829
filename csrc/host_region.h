// A file mapped into memory and shared between processes: the bytes outlive the process that wrote them, because they
// belong to the file (in /dev/shm or in a normal directory) and not to the process.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

#include "populate.h"

namespace moevement {

struct FillOptions {
  std::size_t threads = 1;
  bool huge_pages = true;
  Progress progress = {};
};

class HostRegion {
 public:
  // Makes a new file of `nbytes` bytes, all zero, takes its space at once and maps it writable. With `prefault`, and
  // always in shared memory, every page is in this process's page table before the call returns. Throws OsError
  // (EEXIST, ENOSPC, ...) and what the progress function throws, and leaves no file behind that it made;
  // std::invalid_argument when `nbytes` is 0 or too large for a file offset.
  static std::unique_ptr<HostRegion> create(const std::string& path, std::uint64_t nbytes, bool prefault,
                                            const FillOptions& options = {});
  // Maps a whole existing file, with its pages where `populate_threads` is not 0. Throws OsError; EINVAL when the file
  // is empty or no regular file.
  static std::unique_ptr<HostRegion> open(const std::string& path, bool writable, std::size_t populate_threads = 0,
                                          const Progress& progress = {});

  ~HostRegion();
  HostRegion(const HostRegion&) = delete;
  HostRegion& operator=(const HostRegion&) = delete;

  // All of these throw ClosedError after close().
  std::uint64_t address() const;
  std::uint64_t nbytes() const;
  // Release store and acquire load of one aligned 64-bit word: who loads the stored value also sees every byte written
  // before the store. Throw std::out_of_range for an offset that is not a multiple of 8 or does not fit; store_word
  // throws OsError EACCES for a region mapped read-only.
  void store_word(std::uint64_t offset, std::uint64_t value);
  std::uint64_t load_word(std::uint64_t offset) const;

  // Unmaps; the file stays. A second call does nothing. Throws InUseError while a view is held.
  void close();

  // A view is held between add_view and drop_view. The caller serializes these with close().
  void add_view();
  void drop_view() noexcept;

  bool closed() const noexcept { return address_ == nullptr; }
  bool writable() const noexcept { return writable_; }
  const std::string& path() const noexcept { return path_; }

 private:
  HostRegion(std::string path, void* address, std::size_t nbytes, bool writable);
  std::uint64_t* word(std::uint64_t offset) const;
  void require_open() const;

  std::string path_;
  void* address_;
  std::size_t nbytes_;
  bool writable_;
  std::size_t views_ = 0;
};

}  // namespace moevement
