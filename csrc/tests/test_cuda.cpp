// The copy engine on a GPU: contents both ways, gathered or not, the fence on a stream, pinned shared memory, errors,
// priorities, latency, bandwidth. With --quick, sizes are small enough for a tool that watches every access.
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "copy_engine.h"
#include "host_region.h"
#include "on_cuda.h"
#include "suites.h"

using namespace moevement;

namespace {

class DeviceMemory {
 public:
  explicit DeviceMemory(std::size_t nbytes) { CUDA(cudaMalloc(&pointer_, nbytes)); }
  ~DeviceMemory() { (void)cudaFree(pointer_); }
  DeviceMemory(const DeviceMemory&) = delete;
  DeviceMemory& operator=(const DeviceMemory&) = delete;
  void* get() const { return pointer_; }

 private:
  void* pointer_ = nullptr;
};

bool quick = false;
constexpr std::uint64_t kGatherBytes = std::uint64_t{32} << 20;

std::unique_ptr<CopyEngine> make_engine(EngineLimits limits = {}, std::uint64_t gather_bytes = kGatherBytes,
                                        std::size_t copy_streams = kCopyStreams) {
  return std::make_unique<CopyEngine>(make_cuda_device(0, gather_bytes, copy_streams), limits);
}

std::size_t size(std::size_t full, std::size_t small) { return quick ? small : full; }

double seconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

std::unique_ptr<HostRegion> region(std::size_t nbytes) {
  const std::string path = "/dev/shm/moevement-cuda-" + std::to_string(::getpid());
  auto made = HostRegion::create(path, nbytes, true);
  ::unlink(path.c_str());
  return made;
}

void round_trip_through_shared_memory() {
  const std::size_t nbytes = size(37 << 20, 3 << 20) + 13;
  auto engine = make_engine();
  const auto host = region(2 * nbytes);
  CHECK(engine->register_host(host->address(), 2 * nbytes));
  CHECK_THROWS(EngineError, engine->register_host(host->address(), 2 * nbytes));
  auto* bytes = reinterpret_cast<unsigned char*>(host->address());
  for (std::size_t index = 0; index < nbytes; ++index) {
    bytes[index] = static_cast<unsigned char>(index * 7 + index / 251);
  }
  const DeviceMemory device(nbytes);
  engine->copy_now({{host->address(), address(device.get()), nbytes}}, 0, "up", 60);
  // Many small pieces down, so that pieces share chunks.
  std::vector<CopyPiece> batch;
  for (std::size_t offset = 0; offset < nbytes; offset += 10007) {
    batch.push_back({address(device.get()) + offset, host->address() + nbytes + offset,
                     std::min<std::size_t>(10007, nbytes - offset)});
  }
  CHECK(engine->copy_now(batch, 0, "down", 60).bytes == nbytes);
  CHECK(std::memcmp(bytes, bytes + nbytes, nbytes) == 0);
  CHECK(engine->unregister_host(host->address()));
  CHECK(!engine->unregister_host(host->address()));
}

void copies_wait_for_the_stream_and_can_be_cancelled_meanwhile() {
  const std::size_t nbytes = 9 << 20;
  auto engine = make_engine();
  const auto host = region(2 * nbytes);
  const DeviceMemory device(nbytes);
  CUDA(cudaMemset(device.get(), 1, nbytes));
  cudaStream_t stream = nullptr;
  CUDA(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  CUDA(cudaDeviceSynchronize());
  std::atomic<bool> gate{false};
  CUDA(cudaLaunchHostFunc(stream, hold, &gate));
  CUDA(cudaMemsetAsync(device.get(), 2, nbytes, stream));
  const auto dropped = engine->submit({{address(device.get()), host->address(), nbytes}}, address(stream), "");
  const auto kept = engine->submit({{address(device.get()), host->address() + nbytes, nbytes}}, address(stream), "");
  const bool early = engine->wait(dropped, 0.1);
  const bool cancelled = engine->cancel(dropped);
  gate = true;
  CHECK(!early && cancelled && engine->wait(kept, 60));
  const auto* bytes = reinterpret_cast<const unsigned char*>(host->address());
  for (std::size_t index = 0; index < nbytes; ++index) CHECK(bytes[index] == 0 && bytes[nbytes + index] == 2);
  CUDA(cudaStreamDestroy(stream));
}

void an_error_stays_with_its_ticket() {
  auto engine = make_engine();
  const DeviceMemory device(4096);
  std::vector<unsigned char> host(1 << 20);
  // Beyond the end of the allocation: the runtime refuses the range without harm to the context.
  const auto broken = engine->submit({{address(device.get()), address(host.data()), std::uint64_t{1} << 38}}, 0, "far");
  CHECK_THROWS(EngineError, engine->wait(broken, 60));
  try {
    engine->wait(broken, 0);
  } catch (const EngineError& problem) {
    std::printf("     %s\n", problem.what());
    CHECK(std::string(problem.what()).find("copy_engine_cuda.cpp:") != std::string::npos);
  }
  CHECK(!engine->failure());
  CHECK(engine->copy_now({{address(device.get()), address(host.data()), 4096}}, 0, "", 60).bytes == 4096);
  CHECK_THROWS(EngineError, make_cuda_device(99, 0));
  CHECK_THROWS(std::invalid_argument, make_cuda_device(0, 0, 0));
  CHECK_THROWS(std::invalid_argument, make_cuda_device(0, 0, kMaxCopyStreams + 1));
}

// Tensors of torch lie in segments that the driver often puts next to each other.
void pieces_of_neighbouring_allocations_are_copied() {
  constexpr std::size_t kSegment = 4 << 20, kLarge = 3 << 20;
  std::vector<std::unique_ptr<DeviceMemory>> segments;
  std::vector<std::uint64_t> starts;
  for (int index = 0; index < 32; ++index) {
    segments.push_back(std::make_unique<DeviceMemory>(kSegment));
    starts.push_back(address(segments.back()->get()));
  }
  std::sort(starts.begin(), starts.end());
  const auto first = std::adjacent_find(starts.begin(), starts.end(),
                                        [](std::uint64_t one, std::uint64_t other) { return other - one == kSegment; });
  CHECK(first != starts.end());
  if (first == starts.end()) return;
  const std::uint64_t border = *first + kSegment;
  const auto memory = region(2 * kLarge);
  const std::uint64_t host = memory->address();
  auto engine = make_engine();
  CHECK(engine->register_host(host, 2 * kLarge));
  for (const std::uint64_t bytes : {std::uint64_t{1} << 10, std::uint64_t{kLarge}}) {
    // The last bytes of one allocation, and the first ones of the next.
    CHECK(engine->copy_now({{border - bytes, host, bytes}, {border, host + bytes, bytes}}, 0, "", 60).bytes == 2 * bytes);
    CHECK(engine->copy_now({{host, border - bytes, bytes}, {host + bytes, border, bytes}}, 0, "", 60).bytes == 2 * bytes);
  }
  // The control: in one go CUDA refuses it.
  CHECK_THROWS(EngineError, engine->copy_now({{border - kLarge, host, 2 * kLarge}}, 0, "", 60));
  engine->unregister_host(host);
}

using Bytes = std::vector<unsigned char>;

std::size_t random_size(std::mt19937_64& random) {
  switch (random() % 8) {
    case 0:
      return 2 * (random() % 40000);
    case 1:
      return random() % 70000;
    case 2:
      return quick ? 4096 : (1 << 20) - 8 + random() % 16;
    default:
      return random() % 400;
  }
}

// Pieces whose host sides follow each other, most of the time without a gap; their device sides lie anywhere.
std::vector<CopyPiece> random_pieces(std::uint64_t host, std::uint64_t device, std::size_t nbytes, bool to_host,
                                     std::mt19937_64& random) {
  std::vector<CopyPiece> batch;
  std::size_t at = random() % 64;
  while (true) {
    const std::size_t bytes = random_size(random);
    if (at + bytes > nbytes) return batch;
    const std::uint64_t there = device + random() % (nbytes - bytes);
    batch.push_back(to_host ? CopyPiece{there, host + at, bytes} : CopyPiece{host + at, there, bytes});
    at += bytes + (random() % 10 == 0 ? random() % 64 : 0);
  }
}

void apply(const std::vector<CopyPiece>& batch, const Bytes& from, std::uint64_t source, Bytes& to,
           std::uint64_t target) {
  for (const CopyPiece& item : batch) {
    std::memcpy(to.data() + (item.destination - target), from.data() + (item.source - source), item.bytes);
  }
}

Bytes on_device(const DeviceMemory& device, std::size_t nbytes) {
  Bytes bytes(nbytes);
  CUDA(cudaMemcpy(bytes.data(), device.get(), nbytes, cudaMemcpyDeviceToHost));
  return bytes;
}

// Scatters host memory, gathers it again right behind that, and compares every byte, also those in between.
void gather_and_scatter_once(CopyEngine& engine, std::uint64_t host, const DeviceMemory& device, std::size_t nbytes,
                             std::mt19937_64& random) {
  auto* bytes = reinterpret_cast<unsigned char*>(host);
  for (std::size_t index = 0; index < 2 * nbytes; index += 8) {
    const std::uint64_t word = random();
    std::memcpy(bytes + index, &word, 8);
  }
  const std::uint64_t back = host + nbytes;
  Bytes expected = on_device(device, nbytes);
  Bytes gathered(bytes + nbytes, bytes + 2 * nbytes);
  const auto up = random_pieces(host, address(device.get()), nbytes, false, random);
  const auto down = random_pieces(back, address(device.get()), nbytes, true, random);
  apply(up, Bytes(bytes, bytes + nbytes), host, expected, address(device.get()));
  apply(down, expected, address(device.get()), gathered, back);
  const auto first = engine.submit(up, 0, "up");
  const auto second = engine.submit(down, 0, "down");
  if (random() % 2 == 0) engine.hurry(second);
  CHECK(engine.wait(second, 60) && engine.done(first));
  CHECK(on_device(device, nbytes) == expected);
  CHECK(std::memcmp(bytes + nbytes, gathered.data(), nbytes) == 0);
}

void gather_and_scatter_are_right() {
  const std::size_t nbytes = size(16 << 20, 1 << 20);
  std::mt19937_64 random(4);
  const auto host = region(2 * nbytes);
  const DeviceMemory device(nbytes);
  for (const std::uint64_t gather_bytes : {kGatherBytes, std::uint64_t{1} << 20, std::uint64_t{0}}) {
    for (const std::uint64_t chunk : {std::uint64_t{4} << 20, std::uint64_t{100001}}) {
      EngineLimits limits;
      limits.chunk_bytes = chunk;
      auto engine = make_engine(limits, gather_bytes, 1 + random() % 3);
      CHECK(engine->register_host(host->address(), 2 * nbytes));
      for (std::size_t round = 0; round < size(10, 2); ++round) {
        gather_and_scatter_once(*engine, host->address(), device, nbytes, random);
        engine->set_chunks(1 + random() % (std::uint64_t{8} << 20), 1 + random() % 8);
      }
    }
  }
}

// A batch that takes tens of milliseconds, over and over to the same place.
std::vector<CopyPiece> long_batch(const DeviceMemory& device, std::uint64_t host, std::size_t nbytes) {
  return std::vector<CopyPiece>(size(64, 16), {address(device.get()), host, nbytes});
}

void a_higher_priority_overtakes() {
  const std::size_t nbytes = 64 << 20;
  auto engine = make_engine();
  const auto host = region(nbytes + (1 << 20));
  CHECK(engine->register_host(host->address(), nbytes + (1 << 20)));
  const DeviceMemory device(nbytes);
  const auto bulk = engine->submit(long_batch(device, host->address(), nbytes), 0, "bulk");
  while (engine->stats(bulk).bytes == 0) std::this_thread::yield();
  SubmitOptions urgent;
  urgent.priority = 1;
  const auto start = std::chrono::steady_clock::now();
  const auto small =
      engine->submit({{address(device.get()), host->address() + nbytes, 1 << 20}}, 0, "small", std::move(urgent));
  CHECK(engine->wait(small, 60));
  const double seconds = seconds_since(start);
  CHECK(!engine->done(bulk));
  std::printf("     1 MiB of higher priority in %.0f us, submitted in the middle of a bulk copy\n", seconds * 1e6);
  CHECK(engine->wait(bulk, 60));
}

// The median time of a read-back of 4 bytes on a stream of its own.
double read_back_seconds(const DeviceMemory& device, void* pinned, cudaStream_t stream) {
  std::vector<double> found;
  for (int count = 0; count < 21; ++count) {
    const auto start = std::chrono::steady_clock::now();
    CUDA(cudaMemcpyAsync(pinned, device.get(), 4, cudaMemcpyDeviceToHost, stream));
    CUDA(cudaStreamSynchronize(stream));
    found.push_back(seconds_since(start));
  }
  std::sort(found.begin(), found.end());
  return found[found.size() / 2];
}

void small_copies_stay_quick() {
  const std::size_t nbytes = 64 << 20;
  const auto host = region(nbytes);
  const DeviceMemory device(nbytes);
  void* pinned = nullptr;
  cudaStream_t stream = nullptr;
  CUDA(cudaMallocHost(&pinned, 4));
  CUDA(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  auto engine = make_engine();
  CHECK(engine->register_host(host->address(), nbytes));
  std::printf("     4 bytes read back: %.0f us alone", read_back_seconds(device, pinned, stream) * 1e6);
  for (const std::uint64_t mib : {1, 4, 16}) {
    engine->set_chunks(mib << 20, 2);
    const auto bulk = engine->submit(long_batch(device, host->address(), nbytes), 0, "bulk");
    while (engine->stats(bulk).bytes == 0) std::this_thread::yield();
    const double seconds = read_back_seconds(device, pinned, stream);
    std::printf(", %.0f us beside a bulk copy in chunks of %d MiB%s", seconds * 1e6, static_cast<int>(mib),
                engine->done(bulk) ? " (which ended first)" : "");
    engine->cancel(bulk);
  }
  std::printf("\n");
  CUDA(cudaStreamDestroy(stream));
  CUDA(cudaFreeHost(pinned));
}

double copy_rate(CopyEngine& engine, const std::vector<CopyPiece>& batch) {
  double best = 0;
  for (int round = 0; round < 3; ++round) {
    const auto stats = engine.copy_now(batch, 0, "", 60);
    best = std::max(best, static_cast<double>(stats.bytes) / stats.copy_seconds / 1e9);
  }
  return best;
}

double plain_rate(const void* device, void* host, std::size_t nbytes) {
  double best = 0;
  for (int round = 0; round < 3; ++round) {
    const auto start = std::chrono::steady_clock::now();
    CUDA(cudaMemcpy(host, device, nbytes, cudaMemcpyDeviceToHost));
    best = std::max(best, static_cast<double>(nbytes) / seconds_since(start) / 1e9);
  }
  return best;
}

void bandwidth_of_small_pieces() {
  const std::size_t nbytes = size(std::size_t{1} << 30, 8 << 20);
  const std::size_t piece = 64 << 10, stride = piece + 256;
  const auto host = region(nbytes);
  const DeviceMemory device(nbytes / piece * stride);
  std::vector<CopyPiece> down, up;
  for (std::size_t index = 0; index < nbytes / piece; ++index) {
    const std::uint64_t there = address(device.get()) + index * stride, here = host->address() + index * piece;
    down.push_back({there, here, piece});
    up.push_back({here, there, piece});
  }
  for (const std::uint64_t gather_bytes : {kGatherBytes, std::uint64_t{0}}) {
    auto engine = make_engine({}, gather_bytes);
    CHECK(engine->register_host(host->address(), nbytes));
    auto* bytes = reinterpret_cast<void*>(host->address());
    if (gather_bytes != 0) {
      std::printf("     plain pinned copy: %.1f GB/s, ", plain_rate(device.get(), bytes, nbytes));
      std::printf("bulk: %.1f GB/s\n", copy_rate(*engine, {{address(device.get()), host->address(), nbytes}}));
    }
    std::printf("     pieces of 64 KiB, %s: %.1f GB/s to the host, %.1f GB/s to the device\n",
                gather_bytes != 0 ? "gathered" : "one by one", copy_rate(*engine, down), copy_rate(*engine, up));
  }
}

void bandwidth() {
  const std::size_t nbytes = size(std::size_t{2} << 30, 32 << 20);
  const auto host = region(nbytes);
  const DeviceMemory device(nbytes);
  for (const std::uint64_t mib : {1, 4, 16}) {
    for (const std::size_t slots : {1, 2, 4}) {
      EngineLimits limits;
      limits.chunk_bytes = mib << 20;
      limits.chunks_in_flight = slots;
      auto engine = make_engine(limits);
      CHECK(engine->register_host(host->address(), nbytes));
      const double best = copy_rate(*engine, {{address(device.get()), host->address(), nbytes}});
      std::printf("     %2d MiB chunks, %d in flight: %.1f GB/s device to host\n", static_cast<int>(mib),
                  static_cast<int>(slots), best);
    }
  }
}

}  // namespace

int main(int count, char** arguments) {
  quick = count > 1 && std::string(arguments[1]) == "--quick";
  const int failed = RUN(round_trip_through_shared_memory) +
                     RUN(copies_wait_for_the_stream_and_can_be_cancelled_meanwhile) +
                     RUN(an_error_stays_with_its_ticket) +
                     RUN(pieces_of_neighbouring_allocations_are_copied) + RUN(gather_and_scatter_are_right) +
                     RUN(a_higher_priority_overtakes) + RUN(small_copies_stay_quick) + RUN(bandwidth_of_small_pieces) +
                     RUN(bandwidth) + test_cuda_pace() + test_cuda_digests(quick) +
                     test_cuda_fingerprint();
  return failed == 0 ? 0 : 1;
}
