#include <pybind11/pybind11.h>

#include <cstring>

#include "loss.h"

namespace py = pybind11;

namespace {

constexpr int64_t kReleaseElements = 1 << 15;  // below this the call is over before it would pay

// `packed` is a DlbArgs as bytes. The result is that of dlb_cpu_loss.
int64_t loss(const py::bytes& packed) {
  DlbArgs args;
  if (PyBytes_GET_SIZE(packed.ptr()) != sizeof(args)) throw py::value_error("not a DlbArgs");
  std::memcpy(&args, PyBytes_AS_STRING(packed.ptr()), sizeof(args));
  if (args.B * args.C < kReleaseElements) return dlb_cpu_loss(&args);
  py::gil_scoped_release release;
  return dlb_cpu_loss(&args);
}

}  // namespace

PYBIND11_MODULE(_cpu, m, py::mod_gil_not_used()) {
  m.def("loss", &loss);
  m.def("has_thread_pool", &dlb_cpu_has_thread_pool);
  m.def("force_level", &dlb_cpu_force_level);
  m.attr("DONE") = kDlbDone;
  m.attr("NO_MEMORY") = kDlbNoMemory;
}
