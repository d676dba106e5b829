// Python's HostRegion.
#include <pybind11/stl.h>
#include <pybind11/stl/filesystem.h>

#include <filesystem>
#include <memory>
#include <string>

#include "bindings.h"
#include "host_region.h"

namespace moevement {
namespace {

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

// Signals and the caller's own function, about five times a second.
Progress with_signals(const py::object& progress) {
  return [&progress](std::uint64_t done) {
    const py::gil_scoped_acquire gil;
    if (PyErr_CheckSignals() != 0) throw py::error_already_set();
    if (!progress.is_none()) progress(done);
  };
}

std::unique_ptr<HostRegion> create_region(const std::filesystem::path& path, std::uint64_t nbytes, bool prefault,
                                          std::size_t threads, bool huge_pages, const py::object& progress) {
  if (!progress.is_none() && PyCallable_Check(progress.ptr()) == 0) {
    throw py::type_error(std::string("progress must be callable or None") + MOEVEMENT_HERE);
  }
  const FillOptions options{threads, huge_pages, with_signals(progress)};
  const std::string name = path.string();
  const py::gil_scoped_release release;
  return HostRegion::create(name, nbytes, prefault, options);
}

std::unique_ptr<HostRegion> open_region(const std::filesystem::path& path, bool writable,
                                        std::size_t populate_threads) {
  const std::string name = path.string();
  const py::gil_scoped_release release;
  return HostRegion::open(name, writable, populate_threads, [](std::uint64_t) { poll_signals(); });
}

}  // namespace

void bind_region(py::module_& module) {
  py::class_<HostRegion>(module, "HostRegion", py::custom_type_setup(set_region_buffer),
                         R"(A file mapped into memory and shared; its bytes outlive the process that wrote them.

Supports the buffer protocol (bytes; read-only when mapped read-only). A library that takes the address of the buffer
and lets go of the view, as torch.frombuffer does, must be given memoryview(region): the view holds close() off.
)")
      .def_static("create", &create_region, py::arg("path"), py::arg("nbytes"), py::arg("prefault") = false,
                  py::arg("threads") = 1, py::arg("huge_pages") = true, py::arg("progress") = py::none(),
                  R"(Make a new file of nbytes zero bytes, its space taken, and map it writable.

prefault maps every page before the call returns, so that the first copy into it does not fault; in shared memory that
is so in any case. threads (1 to 64) do that at a time. huge_pages asks for them where the kernel offers them. The pages
come from the calling thread's NUMA node while it has some. progress is called with the bytes done about five times a
second, and at the end; what it raises ends the call.
Raises FileExistsError, OSError with ENOSPC when the file system is full (no file is left behind),
ValueError for 0 bytes.)")
      .def_static("open", &open_region, py::arg("path"), py::arg("writable") = false, py::arg("populate_threads") = 0,
                  R"(Map a whole existing file.

populate_threads (0 to 64) map its pages before the call returns; with 0 each is mapped when it is first used.
Raises OSError (FileNotFoundError, PermissionError; EINVAL for an empty file), ValueError.)")
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

}  // namespace moevement
