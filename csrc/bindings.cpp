// The Python module: its errors, and what it was built with.
#include <pybind11/stl.h>

#include <exception>

#include "bindings.h"
#include "copy_device.h"
#include "errors.h"

namespace py = pybind11;

namespace {

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

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "Native core of moevement: host memory that outlives a process, a paced copy engine, digests.";
  register_errors(module);
  moevement::bind_region(module);
  moevement::bind_engine(module);
  moevement::bind_digests(module);
  module.def(
      "build_info",
      [] {
#ifdef __clang__
        const char* compiler = "clang " __clang_version__;
#else
        const char* compiler = "gcc " __VERSION__;
#endif
        const char* version = moevement::cuda_version();
        return py::make_tuple(version != nullptr, version, compiler, moevement::gather_built());
      },
      "(built with CUDA, CUDA runtime version or None, compiler, whether small pieces are gathered, and slots can be "
      "digested, on the GPU).");
}
