// DlbArgs from Python objects. In C++ since it is a good part of what a call for a few rows costs.
#pragma once
#include <pybind11/pybind11.h>

#include "args.h"
#include "tensor_view.h"

namespace dlb {

template <class T = void>
T* address(PyObject* tensor) {
  return static_cast<T*>(TensorView(tensor).data);
}

// A temperature, alpha or lam: a float, or a tensor of one value, or of one a row.
inline void put_setting(PyObject* setting, double& value, const void*& values, int32_t& step) {
  if (PyFloat_Check(setting)) {
    value = PyFloat_AS_DOUBLE(setting);
  } else {
    const TensorView tensor(setting);
    values = tensor.data;
    step = tensor.dims;
  }
}

inline int32_t dtype_of(const TensorView& tensor) {
  return tensor.dtype == kFloat64    ? DLB_FLOAT64
         : tensor.dtype == kBFloat16 ? DLB_BFLOAT16
         : tensor.dtype == kFloat16  ? DLB_FLOAT16
                                     : DLB_FLOAT32;
}

// `args` is a LossArgs of dlb_fused/backends.py. scalars: ce_count, kl_count, grad_scale. outputs:
// loss, parts, dlogits, next_logits, next_labels, next_valid, stats.
inline DlbArgs args_from(PyObject* args, PyObject* scalars, PyObject* outputs, int64_t fresh,
                         int32_t threads) {
  PyObject* const* given = items(args, 24);
  PyObject* const* scalar = items(scalars, 3);
  PyObject* const* written = items(outputs, 7);
  const TensorView logits(given[0]), last_logits(given[2]), dlogits(written[2]);

  DlbArgs a = {};
  a.B = logits.shape[0];
  a.C = logits.shape[1];
  a.overlap = integer(given[3]);
  a.fresh = fresh;
  a.logits_stride = logits.row_stride();
  a.last_stride = last_logits.row_stride();
  a.dlogits_stride = dlogits.row_stride();
  a.ignore_index = integer(given[8]);
  a.logits = logits.data;
  a.labels = address<int64_t>(given[1]);
  a.last_logits = last_logits.data;
  a.teacher_rows = address<int64_t>(given[4]);
  a.last_labels = address<int64_t>(given[5]);
  a.last_valid = address<uint8_t>(given[6]);
  a.weight = address(given[7]);
  a.label_smoothing = PyFloat_AsDouble(given[9]);
  put_setting(given[10], a.temperature, a.temperatures, a.temperature_step);
  put_setting(given[11], a.alpha, a.alphas, a.alpha_step);
  a.ce_count = address(scalar[0]);
  a.kl_count = address(scalar[1]);
  a.grad_scale = address(scalar[2]);
  a.loss = address(written[0]);
  a.parts = address(written[1]);
  a.dlogits = dlogits.data;
  a.next_logits = address(written[3]);
  a.next_labels = address<int64_t>(written[4]);
  a.next_valid = address<uint8_t>(written[5]);
  a.stats = address<int64_t>(written[6]);
  a.labels_b = address<int64_t>(given[21]);
  put_setting(given[22], a.lam, a.lams, a.lam_step);
  a.distill_ignored = given[23] == Py_True;
  a.dtype = dtype_of(logits);
  a.last_dtype = dtype_of(last_logits);
  a.threads = threads;
  return a;
}

}  // namespace dlb
