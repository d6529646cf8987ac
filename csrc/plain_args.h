// The checks of a common call, and what the kernel gets, in one function: in Python they would take
// longer than the loss of a few rows.
#pragma once
#include <cmath>

#include "tensor_view.h"

namespace dlb {

inline bool float_between(PyObject* number, double low, double high) {
  return PyFloat_CheckExact(number) && PyFloat_AS_DOUBLE(number) >= low &&
         PyFloat_AS_DOUBLE(number) <= high;
}

// (defaults, grad_enabled, logits, labels, last_logits, ignore_index, label_smoothing, temperature,
// alpha). The LossArgs of dlb_fused/backends.py, where `defaults` is one without tensors; None if
// the checks of dlb_fused/checks.py must say what is wrong, or convert something.
inline PyObject* plain_args(PyObject* const* given) {
  constexpr int kNeedGrad = 15;
  PyObject *const defaults = given[0], *const logits = given[2];
  PyObject *const ignore_index = given[5], *const smoothing = given[6];
  PyObject *const temperature = given[7], *const alpha = given[8];
  const double largest = std::numeric_limits<double>::max();
  const int64_t m = plain_overlap(logits, given[3], given[4]);
  if (m < 0 || !PyLong_CheckExact(ignore_index) || !float_between(smoothing, 0, 1) ||
      !float_between(temperature, std::numeric_limits<double>::denorm_min(), largest) ||
      !float_between(alpha, 0, largest))
    Py_RETURN_NONE;

  const Py_ssize_t size = PyTuple_GET_SIZE(defaults);
  PyTypeObject* const type = Py_TYPE(defaults);
  const py::object args = owned(type->tp_alloc(type, size));
  for (Py_ssize_t i = 0; i < size; ++i) {
    PyObject* field = PyTuple_GET_ITEM(defaults, i);
    switch (i) {
      case 0: field = logits; break;
      case 1: field = given[3]; break;
      case 2: field = given[4]; break;
      case 8: field = ignore_index; break;
      case 9: field = smoothing; break;
      case 10: field = temperature; break;
      case 11: field = alpha; break;
      case kNeedGrad: field = given[1] == Py_True && requires_grad(logits) ? Py_True : Py_False; break;
    }
    if (i == 3) field = PyLong_FromLongLong(m); else Py_INCREF(field);
    PyTuple_SET_ITEM(args.ptr(), i, field);
  }
  return args.inc_ref().ptr();
}

// (tensor, number): whether a tensor in the host's memory is that float; false where that is not
// known.
inline PyObject* is_number(PyObject* const* given) {
  constexpr int32_t kCpu = 1;
  DLTensor t;
  bool same = false;
  if (PyFloat_CheckExact(given[1]) && plain_tensor(given[0], t) && t.device_type == kCpu &&
      t.ndim == 0) {
    const void* value = static_cast<const char*>(t.data) + t.byte_offset;
    const double number = PyFloat_AS_DOUBLE(given[1]);
    same = (t.dtype == kFloat32 && *static_cast<const float*>(value) == number) ||
           (t.dtype == kFloat64 && *static_cast<const double*>(value) == number);
  }
  return PyBool_FromLong(same);
}

}  // namespace dlb
