// A pause of the copy engine that begins where a stream on a GPU is.
#include <atomic>
#include <vector>

#include "copy_engine.h"
#include "on_cuda.h"
#include "suites.h"

using namespace moevement;

namespace {

void a_pause_begins_where_its_stream_is() {
  const std::size_t nbytes = 1 << 20;
  EngineLimits limits;
  limits.longest_pause_seconds = 60;
  CopyEngine engine(make_cuda_device(0, 0), limits);
  std::vector<unsigned char> host(nbytes);
  void* device = nullptr;
  cudaStream_t stream = nullptr;
  CUDA(cudaMalloc(&device, nbytes));
  CUDA(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  std::atomic<bool> gate{false};
  CUDA(cudaLaunchHostFunc(stream, hold, &gate));
  const auto pause = engine.pause(address(stream));
  const auto copy = [&] { return engine.submit({{address(device), address(host.data()), nbytes}}, 0, ""); };
  const bool before = engine.wait(copy(), 60);
  gate = true;
  CUDA(cudaStreamSynchronize(stream));
  const auto held = copy();
  const bool meanwhile = engine.wait(held, 0.1);
  engine.resume(pause);
  CHECK(before && !meanwhile && engine.wait(held, 60));
  CUDA(cudaStreamDestroy(stream));
  CUDA(cudaFree(device));
}

}  // namespace

int test_cuda_pace() { return RUN(a_pause_begins_where_its_stream_is); }
