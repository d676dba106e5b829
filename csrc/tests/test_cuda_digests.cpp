// Digests on a GPU against those of the host: random ranges, misaligned ones, the fence on a stream, beside a bulk copy.
#include <atomic>
#include <chrono>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "copy_engine.h"
#include "device_digests.h"
#include "on_cuda.h"
#include "suites.h"

using namespace moevement;

namespace {

bool quick = false;

// The same random bytes on the device and on the host.
class Twin {
 public:
  Twin(std::size_t nbytes, std::uint64_t seed) : host(nbytes) {
    std::mt19937_64 random(seed);
    for (std::size_t index = 0; index + 8 <= nbytes; index += 8) {
      const std::uint64_t word = random();
      std::memcpy(host.data() + index, &word, 8);
    }
    CUDA(cudaMalloc(&device_, nbytes));
    CUDA(cudaMemcpy(device_, host.data(), nbytes, cudaMemcpyHostToDevice));
  }
  ~Twin() { (void)cudaFree(device_); }
  Twin(const Twin&) = delete;
  Twin& operator=(const Twin&) = delete;
  void* device() const { return device_; }
  DigestRange there(std::uint64_t offset, std::uint64_t bytes) const { return {address(device_) + offset, bytes}; }
  DigestRange here(std::uint64_t offset, std::uint64_t bytes) const { return {address(host.data()) + offset, bytes}; }

  std::vector<unsigned char> host;

 private:
  void* device_ = nullptr;
};

std::unique_ptr<DeviceDigests> on_the_gpu(std::uint32_t blocks = kDigestBlocks) {
  const DigestLimits limits{2000, std::uint64_t{2} << 30};
  return std::make_unique<DeviceDigests>(make_cuda_digest_device(0, digest_room(limits)), limits, blocks);
}

std::string on_the_host(const std::vector<DigestRange>& ranges) {
  DigestPool pool(4);
  return pool.wait(pool.submit(ranges), 60).value();
}

void digests_on_the_gpu_equal_those_of_the_host() {
  std::mt19937_64 random(11);
  const Twin twin(quick ? 3 << 20 : 300 << 20, 12);
  const auto digests = on_the_gpu();
  for (int round = 0; round < (quick ? 3 : 12); ++round) {
    digests->set_blocks(1 + random() % 200);
    std::vector<DigestRange> there, here;
    const std::size_t count = round == 0 ? 1 : 1 + random() % (quick ? 40 : 900);
    for (std::size_t index = 0; index < count; ++index) {
      std::uint64_t size = random() % (quick ? 200'000 : 2'000'000);
      if (random() % 4 == 0) size = random() % 600;
      if (random() % 4 == 0) size = kDigestLeafBytes * (random() % 5) + random() % 3;
      if (round == 0) size = twin.host.size();
      std::uint64_t offset = random() % (twin.host.size() - size + 1);
      // Aligned for vector loads as a rule, as tensors are; every other alignment too.
      if (random() % 2 == 0) offset -= offset % 16;
      there.push_back(twin.there(offset, size));
      here.push_back(twin.here(offset, size));
    }
    const auto ticket = digests->submit(there, 0, "random");
    CHECK(digests->wait(ticket, 60).value() == on_the_host(here));
    CHECK(digests->seconds(ticket) > 0);
  }
}

void every_alignment_and_a_flipped_bit() {
  const std::size_t nbytes = 3 * kDigestLeafBytes + 1000;
  const Twin twin(nbytes + 64, 13);
  const auto digests = on_the_gpu();
  std::vector<DigestRange> there, here;
  for (std::uint64_t skew = 0; skew < 33; ++skew) {
    there.push_back(twin.there(skew, nbytes - skew % 7));
    here.push_back(twin.here(skew, nbytes - skew % 7));
  }
  const std::string wanted = on_the_host(here);
  CHECK(digests->wait(digests->submit(there, 0, "skewed"), 60).value() == wanted);
  const std::size_t at = kDigestLeafBytes + 100;
  const unsigned char flipped = twin.host[at] ^ 1;
  CUDA(cudaMemcpy(static_cast<unsigned char*>(twin.device()) + at, &flipped, 1, cudaMemcpyHostToDevice));
  const std::string found = digests->wait(digests->submit(there, 0, "flipped"), 60).value();
  for (std::size_t index = 0; index < there.size(); ++index) {
    CHECK(found.compare(16 * index, 16, wanted, 16 * index, 16) != 0);
  }
}

void digests_wait_for_the_stream() {
  const std::size_t nbytes = 1 << 20;
  Twin twin(nbytes, 14);
  const auto digests = on_the_gpu();
  cudaStream_t stream = nullptr;
  CUDA(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  std::atomic<bool> gate{false};
  CUDA(cudaDeviceSynchronize());
  CUDA(cudaLaunchHostFunc(stream, hold, &gate));
  CUDA(cudaMemsetAsync(twin.device(), 2, nbytes, stream));
  const auto first = digests->submit({twin.there(0, nbytes)}, address(stream), "held");
  const bool early = digests->wait(first, 0.05).has_value();
  // The cancelled batch is still on its way: another one is refused, nothing hangs.
  const bool cancelled = digests->cancel(first);
  bool refused = false;
  try {
    digests->submit({twin.there(0, nbytes)}, address(stream), "next");
  } catch (const EngineError&) {
    refused = true;
  }
  gate = true;
  CUDA(cudaStreamSynchronize(stream));
  std::fill(twin.host.begin(), twin.host.end(), static_cast<unsigned char>(2));
  std::optional<std::uint64_t> next;
  for (int tries = 0; tries < 10'000 && !next; ++tries) {
    try {
      next = digests->submit({twin.there(0, nbytes)}, address(stream), "next");
    } catch (const EngineError&) {
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
  }
  CHECK(!early && cancelled && refused && next);
  CHECK(digests->wait(*next, 60).value() == on_the_host({twin.here(0, nbytes)}));
  CUDA(cudaStreamDestroy(stream));
}

void digests_and_a_bulk_copy_at_once() {
  const std::size_t nbytes = quick ? 8 << 20 : 256 << 20;
  const Twin twin(nbytes, 15);
  std::vector<unsigned char> copied(nbytes);
  CopyEngine engine(make_cuda_device(0, std::uint64_t{30} << 20), {});
  CHECK(engine.register_host(address(copied.data()), nbytes));
  const auto digests = on_the_gpu();
  std::vector<DigestRange> there, here;
  std::vector<CopyPiece> batch;
  for (std::uint64_t offset = 0; offset < nbytes; offset += 1'000'003) {
    const std::uint64_t size = std::min<std::uint64_t>(1'000'003, nbytes - offset);
    there.push_back(twin.there(offset, size));
    here.push_back({address(copied.data()) + offset, size});
    batch.push_back({there.back().address, here.back().address, size});
  }
  for (int round = 0; round < 3; ++round) {
    std::fill(copied.begin(), copied.end(), static_cast<unsigned char>(0));
    const auto ticket = digests->submit(there, 0, "beside");
    const auto copy = engine.submit(batch, 0, "bulk");
    CHECK(engine.wait(copy, 60));
    CHECK(digests->wait(ticket, 60).value() == on_the_host(here));
  }
  CHECK(engine.unregister_host(address(copied.data())));
}

void the_rate_by_blocks() {
  const std::size_t nbytes = quick ? 4 << 20 : std::size_t{1} << 30;
  const Twin twin(nbytes, 16);
  const auto digests = on_the_gpu();
  std::printf("     %llu bytes of device memory for tables;", static_cast<unsigned long long>(digests->device_bytes()));
  for (const std::uint32_t blocks : {4u, 8u, 16u, 32u, 64u, 132u, 264u}) {
    digests->set_blocks(blocks);
    double best = 0;
    for (int round = 0; round < 4; ++round) {
      const auto ticket = digests->submit({twin.there(0, nbytes)}, 0, "rate");
      CHECK(digests->wait(ticket, 60));
      best = std::max(best, static_cast<double>(nbytes) / digests->seconds(ticket) / 1e9);
    }
    std::printf(" %u blocks %.0f GB/s", blocks, best);
  }
  std::printf("\n");
}

}  // namespace

int test_cuda_digests(bool only_quick) {
  quick = only_quick;
  return RUN(digests_on_the_gpu_equal_those_of_the_host) + RUN(every_alignment_and_a_flipped_bit) +
         RUN(digests_wait_for_the_stream) + RUN(digests_and_a_bulk_copy_at_once) + RUN(the_rate_by_blocks);
}
