#include "host_region.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <limits>
#include <utility>

#include "errors.h"

namespace moevement {
namespace {

// A signal interrupts posix_fallocate on tmpfs and undoes it; a periodic signal must not keep it busy for ever.
constexpr int kMaxInterruptedTries = 64;
constexpr std::uint64_t kReserveBlockBytes = std::uint64_t{256} << 20;
constexpr long kTmpfsMagic = 0x01021994;

std::string reason(int code, const char* call, const char* here) {
  return std::string(std::strerror(code)) + " in " + call + here;
}

#define MOEVEMENT_OS_ERROR(code, call, path) OsError((code), reason((code), (call), MOEVEMENT_HERE), (path))

class FileDescriptor {
 public:
  explicit FileDescriptor(int fd) : fd_(fd) {}
  ~FileDescriptor() {
    if (fd_ >= 0) ::close(fd_);
  }
  FileDescriptor(const FileDescriptor&) = delete;
  FileDescriptor& operator=(const FileDescriptor&) = delete;
  int get() const { return fd_; }

 private:
  int fd_;
};

// Removes a half-made file unless it is kept.
class NewFile {
 public:
  explicit NewFile(const std::string& path) : path_(path) {}
  ~NewFile() {
    if (!kept_) ::unlink(path_.c_str());
  }
  NewFile(const NewFile&) = delete;
  NewFile& operator=(const NewFile&) = delete;
  void keep() { kept_ = true; }

 private:
  const std::string& path_;
  bool kept_ = false;
};

class Mapping {
 public:
  Mapping(int fd, std::size_t nbytes, int protection, const std::string& path)
      : address_(::mmap(nullptr, nbytes, protection, MAP_SHARED, fd, 0)), nbytes_(nbytes) {
    if (address_ == MAP_FAILED) throw MOEVEMENT_OS_ERROR(errno, "mmap", path);
  }
  ~Mapping() {
    if (address_ != nullptr) ::munmap(address_, nbytes_);
  }
  Mapping(Mapping&& other) noexcept : address_(other.release()), nbytes_(other.nbytes_) {}
  Mapping(const Mapping&) = delete;
  Mapping& operator=(const Mapping&) = delete;
  void* address() const { return address_; }
  void* release() { return std::exchange(address_, nullptr); }

 private:
  void* address_;
  std::size_t nbytes_;
};

bool in_memory(int fd, const std::string& path) {
  struct statfs system {};
  if (::fstatfs(fd, &system) != 0) throw MOEVEMENT_OS_ERROR(errno, "fstatfs", path);
  return system.f_type == kTmpfsMagic;
}

// Block by block, for the sake of the progress function.
void reserve_space(int fd, std::uint64_t nbytes, const std::string& path, const Progress& progress) {
  for (std::uint64_t offset = 0; offset < nbytes; offset += kReserveBlockBytes) {
    const std::uint64_t bytes = std::min(kReserveBlockBytes, nbytes - offset);
    int code = EINTR;
    for (int attempt = 0; attempt < kMaxInterruptedTries && code == EINTR; ++attempt) {
      code = ::posix_fallocate(fd, static_cast<off_t>(offset), static_cast<off_t>(bytes));
    }
    if (code != 0) throw MOEVEMENT_OS_ERROR(code, "posix_fallocate", path);
    if (progress) progress(offset + bytes);
  }
}

// The file is new and all zero, so that writing a zero changes nothing.
void touch_pages(void* address, std::size_t nbytes) {
  const auto page = static_cast<std::size_t>(::sysconf(_SC_PAGESIZE));
  auto* bytes = static_cast<volatile unsigned char*>(address);
  for (std::size_t offset = 0; offset < nbytes; offset += page) bytes[offset] = 0;
}

// The space is taken now: a sparse file would turn a full file system into a SIGBUS in the middle of a copy. In shared
// memory, mapping the pages takes it, and several threads can do that; on a disk, where space is only promised when a
// page is written back, it is reserved first.
Mapping map_new(int fd, std::uint64_t nbytes, bool prefault, const FillOptions& options, const std::string& path) {
  const bool memory = in_memory(fd, path);
  if (memory) {
    if (::ftruncate(fd, static_cast<off_t>(nbytes)) != 0) throw MOEVEMENT_OS_ERROR(errno, "ftruncate", path);
  } else {
    // The pages are the slower half: they alone count as progress where there are any.
    const Progress nothing_yet = [&](std::uint64_t) { options.progress(0); };
    reserve_space(fd, nbytes, path, prefault && options.progress ? nothing_yet : options.progress);
  }
  Mapping mapping(fd, nbytes, PROT_READ | PROT_WRITE, path);
  if (options.huge_pages) prefer_huge_pages(mapping.address(), nbytes);
  prefer_local_memory(mapping.address(), nbytes);
  if ((memory || prefault) &&
      !populate(mapping.address(), nbytes, Access::write, options.threads, options.progress, path)) {
    if (memory) reserve_space(fd, nbytes, path, options.progress);
    touch_pages(mapping.address(), nbytes);
  }
  if (options.progress) options.progress(nbytes);
  return mapping;
}

}  // namespace

HostRegion::HostRegion(std::string path, void* address, std::size_t nbytes, bool writable)
    : path_(std::move(path)), address_(address), nbytes_(nbytes), writable_(writable) {}

HostRegion::~HostRegion() {
  if (address_ != nullptr) ::munmap(address_, nbytes_);
}

std::unique_ptr<HostRegion> HostRegion::create(const std::string& path, std::uint64_t nbytes, bool prefault,
                                               const FillOptions& options) {
  if (nbytes == 0 || nbytes > static_cast<std::uint64_t>(std::numeric_limits<off_t>::max())) {
    throw std::invalid_argument("nbytes must be 1 to 2^63-1, got " + std::to_string(nbytes) + MOEVEMENT_HERE);
  }
  check_populate_threads(options.threads);
  const FileDescriptor file(::open(path.c_str(), O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, S_IRUSR | S_IWUSR));
  if (file.get() < 0) throw MOEVEMENT_OS_ERROR(errno, "open", path);
  NewFile made(path);
  Mapping mapping = map_new(file.get(), nbytes, prefault, options, path);
  std::unique_ptr<HostRegion> region(new HostRegion(path, mapping.address(), nbytes, true));
  mapping.release();
  made.keep();
  return region;
}

std::unique_ptr<HostRegion> HostRegion::open(const std::string& path, bool writable, std::size_t populate_threads,
                                             const Progress& progress) {
  if (populate_threads != 0) check_populate_threads(populate_threads);
  const FileDescriptor file(::open(path.c_str(), (writable ? O_RDWR : O_RDONLY) | O_CLOEXEC));
  if (file.get() < 0) throw MOEVEMENT_OS_ERROR(errno, "open", path);
  struct stat status {};
  if (::fstat(file.get(), &status) != 0) throw MOEVEMENT_OS_ERROR(errno, "fstat", path);
  if (!S_ISREG(status.st_mode)) throw MOEVEMENT_OS_ERROR(EINVAL, "open: not a regular file", path);
  if (status.st_size <= 0) throw MOEVEMENT_OS_ERROR(EINVAL, "open: the file is empty", path);
  const auto nbytes = static_cast<std::size_t>(status.st_size);
  Mapping mapping(file.get(), nbytes, writable ? PROT_READ | PROT_WRITE : PROT_READ, path);
  // Where the kernel cannot do it, the pages are mapped when they are first read.
  if (populate_threads != 0) {
    (void)populate(mapping.address(), nbytes, Access::read, populate_threads, progress, path);
  }
  std::unique_ptr<HostRegion> region(new HostRegion(path, mapping.address(), nbytes, writable));
  mapping.release();
  return region;
}

void HostRegion::require_open() const {
  if (closed()) throw ClosedError("host region " + path_ + " is closed" + MOEVEMENT_HERE);
}

std::uint64_t HostRegion::address() const {
  require_open();
  return reinterpret_cast<std::uintptr_t>(address_);
}

std::uint64_t HostRegion::nbytes() const {
  require_open();
  return nbytes_;
}

std::uint64_t* HostRegion::word(std::uint64_t offset) const {
  require_open();
  constexpr std::uint64_t kWord = sizeof(std::uint64_t);
  if (offset % kWord != 0 || nbytes_ < kWord || offset > nbytes_ - kWord) {
    throw std::out_of_range("offset " + std::to_string(offset) + " is no aligned word of the " +
                            std::to_string(nbytes_) + " bytes of " + path_ + MOEVEMENT_HERE);
  }
  return reinterpret_cast<std::uint64_t*>(static_cast<unsigned char*>(address_) + offset);
}

void HostRegion::store_word(std::uint64_t offset, std::uint64_t value) {
  std::uint64_t* target = word(offset);
  if (!writable_) throw MOEVEMENT_OS_ERROR(EACCES, "store_word: mapped read-only", path_);
  __atomic_store_n(target, value, __ATOMIC_RELEASE);
}

std::uint64_t HostRegion::load_word(std::uint64_t offset) const {
  return __atomic_load_n(word(offset), __ATOMIC_ACQUIRE);
}

void HostRegion::close() {
  if (closed()) return;
  if (views_ != 0) {
    throw InUseError("cannot close " + path_ + ": " + std::to_string(views_) + " view(s) of it exist" + MOEVEMENT_HERE);
  }
  if (::munmap(address_, nbytes_) != 0) throw MOEVEMENT_OS_ERROR(errno, "munmap", path_);
  address_ = nullptr;
}

void HostRegion::add_view() {
  require_open();
  ++views_;
}

void HostRegion::drop_view() noexcept { --views_; }

}  // namespace moevement
