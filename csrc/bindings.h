// What the files share that see Python: they check buffers, translate errors and let go of the GIL.
#pragma once

#include <pybind11/pybind11.h>

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>

#include "errors.h"
#include "populate.h"

namespace moevement {

namespace py = pybind11;
using ReleaseGil = py::call_guard<py::gil_scoped_release>;

// A fork has no threads to join and may have inherited a locked mutex: it leaks its copy of the object.
struct DeleteInOwner {
  template <typename Object>
  void operator()(Object* object) const {
    if (object->in_owner_process()) delete object;
  }
};

// Lets Ctrl-C end a call that waits without the GIL.
inline void poll_signals() {
  const py::gil_scoped_acquire gil;
  if (PyErr_CheckSignals() != 0) throw py::error_already_set();
}

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

void bind_region(py::module_& module);
void bind_engine(py::module_& module);
void bind_digests(py::module_& module);

}  // namespace moevement
