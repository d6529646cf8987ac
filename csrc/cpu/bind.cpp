#include "../python_args.h"
#include "loss.h"

namespace py = pybind11;

namespace {

constexpr int64_t kReleaseElements = 1 << 15;  // below this the call is over before it would pay

// See args_from. The result is that of dlb_cpu_loss.
int64_t loss(const py::tuple& args, const py::tuple& scalars, const py::tuple& outputs,
             int64_t fresh, int32_t threads) {
  const DlbArgs a = dlb::args_from(args, scalars, outputs, fresh, threads);
  if (a.B * a.C < kReleaseElements) return dlb_cpu_loss(&a);
  py::gil_scoped_release release;
  return dlb_cpu_loss(&a);
}

}  // namespace

PYBIND11_MODULE(_cpu, m, py::mod_gil_not_used()) {
  dlb::Torch::get();
  m.def("loss", &loss);
  m.def("plain_overlap", &dlb::plain_overlap);
  m.def("has_thread_pool", &dlb_cpu_has_thread_pool);
  m.def("force_level", &dlb_cpu_force_level);
  m.attr("DONE") = kDlbDone;
  m.attr("NO_MEMORY") = kDlbNoMemory;
}
