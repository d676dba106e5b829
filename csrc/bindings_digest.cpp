// Python's DigestPool.
#include <pybind11/stl.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "bindings.h"
#include "digest_pool.h"

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

}  // namespace

void bind_digests(py::module_& module) {
  module.attr("DIGEST_CHUNK_BYTES") = kDigestChunkBytes;
  py::class_<DigestPool, PoolPointer>(module, "DigestPool", py::release_gil_before_calling_cpp_dtor(),
                                      R"(Digests memory with native threads (1 to 64), without the GIL.

A range's digest is the XXH3-128 (16 bytes, big-endian) of the XXH3-128 digests, one after the other, of its chunks of
DIGEST_CHUNK_BYTES; the last one is shorter, and an empty range has none. Raises ValueError, EngineError when the system
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
