// Fingerprints of a GPU's memory against those of the host, at every alignment, behind the work of a stream.
#include <random>
#include <vector>

#include "cuda_support.h"
#include "fingerprint.h"
#include "on_cuda.h"
#include "suites.h"

using namespace moevement;

namespace {

void fingerprints_on_the_gpu_equal_those_of_the_host() {
  std::mt19937_64 random(21);
  std::vector<unsigned char> host(9 << 20);
  for (unsigned char& one : host) one = static_cast<unsigned char>(random());
  const DeviceMemory memory(host.size());
  const DeviceMemory result(8);
  const SideStream stream(StreamPriority::least);
  const auto handle = address(stream.get());
  for (int round = 0; round < 40; ++round) {
    const std::uint64_t skew = round % 2 == 0 ? 0 : random() % 64;
    // More words than a block has keys for, and few.
    const std::uint64_t bytes = round < 4 ? host.size() - skew : random() % (round < 20 ? 300 : 1 << 20);
    CUDA(cudaMemsetAsync(reinterpret_cast<void*>(result.address()), 0, 8, stream.get()));
    CUDA(cudaMemcpyAsync(reinterpret_cast<void*>(memory.address()), host.data(), host.size(), cudaMemcpyHostToDevice,
                         stream.get()));
    add_fingerprint(0, memory.address() + skew, bytes, result.address(), handle);
    std::uint64_t found = 0;
    CUDA(cudaMemcpyAsync(&found, reinterpret_cast<void*>(result.address()), 8, cudaMemcpyDeviceToHost, stream.get()));
    CUDA(cudaStreamSynchronize(stream.get()));
    CHECK(found == fingerprint(address(host.data()) + skew, bytes));
  }
}

}  // namespace

int test_cuda_fingerprint() { return RUN(fingerprints_on_the_gpu_equal_those_of_the_host); }
