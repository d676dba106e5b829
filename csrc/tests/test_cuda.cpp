// The copy engine on a GPU: contents both ways, the fence on a stream, pinned shared memory, errors, bandwidth.
#include <cuda_runtime_api.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

#include "check.h"
#include "copy_engine.h"
#include "host_region.h"

using namespace moevement;

namespace {

#define CUDA(call) CHECK((call) == cudaSuccess)

std::uint64_t address(const void* pointer) { return reinterpret_cast<std::uintptr_t>(pointer); }

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

std::unique_ptr<CopyEngine> make_engine(EngineLimits limits = {}) {
  return std::make_unique<CopyEngine>(make_cuda_device(0, limits.chunks_in_flight), limits);
}

std::unique_ptr<HostRegion> region(std::size_t nbytes) {
  const std::string path = "/dev/shm/moevement-cuda-" + std::to_string(::getpid());
  auto made = HostRegion::create(path, nbytes, true);
  ::unlink(path.c_str());
  return made;
}

void round_trip_through_shared_memory() {
  const std::size_t nbytes = 37 * 1024 * 1024 + 13;
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

struct Gate {
  std::atomic<bool> open{false};
};

void CUDART_CB hold_stream(void* gate) {
  while (!static_cast<Gate*>(gate)->open) std::this_thread::sleep_for(std::chrono::milliseconds(1));
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
  Gate gate;
  CUDA(cudaLaunchHostFunc(stream, hold_stream, &gate));
  CUDA(cudaMemsetAsync(device.get(), 2, nbytes, stream));
  const auto dropped = engine->submit({{address(device.get()), host->address(), nbytes}}, address(stream), "");
  const auto kept = engine->submit({{address(device.get()), host->address() + nbytes, nbytes}}, address(stream), "");
  const bool early = engine->wait(dropped, 0.1);
  const bool cancelled = engine->cancel(dropped);
  gate.open = true;
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
  const auto broken = engine->submit({{address(device.get()), address(host.data()), std::uint64_t{1} << 40}}, 0, "far");
  CHECK_THROWS(EngineError, engine->wait(broken, 60));
  try {
    engine->wait(broken, 0);
  } catch (const EngineError& problem) {
    std::printf("     %s\n", problem.what());
    CHECK(std::string(problem.what()).find("copy_engine_cuda.cpp:") != std::string::npos);
  }
  CHECK(!engine->failure());
  CHECK(engine->copy_now({{address(device.get()), address(host.data()), 4096}}, 0, "", 60).bytes == 4096);
  CHECK_THROWS(EngineError, make_cuda_device(99, 2));
}

void bandwidth() {
  const std::size_t nbytes = std::size_t{2} << 30;
  const auto host = region(nbytes);
  const DeviceMemory device(nbytes);
  for (const std::uint64_t mib : {1, 4, 16}) {
    for (const std::size_t slots : {1, 2, 4}) {
      EngineLimits limits;
      limits.chunk_bytes = mib << 20;
      limits.chunks_in_flight = slots;
      auto engine = make_engine(limits);
      CHECK(engine->register_host(host->address(), nbytes));
      double best = 0;
      for (int round = 0; round < 3; ++round) {
        const auto stats = engine->copy_now({{address(device.get()), host->address(), nbytes}}, 0, "", 60);
        best = std::max(best, static_cast<double>(stats.bytes) / stats.copy_seconds / 1e9);
      }
      std::printf("     %2d MiB chunks, %d in flight: %.1f GB/s device to host\n", static_cast<int>(mib),
                  static_cast<int>(slots), best);
    }
  }
}

}  // namespace

int main() {
  const int failed = RUN(round_trip_through_shared_memory) +
                     RUN(copies_wait_for_the_stream_and_can_be_cancelled_meanwhile) +
                     RUN(an_error_stays_with_its_ticket) + RUN(bandwidth);
  return failed == 0 ? 0 : 1;
}
