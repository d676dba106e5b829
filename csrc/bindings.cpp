// The only file of the core that sees Python: it checks buffers, translates errors and lets go of the GIL.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <pybind11/stl/filesystem.h>

#include <cstring>
#include <filesystem>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "copy_engine.h"
#include "errors.h"
#include "host_region.h"

namespace py = pybind11;
using moevement::CopyDevice;
using moevement::CopyEngine;
using moevement::CopyPiece;
using moevement::CopyStats;
using moevement::EngineLimits;
using moevement::HostRegion;

namespace {

using ReleaseGil = py::call_guard<py::gil_scoped_release>;

// A fork has no worker thread to join and may have inherited a locked mutex: it leaks its copy of the engine.
struct DeleteInOwner {
  void operator()(CopyEngine* engine) const {
    if (engine->in_owner_process()) delete engine;
  }
};

// Lets Ctrl-C end a call that waits without the GIL.
void poll_signals() {
  const py::gil_scoped_acquire gil;
  if (PyErr_CheckSignals() != 0) throw py::error_already_set();
}

void raise_os_error(const moevement::OsError& problem) {
  // OSError picks FileNotFoundError and its kin by the errno when it is called, not when it is set by type.
  const py::object error = py::reinterpret_steal<py::object>(
      PyObject_CallFunction(PyExc_OSError, "iss", problem.code(), problem.what(), problem.path().c_str()));
  if (error) PyErr_SetObject(reinterpret_cast<PyObject*>(Py_TYPE(error.ptr())), error.ptr());
}

void register_errors(py::module_& module) {
  py::register_exception<moevement::EngineError>(module, "EngineError", PyExc_RuntimeError)
      .attr("__doc__") = "A copy, or its engine, cannot do what is asked. The message names file and line.";
  py::register_exception_translator([](std::exception_ptr pointer) {
    try {
      if (pointer) std::rethrow_exception(pointer);
    } catch (const moevement::OsError& problem) {
      raise_os_error(problem);
    } catch (const moevement::ClosedError& problem) {
      PyErr_SetString(PyExc_ValueError, problem.what());
    } catch (const moevement::InUseError& problem) {
      PyErr_SetString(PyExc_BufferError, problem.what());
    } catch (const moevement::UnknownTicket& problem) {
      PyErr_SetString(PyExc_KeyError, problem.what());
    }
  });
}

// -- host region -----------------------------------------------------------------------------------------------------

int get_region_buffer(PyObject* object, Py_buffer* view, int flags) {
  view->obj = nullptr;
  auto& region = py::cast<HostRegion&>(py::handle(object));
  if (region.closed()) {
    PyErr_SetString(PyExc_ValueError, "the host region is closed");
    return -1;
  }
  auto* address = reinterpret_cast<void*>(region.address());
  const auto nbytes = static_cast<Py_ssize_t>(region.nbytes());
  if (PyBuffer_FillInfo(view, object, address, nbytes, region.writable() ? 0 : 1, flags) != 0) return -1;
  region.add_view();
  return 0;
}

void release_region_buffer(PyObject* object, Py_buffer*) { py::cast<HostRegion&>(py::handle(object)).drop_view(); }

// Not pybind11's own buffer protocol: that one does not tell when a view ends, and close() must know.
void set_region_buffer(PyHeapTypeObject* type) {
  type->as_buffer.bf_getbuffer = get_region_buffer;
  type->as_buffer.bf_releasebuffer = release_region_buffer;
  type->ht_type.tp_as_buffer = &type->as_buffer;
}

void bind_region(py::module_& module) {
  py::class_<HostRegion>(module, "HostRegion", py::custom_type_setup(set_region_buffer),
                         R"(A file mapped into memory and shared; its bytes outlive the process that wrote them.

Supports the buffer protocol (bytes; read-only when mapped read-only). A library that takes the address of the buffer
and lets go of the view, as torch.frombuffer does, must be given memoryview(region): the view holds close() off.
)")
      .def_static(
          "create",
          [](const std::filesystem::path& path, std::uint64_t nbytes, bool prefault) {
            return HostRegion::create(path.string(), nbytes, prefault);
          },
          py::arg("path"), py::arg("nbytes"), py::arg("prefault") = false, ReleaseGil(),
          R"(Make a new file of nbytes zero bytes, its space reserved, and map it writable.

prefault maps every page before the call returns, so that the first copy into it does not fault.
Raises FileExistsError, OSError with ENOSPC when the file system is full (no file is left behind),
ValueError for 0 bytes.)")
      .def_static(
          "open",
          [](const std::filesystem::path& path, bool writable) { return HostRegion::open(path.string(), writable); },
          py::arg("path"), py::arg("writable") = false, ReleaseGil(),
          "Map a whole existing file. Raises OSError (FileNotFoundError, PermissionError; EINVAL for an empty file).")
      .def_property_readonly("address", &HostRegion::address,
                             "Address of byte 0 in this process. ValueError when closed.")
      .def_property_readonly("nbytes", &HostRegion::nbytes, "Size in bytes. ValueError when closed.")
      .def_property_readonly("writable", &HostRegion::writable, "Whether the region is mapped writable.")
      .def_property_readonly("closed", &HostRegion::closed, "Whether close() was called.")
      .def_property_readonly("path", &HostRegion::path, "The file.")
      .def("store_word", &HostRegion::store_word, py::arg("offset"), py::arg("value"),
           R"(Store a 64-bit word with release order: who loads it sees all bytes written before.

offset is in bytes. Raises IndexError unless it is a multiple of 8 within the region, PermissionError when read-only.)")
      .def("load_word", &HostRegion::load_word, py::arg("offset"),
           "Load a 64-bit word with acquire order. offset in bytes; IndexError as for store_word.")
      .def("close", &HostRegion::close,
           "Unmap; the file stays. Raises BufferError while a view of the region exists. A second call does nothing.")
      .def("__len__", &HostRegion::nbytes)
      .def("__enter__", [](py::object self) { return self; })
      .def("__exit__", [](HostRegion& self, const py::args&) { self.close(); });
}

// -- copy engine -----------------------------------------------------------------------------------------------------

// Holds the view while the words are read.
class Words {
 public:
  Words(const py::buffer& buffer, const char* name) : info_(buffer.request()) {
    const bool unsigned64 = info_.itemsize == 8 && (info_.format == "L" || info_.format == "Q" ||
                                                    info_.format == "=Q" || info_.format == "<Q" ||
                                                    info_.format == "=L");
    if (info_.ndim != 1 || !unsigned64 || (info_.size > 1 && info_.strides[0] != 8)) {
      throw std::invalid_argument(std::string(name) + " must be a 1-D contiguous buffer of uint64" + MOEVEMENT_HERE);
    }
  }
  std::size_t size() const { return static_cast<std::size_t>(info_.size); }
  std::uint64_t operator[](std::size_t index) const { return static_cast<const std::uint64_t*>(info_.ptr)[index]; }

 private:
  py::buffer_info info_;
};

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
                                                       double bytes_per_second_limit) {
  const EngineLimits limits{chunk_bytes, chunks_in_flight, max_queued_tickets, max_finished_tickets,
                            bytes_per_second_limit};
  moevement::check_limits(limits);
  std::unique_ptr<CopyDevice> copier;
  if (device == "cpu") {
    copier = moevement::make_cpu_device();
  } else if (device == "cuda") {
    copier = moevement::make_cuda_device(device_index, chunks_in_flight);
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

void bind_submits(EngineClass& engine) {
  engine
      .def(
          "submit",
          [](CopyEngine& self, const py::buffer& sources, const py::buffer& destinations, const py::buffer& sizes,
             std::uint64_t stream, std::string label) {
            auto batch = make_batch(sources, destinations, sizes);
            const py::gil_scoped_release release;
            return self.submit(std::move(batch), stream, std::move(label));
          },
          py::arg("sources"), py::arg("destinations"), py::arg("sizes"), py::arg("stream") = 0, py::arg("label") = "",
          R"(Queue a batch of copies, made in order; returns its ticket (1, 2, ...).

sources, destinations (addresses) and sizes (bytes): 1-D contiguous uint64 buffers of one length. stream: handle of the
CUDA stream whose work so far the copies wait for; 0 is the device's default stream. label is named in errors.
The memory must stay alive, and the sources unchanged, until the ticket is finished.
Raises ValueError for bad buffers, a null address, or a piece whose source and destination overlap; EngineError when
max_queued_tickets are unfinished, after close(), and after the engine ended by a device error.)")
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
          R"(Submit a batch and wait for it; any direction between host and device. Takes its turn in the queue.

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
          [](const CopyEngine& self, std::uint64_t ticket) { return moevement::state_name(self.state(ticket)); },
          py::arg("ticket"), ReleaseGil(),
          "'queued', 'running', 'done', 'cancelled' or 'failed'. KeyError when unknown or dropped.")
      .def("stats", &CopyEngine::stats, py::arg("ticket"), ReleaseGil(),
           "Bytes and seconds of a ticket, up to now when it is unfinished. KeyError when unknown or dropped.");
}

void bind_engine(py::module_& module) {
  EngineClass engine(module, "CopyEngine", py::release_gil_before_calling_cpp_dtor(),
                     R"(Copies batches of memory pieces in order, in small chunks, with one native thread.

device: 'cpu' or 'cuda'. chunk_bytes: bytes a chunk. chunks_in_flight: chunks the GPU holds at a time.
max_queued_tickets: unfinished tickets, the running one included. max_finished_tickets: finished tickets that can
still be asked for; older ones are dropped. bytes_per_second_limit: 0 is none.
Raises ValueError for limits out of range, EngineError when 'cuda' is asked for and there is none.
An engine belongs to the process that made it; in a fork its methods raise EngineError.
)");
  engine.def(py::init(&make_engine), py::arg("device") = "cpu", py::arg("device_index") = 0, py::kw_only(),
             py::arg("chunk_bytes") = EngineLimits{}.chunk_bytes,
             py::arg("chunks_in_flight") = EngineLimits{}.chunks_in_flight,
             py::arg("max_queued_tickets") = EngineLimits{}.max_queued_tickets,
             py::arg("max_finished_tickets") = EngineLimits{}.max_finished_tickets,
             py::arg("bytes_per_second_limit") = 0.0, ReleaseGil());
  bind_submits(engine);
  bind_tickets(engine);
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

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "Native core of moevement: host memory that outlives a process, and a paced copy engine.";
  register_errors(module);
  bind_region(module);
  bind_stats(module);
  bind_engine(module);
  module.def(
      "build_info",
      [] {
#ifdef __clang__
        const char* compiler = "clang " __clang_version__;
#else
        const char* compiler = "gcc " __VERSION__;
#endif
        const char* version = moevement::cuda_version();
        return py::make_tuple(version != nullptr, version, compiler);
      },
      "(built with CUDA, CUDA runtime version or None, compiler).");
}
