// Python's DigestPool and DeviceDigests.
#include <pybind11/stl.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "bindings.h"
#include "device_digests.h"
#include "digest_pool.h"
#include "fingerprint.h"

namespace moevement {
namespace {

using PoolPointer = std::unique_ptr<DigestPool, DeleteInOwner>;

std::vector<DigestRange> make_ranges(const py::buffer& addresses, const py::buffer& sizes) {
  const Words from(addresses, "addresses");
  const Words bytes(sizes, "sizes");
  if (from.size() != bytes.size()) {
    throw std::invalid_argument("addresses and sizes differ in length: " + std::to_string(from.size()) + ", " +
                                std::to_string(bytes.size()) + MOEVEMENT_HERE);
  }
  std::vector<DigestRange> ranges(from.size());
  for (std::size_t index = 0; index < ranges.size(); ++index) ranges[index] = {from[index], bytes[index]};
  return ranges;
}

std::uint64_t submit(DigestPool& self, const py::buffer& addresses, const py::buffer& sizes) {
  const auto ranges = make_ranges(addresses, sizes);
  const py::gil_scoped_release release;
  return self.submit(ranges);
}

std::optional<py::bytes> wait(DigestPool& self, std::uint64_t ticket, double timeout_seconds) {
  std::optional<std::string> found;
  {
    const py::gil_scoped_release release;
    found = self.wait(ticket, timeout_seconds, poll_signals);
  }
  return found ? std::optional<py::bytes>(*found) : std::nullopt;
}

py::bytes digest(DigestPool& self, std::uint64_t address, std::uint64_t nbytes) {
  std::string found;
  {
    const py::gil_scoped_release release;
    found = self.digest(address, nbytes, poll_signals);
  }
  return py::bytes(found);
}

using DevicePointer = std::unique_ptr<DeviceDigests, DeleteInOwner>;

DevicePointer make_device_digests(const std::string& device, int device_index, std::uint64_t ranges_limit,
                                  std::uint64_t bytes_limit, std::uint32_t blocks) {
  const DigestLimits limits{ranges_limit, bytes_limit};
  const DigestRoom room = digest_room(limits);
  std::unique_ptr<DigestDevice> digester;
  if (device == "cpu") {
    digester = make_cpu_digest_device(room);
  } else if (device == "cuda") {
    digester = make_cuda_digest_device(device_index, room);
  } else {
    throw std::invalid_argument("device must be 'cpu' or 'cuda', got '" + device + "'" + MOEVEMENT_HERE);
  }
  return DevicePointer(new DeviceDigests(std::move(digester), limits, blocks));
}

std::uint64_t submit_to_device(DeviceDigests& self, const py::buffer& addresses, const py::buffer& sizes,
                               std::uint64_t stream, std::string label) {
  const auto ranges = make_ranges(addresses, sizes);
  const py::gil_scoped_release release;
  return self.submit(ranges, stream, std::move(label));
}

std::optional<py::bytes> wait_for_device(DeviceDigests& self, std::uint64_t ticket, double timeout_seconds) {
  std::optional<std::string> found;
  {
    const py::gil_scoped_release release;
    found = self.wait(ticket, timeout_seconds, poll_signals);
  }
  return found ? std::optional<py::bytes>(*found) : std::nullopt;
}

void bind_device_digests(py::module_& module) {
  py::class_<DeviceDigests, DevicePointer>(module, "DeviceDigests", py::release_gil_before_calling_cpp_dtor(),
                                           R"(Digests device memory where it lies, without the GIL: the digests of DigestPool.

device: 'cuda', whose kernel runs on a stream of its own, or 'cpu', which digests host memory at submit with the same
code. One batch at a time, of up to ranges_limit ranges of bytes_limit bytes together: memory for it is taken at once,
that of the device (device_bytes) and pinned host memory. blocks: blocks of 1024 threads on the GPU, 1 to 65535.
Raises ValueError for limits out of range, EngineError when 'cuda' is asked for and there is none, or no nvcc was there.
It belongs to the process that made it; in a fork its methods raise EngineError.
)")
      .def(py::init(&make_device_digests), py::arg("device") = "cpu", py::arg("device_index") = 0, py::kw_only(),
           py::arg("ranges_limit"), py::arg("bytes_limit"), py::arg("blocks") = kDigestBlocks, ReleaseGil())
      .def("submit", &submit_to_device, py::arg("addresses"), py::arg("sizes"), py::arg("stream") = 0,
           py::arg("label") = "",
           R"(Start to digest ranges behind the work given to stream so far; returns a ticket (1, 2, ...).

addresses (on the device) and sizes (bytes): 1-D contiguous uint64 buffers of one length. stream: handle of a CUDA
stream, 0 is the default one. label is named in errors. The memory must stay allocated until the next submit or close
returns, and unchanged until wait() has given digests. Raises ValueError for bad buffers, a null address, and beyond the
limits; EngineError when the batch before is not over or neither waited for nor cancelled, after close(), and for errors
of the device.)")
      .def("wait", &wait_for_device, py::arg("ticket"), py::arg("timeout_seconds"),
           R"(The digests, 16 bytes per range in order, or None when timeout_seconds (0 to 1e8) pass first.

May be asked for again until the next submit. Raises EngineError when cancelled or failed, KeyError when unknown.)")
      .def("seconds", &DeviceDigests::seconds, py::arg("ticket"), ReleaseGil(),
           "Seconds that the device digested for a ticket that wait() gave. EngineError when not done, KeyError.")
      .def("cancel", &DeviceDigests::cancel, py::arg("ticket"), ReleaseGil(),
           R"(Give up a ticket, without waiting: the device may go on to read its memory until the next submit returns.

True when the ticket is cancelled, False when it was done or failed before. KeyError when unknown or dropped.)")
      .def("set_blocks", &DeviceDigests::set_blocks, py::arg("blocks"), ReleaseGil(),
           "Change the blocks for batches from now on. Raises ValueError.")
      .def_property_readonly("device_bytes", &DeviceDigests::device_bytes, "Bytes of the device's memory in use.")
      .def("close", &DeviceDigests::close, ReleaseGil(),
           "Wait for the device, 10 s at most, and give memory back; a second call does nothing.")
      .def_property_readonly("closed", py::cpp_function(&DeviceDigests::closed, ReleaseGil()),
                             "Whether close() was called.")
      .def("__enter__", [](py::object self) { return self; })
      .def("__exit__", [](DeviceDigests& self, const py::args&) {
        const py::gil_scoped_release release;
        self.close();
      });
}

}  // namespace

void bind_digests(py::module_& module) {
  module.attr("DIGEST_LEAF_BYTES") = kDigestLeafBytes;
  module.def("fingerprint", &fingerprint, py::arg("address"), py::arg("nbytes"), ReleaseGil(),
             R"(The fingerprint of nbytes bytes of host memory, 0 to 2^64 - 1: a multilinear hash.

The number of bytes, and every 32-bit word (signed, little-endian; the last one filled up with zeros) times an odd key of
its place, modulo 2^64. The address need not be aligned.)");
  module.def("add_fingerprint", &add_fingerprint, py::arg("device_index"), py::arg("address"), py::arg("nbytes"),
             py::arg("result"), py::arg("stream"), ReleaseGil(),
             R"(Add the fingerprint of memory of a GPU to the 64-bit number at result there, behind the work of stream.

Nobody waits. stream: handle of a CUDA stream of the device, 0 is the default one. The memory must stay allocated for the
stream. Raises EngineError when the GPU refuses, and in a build without kernels (build_info().gather).)");
  bind_device_digests(module);
  py::class_<DigestPool, PoolPointer>(module, "DigestPool", py::release_gil_before_calling_cpp_dtor(),
                                      R"(Digests memory with native threads (1 to 64), without the GIL.

A range's digest is the XXH3-128 (16 bytes, big-endian) of the XXH3-128 digests, one after the other, of its leaves of
DIGEST_LEAF_BYTES; the last one is shorter, and an empty range has none. Raises ValueError, EngineError when the system
has no threads left. A pool belongs to the process that made it; in a fork its methods raise EngineError.
)")
      .def(py::init([](std::size_t threads) { return PoolPointer(new DigestPool(threads)); }), py::arg("threads") = 1,
           ReleaseGil())
      .def("submit", &submit, py::arg("addresses"), py::arg("sizes"),
           R"(Queue ranges; returns a ticket (1, 2, ...).

addresses and sizes (bytes): 1-D contiguous uint64 buffers of one length. The memory must stay mapped, and unchanged,
until the ticket is finished. Raises ValueError for bad buffers or a null address; EngineError when 8 tickets are
unfinished and after close().)")
      .def("wait", &wait, py::arg("ticket"), py::arg("timeout_seconds"),
           R"(The digests, 16 bytes per range in order, or None when timeout_seconds (0 to 1e8) pass first.

May be asked for again while the ticket is among the last 64 that finished. Raises EngineError when it is cancelled,
KeyError when it is unknown or dropped.)")
      .def("cancel", &DigestPool::cancel, py::arg("ticket"), ReleaseGil(),
           R"(Drop what is not digested; returns when no thread reads the ticket's memory.

True when the ticket is cancelled, False when it was done before. KeyError when unknown or dropped.)")
      .def("digest", &digest, py::arg("address"), py::arg("nbytes"),
           R"(The digest (16 bytes) of one range of nbytes bytes, before all that is queued, with all threads.

Raises ValueError for a null address, EngineError after close().)")
      .def_property_readonly("threads", &DigestPool::threads, "How many threads the pool has.")
      .def("close", &DigestPool::close, ReleaseGil(),
           "Cancel what is not finished and end the threads; a second call does nothing. Finished digests stay.")
      .def_property_readonly("closed", py::cpp_function(&DigestPool::closed, ReleaseGil()),
                             "Whether close() was called.")
      .def("__enter__", [](py::object self) { return self; })
      .def("__exit__", [](DigestPool& self, const py::args&) {
        const py::gil_scoped_release release;
        self.close();
      });
}

}  // namespace moevement
