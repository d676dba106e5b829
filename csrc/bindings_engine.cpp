// Python's CopyEngine.
#include <pybind11/stl.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "bindings.h"
#include "copy_engine.h"

namespace moevement {
namespace {

std::vector<CopyPiece> make_batch(const py::buffer& sources, const py::buffer& destinations, const py::buffer& sizes) {
  const Words from(sources, "sources");
  const Words to(destinations, "destinations");
  const Words bytes(sizes, "sizes");
  if (from.size() != to.size() || from.size() != bytes.size()) {
    throw std::invalid_argument("sources, destinations and sizes differ in length: " + std::to_string(from.size()) +
                                ", " + std::to_string(to.size()) + ", " + std::to_string(bytes.size()) +
                                MOEVEMENT_HERE);
  }
  std::vector<CopyPiece> batch(from.size());
  for (std::size_t index = 0; index < batch.size(); ++index) batch[index] = {from[index], to[index], bytes[index]};
  return batch;
}

std::unique_ptr<CopyEngine, DeleteInOwner> make_engine(const std::string& device, int device_index,
                                                       std::uint64_t chunk_bytes, std::size_t chunks_in_flight,
                                                       std::size_t max_queued_tickets, std::size_t max_finished_tickets,
                                                       double bytes_per_second_limit,
                                                       std::size_t burst_chunks_in_flight,
                                                       std::uint64_t max_chunk_bytes,
                                                       std::uint64_t gather_bytes_limit, std::size_t copy_streams) {
  const EngineLimits limits{chunk_bytes,          chunks_in_flight,       max_queued_tickets,
                            max_finished_tickets, bytes_per_second_limit, burst_chunks_in_flight,
                            max_chunk_bytes};
  check_limits(limits);
  std::unique_ptr<CopyDevice> copier;
  if (device == "cpu") {
    copier = make_cpu_device();
  } else if (device == "cuda") {
    copier = make_cuda_device(device_index, gather_bytes_limit, copy_streams);
  } else {
    throw std::invalid_argument("device must be 'cpu' or 'cuda', got '" + device + "'" + MOEVEMENT_HERE);
  }
  return std::unique_ptr<CopyEngine, DeleteInOwner>(new CopyEngine(std::move(copier), limits));
}

void bind_stats(py::module_& module) {
  py::class_<CopyStats>(module, "CopyStats", "How much a ticket copied, and how long that took.")
      .def_readonly("bytes", &CopyStats::bytes, "Bytes copied so far.")
      .def_readonly("total_bytes", &CopyStats::total_bytes, "Bytes asked for.")
      .def_readonly("copy_seconds", &CopyStats::copy_seconds, "Seconds from the first chunk's start to the finish.")
      .def_readonly("queue_seconds", &CopyStats::queue_seconds, "Seconds from submit to the first chunk's start.")
      .def("__repr__", [](const CopyStats& self) {
        return "CopyStats(bytes=" + std::to_string(self.bytes) + ", total_bytes=" + std::to_string(self.total_bytes) +
               ", copy_seconds=" + std::to_string(self.copy_seconds) +
               ", queue_seconds=" + std::to_string(self.queue_seconds) + ")";
      });
}

using EngineClass = py::class_<CopyEngine, std::unique_ptr<CopyEngine, DeleteInOwner>>;

using Groups = std::vector<std::pair<std::string, std::uint64_t>>;

SubmitOptions make_options(int priority, double spread_seconds, const std::optional<Groups>& groups) {
  SubmitOptions options;
  options.priority = priority;
  options.spread_seconds = spread_seconds;
  if (groups) {
    for (const auto& [name, pieces] : *groups) options.groups.push_back({name, pieces});
  }
  return options;
}

void bind_submits(EngineClass& engine) {
  engine
      .def(
          "submit",
          [](CopyEngine& self, const py::buffer& sources, const py::buffer& destinations, const py::buffer& sizes,
             std::uint64_t stream, std::string label, int priority, double spread_seconds,
             const std::optional<Groups>& groups) {
            auto batch = make_batch(sources, destinations, sizes);
            auto options = make_options(priority, spread_seconds, groups);
            const py::gil_scoped_release release;
            return self.submit(std::move(batch), stream, std::move(label), std::move(options));
          },
          py::arg("sources"), py::arg("destinations"), py::arg("sizes"), py::arg("stream") = 0, py::arg("label") = "",
          py::arg("priority") = 0, py::arg("spread_seconds") = 0.0, py::arg("groups") = py::none(),
          R"(Queue a batch of copies, made in order; returns its ticket (1, 2, ...).

sources, destinations (addresses) and sizes (bytes): 1-D contiguous uint64 buffers of one length, all in one direction
between host and device. stream: handle of the CUDA stream whose work so far the copies wait for; 0 is the device's
default stream. label is named in errors. priority: 0 to 7; a ticket of higher priority is taken first, between two
chunks of others; tickets of one priority take turns in the order of their numbers. spread_seconds (0 to 1e8): be
done about so long after this call, at an even pace that rises when the ticket was held up; 0 is as fast as the link
goes. groups: (name, number of pieces) pairs that cover the pieces in
order; an error names the groups that it met.
The memory must stay alive, and the sources unchanged, until the ticket is finished.
Raises ValueError for bad buffers, options out of range, groups that do not cover the pieces, a null address, or a piece
whose source and destination overlap; EngineError when max_queued_tickets are unfinished, after close(), and after the
engine ended by a device error.)")
      .def(
          "copy_now",
          [](CopyEngine& self, const py::buffer& sources, const py::buffer& destinations, const py::buffer& sizes,
             std::uint64_t stream, std::string label, double timeout_seconds) {
            auto batch = make_batch(sources, destinations, sizes);
            const py::gil_scoped_release release;
            return self.copy_now(std::move(batch), stream, std::move(label), timeout_seconds, poll_signals);
          },
          py::arg("sources"), py::arg("destinations"), py::arg("sizes"), py::arg("stream") = 0, py::arg("label") = "",
          py::arg("timeout_seconds") = 600.0,
          R"(Submit a batch, hurry it and wait for it; any direction between host and device. It takes its turn in the queue.

Raises as submit does, and EngineError when the copy fails, is cancelled or takes longer than timeout_seconds; nothing
is in flight after it returns or raises.)");
}

void bind_tickets(EngineClass& engine) {
  engine
      .def("done", &CopyEngine::done, py::arg("ticket"), ReleaseGil(),
           "Whether all bytes are copied; False when cancelled. EngineError when it failed, KeyError when unknown.")
      .def(
          "wait",
          [](CopyEngine& self, std::uint64_t ticket, double timeout_seconds) {
            return self.wait(ticket, timeout_seconds, poll_signals);
          },
          py::arg("ticket"), py::arg("timeout_seconds"), ReleaseGil(),
          R"(Wait until the ticket is done or cancelled; False when timeout_seconds (0 to 1e8) pass first.

Raises EngineError when the copy failed, KeyError when the ticket is unknown or its record is dropped.)")
      .def("cancel", &CopyEngine::cancel, py::arg("ticket"), ReleaseGil(),
           R"(Drop the chunks that are not started; returns when none of the ticket is in flight.

True when the ticket is cancelled, False when it was done or failed before. KeyError when unknown.)")
      .def(
          "state",
          [](const CopyEngine& self, std::uint64_t ticket) { return state_name(self.state(ticket)); },
          py::arg("ticket"), ReleaseGil(),
          "'queued', 'running', 'done', 'cancelled' or 'failed'. KeyError when unknown or dropped.")
      .def("stats", &CopyEngine::stats, py::arg("ticket"), ReleaseGil(),
           "Bytes and seconds of a ticket, up to now when it is unfinished. KeyError when unknown or dropped.");
}

void bind_pace(EngineClass& engine) {
  engine
      .def("hurry", &CopyEngine::hurry, py::arg("ticket"), ReleaseGil(),
           R"(Say that you are about to wait for a ticket: end its spreading, and that of those before it.

It and the tickets before it of its priority are not spread out nor paused any more, and have burst_chunks_in_flight
chunks in flight; bytes_per_second_limit stays.

Does nothing for a finished ticket. KeyError when unknown or dropped.)")
      .def("pause", &CopyEngine::pause, py::arg("stream") = py::none(), ReleaseGil(),
           R"(Hint that a small copy of somebody else will be awaited; pauses may overlap. Returns what resume takes.

Tickets of priority 0 that nobody hurries start no chunk until resume(), or for 5 ms, whichever is first. stream: handle
of a CUDA stream; the pause begins when the device is through with what the stream was given so far. None: at once.
Raises EngineError when the device can't record that.)")
      .def("resume", &CopyEngine::resume, py::arg("pause"), ReleaseGil(),
           "End a pause, begun or not; nothing happens when it is over.")
      .def("set_chunks", &CopyEngine::set_chunks, py::arg("chunk_bytes"), py::arg("chunks_in_flight"),
           ReleaseGil(),
           R"(Change the bytes of a chunk and how many are in flight, for chunks started from now on.

Raises ValueError unless chunk_bytes is 1 to max_chunk_bytes and chunks_in_flight 1 to 64.)");
}

}  // namespace

void bind_engine(py::module_& module) {
  bind_stats(module);
  EngineClass engine(module, "CopyEngine", py::release_gil_before_calling_cpp_dtor(),
                     R"(Copies batches of memory pieces, by priority and in small chunks, with one native thread.

device: 'cpu' or 'cuda'. chunk_bytes: bytes a chunk. chunks_in_flight: chunks started and not over, of all tickets.
max_queued_tickets: unfinished tickets, running ones included. max_finished_tickets: finished tickets that can
still be asked for; older ones are dropped. bytes_per_second_limit: 0 is none. burst_chunks_in_flight: chunks in flight
for hurried tickets, if that is more than chunks_in_flight (64 at most). max_chunk_bytes: the most that set_chunks may ask for; a
larger chunk_bytes raises it. gather_bytes_limit: device memory through which small pieces travel together, 0 is none.
copy_streams: CUDA streams on which chunks take turns (1 to 8), each chunk behind the one before; with one only, other
copies of the process can be held up until the engine is idle.
Raises ValueError for limits out of range, EngineError when 'cuda' is asked for and there is none.
An engine belongs to the process that made it; in a fork its methods raise EngineError.
)");
  engine.def(py::init(&make_engine), py::arg("device") = "cpu", py::arg("device_index") = 0, py::kw_only(),
             py::arg("chunk_bytes") = EngineLimits{}.chunk_bytes,
             py::arg("chunks_in_flight") = EngineLimits{}.chunks_in_flight,
             py::arg("max_queued_tickets") = EngineLimits{}.max_queued_tickets,
             py::arg("max_finished_tickets") = EngineLimits{}.max_finished_tickets,
             py::arg("bytes_per_second_limit") = 0.0,
             py::arg("burst_chunks_in_flight") = EngineLimits{}.burst_chunks_in_flight,
             py::arg("max_chunk_bytes") = EngineLimits{}.max_chunk_bytes,
             py::arg("gather_bytes_limit") = std::uint64_t{32} << 20, py::arg("copy_streams") = kCopyStreams,
             ReleaseGil());
  bind_submits(engine);
  bind_tickets(engine);
  bind_pace(engine);
  engine
      .def("register_host", &CopyEngine::register_host, py::arg("address"), py::arg("nbytes"), ReleaseGil(),
           R"(Pin host memory until unregister_host or close(); False on the CPU engine, where it means nothing.

Unregister before the memory is unmapped. Raises ValueError for a null address or 0 bytes; EngineError.)")
      .def("unregister_host", &CopyEngine::unregister_host, py::arg("address"), ReleaseGil(),
           "Unpin memory that this engine pinned; False when it did not.")
      .def("close", &CopyEngine::close, ReleaseGil(),
           "Cancel what is not finished and end the thread; a second call does nothing. Finished tickets stay.")
      .def_property_readonly("closed", py::cpp_function(&CopyEngine::closed, ReleaseGil()),
                             "Whether close() was called.")
      .def_property_readonly("failure", py::cpp_function(&CopyEngine::failure, ReleaseGil()),
                             "Why the engine ended by itself, or None.")
      .def("__enter__", [](py::object self) { return self; })
      .def("__exit__", [](CopyEngine& self, const py::args&) {
        const py::gil_scoped_release release;
        self.close();
      });
}

}  // namespace moevement
