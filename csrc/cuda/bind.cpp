#include <cstring>
#include <utility>

#include "../python_args.h"
#include "loss.h"

#ifndef DLB_CUDA_ARCHITECTURES
#define DLB_CUDA_ARCHITECTURES ""
#endif

namespace py = pybind11;

namespace {

// The first member of a DlbCudaArgs as bytes. scalars: ce_count, kl_count, grad_scale. outputs:
// those of a LossOutputs, then the statistics.
py::bytes pack(const py::tuple& args, const py::tuple& scalars, const py::tuple& outputs,
               int64_t fresh) {
  DlbArgs a = dlb::inputs_from(args.ptr());
  PyObject* const* written = dlb::items(outputs.ptr(), dlb::kOutputs + 1);
  dlb::put_scalars(a, dlb::items(scalars.ptr(), 3));
  dlb::put_outputs(a, written, written[dlb::kOutputs]);
  a.fresh = fresh;
  return py::bytes(reinterpret_cast<const char*>(&a), sizeof(a));
}

// `packed` is a DlbCudaArgs as bytes. The result is a cudaError_t.
template <int (*kFunction)(const DlbCudaArgs*)>
int call(const py::bytes& packed) {
  DlbCudaArgs args;
  if (PyBytes_GET_SIZE(packed.ptr()) != sizeof(args)) throw py::value_error("not a DlbCudaArgs");
  std::memcpy(&args, PyBytes_AS_STRING(packed.ptr()), sizeof(args));
  return kFunction(&args);
}

}  // namespace

#ifndef DLB_MODULE
#define DLB_MODULE _cuda
#define DLB_SIMULATED false
#endif

PYBIND11_MODULE(DLB_MODULE, m, py::mod_gil_not_used()) {
  dlb::Torch::get();
  m.def("pack", &pack);
  m.def("loss", &call<dlb_cuda_loss>);
  m.def("rescale", &call<dlb_cuda_rescale>);
  m.def("versions",
        [] { return std::make_pair(dlb_cuda_runtime_version(), dlb_cuda_driver_version()); });
  m.def("capability", &dlb_cuda_capability);
  m.def("error_string", &dlb_cuda_error);
  m.attr("ARCHITECTURES") = DLB_CUDA_ARCHITECTURES;
  m.attr("CHUNKS") = kDlbChunks;
  m.attr("SIMULATED") = DLB_SIMULATED;
}
