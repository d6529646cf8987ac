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

// `args` is a LossArgs of dlb_fused/backends.py. Fresh rows, counts and outputs come from
// elsewhere.
inline DlbArgs inputs_from(PyObject* args) {
  PyObject* const* given = items(args, kArgs);
  const TensorView logits(given[0]), last_logits(given[2]);

  DlbArgs a = {};
  a.B = logits.shape[0];
  a.C = logits.shape[1];
  a.overlap = integer(given[3]);
  a.logits_stride = logits.row_stride();
  a.last_stride = last_logits.row_stride();
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
  a.labels_b = address<int64_t>(given[21]);
  put_setting(given[22], a.lam, a.lams, a.lam_step);
  a.distill_ignored = given[23] == Py_True;
  a.dtype = dtype_of(logits);
  a.last_dtype = dtype_of(last_logits);
  return a;
}

inline void put_gradient(DlbArgs& a, PyObject* dlogits) {
  const TensorView tensor(dlogits);
  a.dlogits = tensor.data;
  a.dlogits_stride = tensor.row_stride();
}

// `outputs` are those of a LossOutputs.
inline void put_outputs(DlbArgs& a, PyObject* const* outputs, PyObject* stats) {
  a.loss = address(outputs[0]);
  a.parts = address(outputs[1]);
  put_gradient(a, outputs[2]);
  a.next_logits = address(outputs[3]);
  a.next_labels = address<int64_t>(outputs[4]);
  a.next_valid = address<uint8_t>(outputs[5]);
  a.stats = address<int64_t>(stats);
}

// (ce_count, kl_count, grad_scale): tensors or None.
inline void put_scalars(DlbArgs& a, PyObject* const* scalars) {
  a.ce_count = address(scalars[0]);
  a.kl_count = address(scalars[1]);
  a.grad_scale = address(scalars[2]);
}

}  // namespace dlb
