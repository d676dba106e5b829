// The host region: its words, its errors, its space.
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <string>
#include <thread>

#include "host_region.h"
#include "suites.h"
#include "support.h"

using namespace moevement;

namespace {

std::string scratch_path() {
  static int number = 0;
  return "/dev/shm/moevement-native-" + std::to_string(::getpid()) + "-" + std::to_string(++number);
}

void region_words_and_errors() {
  const std::string path = scratch_path();
  auto region = HostRegion::create(path, 4096, true);
  CHECK_THROWS(OsError, HostRegion::create(path, 4096, false));
  region->store_word(4088, 7);
  CHECK(region->load_word(4088) == 7);
  for (const std::uint64_t offset : {std::uint64_t{1}, std::uint64_t{4089}, std::uint64_t{4096}, ~std::uint64_t{7}}) {
    CHECK_THROWS(std::out_of_range, region->load_word(offset));
    CHECK_THROWS(std::out_of_range, (region->store_word(offset, 1), 0));
  }
  const auto reader = HostRegion::open(path, false);
  CHECK(reader->load_word(4088) == 7);
  CHECK_THROWS(OsError, (reader->store_word(0, 1), 0));
  region->add_view();
  CHECK_THROWS(InUseError, (region->close(), 0));
  region->drop_view();
  region->close();
  region->close();
  CHECK_THROWS(ClosedError, region->address());
  ::unlink(path.c_str());
  CHECK_THROWS(OsError, HostRegion::open(path, false));
  CHECK_THROWS(std::invalid_argument, HostRegion::create(path, 0, false));
}

void a_stored_word_publishes_the_bytes_before_it() {
  const std::string path = scratch_path();
  const auto region = HostRegion::create(path, 8192, false);
  ::unlink(path.c_str());
  auto* bytes = reinterpret_cast<unsigned char*>(region->address());
  std::thread writer([&] {
    std::memset(bytes + 64, 3, 4096);
    region->store_word(0, 1);
  });
  while (region->load_word(0) == 0) std::this_thread::yield();
  const bool all_there = Bytes(bytes + 64, bytes + 64 + 4096) == Bytes(4096, 3);
  writer.join();
  CHECK(all_there);
}

void regions_are_filled_by_any_number_of_threads() {
  const std::string path = scratch_path();
  for (const std::size_t threads : {1u, 3u}) {
    std::vector<std::uint64_t> reports;
    FillOptions options;
    options.threads = threads;
    options.progress = [&](std::uint64_t done) { reports.push_back(done); };
    const std::size_t nbytes = (std::size_t{513} << 20) + 1;
    const auto region = HostRegion::create(path, nbytes, true, options);
    CHECK(!reports.empty() && reports.back() == nbytes && std::is_sorted(reports.begin(), reports.end()));
    const auto reader = HostRegion::open(path, false, threads);
    region->store_word(512 << 20, 7);
    CHECK(reader->load_word(512 << 20) == 7 && reader->load_word(8) == 0);
    ::unlink(path.c_str());
  }
  FillOptions none;
  none.threads = 0;
  CHECK_THROWS(std::invalid_argument, HostRegion::create(path, 4096, false, none));
  CHECK_THROWS(std::invalid_argument, HostRegion::open(path, false, 65));
}

void a_progress_function_that_throws_leaves_no_file() {
  for (const std::string folder : {"/dev/shm", "/tmp"}) {
    const std::string path = folder + scratch_path().substr(8);
    FillOptions options;
    options.progress = [](std::uint64_t) { throw std::logic_error("enough"); };
    CHECK_THROWS(std::logic_error, HostRegion::create(path, 1 << 20, true, options));
    CHECK(::access(path.c_str(), F_OK) != 0);
    const auto region = HostRegion::create(path, 1 << 20, true, {});
    CHECK(region->load_word(4096) == 0);
    ::unlink(path.c_str());
  }
}

}  // namespace

int test_region() {
  return RUN(region_words_and_errors) +
         RUN(a_stored_word_publishes_the_bytes_before_it) +
         RUN(regions_are_filled_by_any_number_of_threads) + RUN(a_progress_function_that_throws_leaves_no_file);
}
