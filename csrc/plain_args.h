// What an ordinary call needs of Python, in C++: for a few rows, the checks and the arguments of
// the kernel would take longer than the loss.
#pragma once
#include <cfloat>

#include "tensor_view.h"

namespace dlb {

inline bool is_int64(PyObject* number) {
  int overflow = 0;
  return PyLong_CheckExact(number) &&
         (PyLong_AsLongLongAndOverflow(number, &overflow), overflow == 0);
}

inline bool float_between(PyObject* number, double low, double high) {
  return PyFloat_CheckExact(number) && PyFloat_AS_DOUBLE(number) >= low &&
         PyFloat_AS_DOUBLE(number) <= high;
}

// (defaults, grad_enabled, logits, labels, last_logits, ignore_index, label_smoothing, temperature,
// alpha): a LossArgs of dlb_fused/backends.py like `defaults`, with these in it. None if the checks
// of dlb_fused/checks.py must say what is wrong, or convert something.
inline PyObject* plain_args(PyObject* const* given) {
  enum Field { kLogits, kOverlap = 3, kIgnoreIndex = 8, kNeedGrad = 15 };
  PyObject* const defaults = given[0];
  PyObject* const* const tensors = given + 2;
  PyObject* const* const numbers = given + 5;
  const int64_t m = plain_overlap(tensors[0], tensors[1], tensors[2]);
  if (m < 0 || !is_int64(numbers[0]) || !float_between(numbers[1], 0, 1) ||
      !float_between(numbers[2], DBL_TRUE_MIN, DBL_MAX) || !float_between(numbers[3], 0, DBL_MAX))
    Py_RETURN_NONE;
  const bool need_grad = given[1] == Py_True && requires_grad(tensors[0]);
  items(defaults, kArgs);

  PyTypeObject* const type = Py_TYPE(defaults);
  const py::object args = owned(type->tp_alloc(type, kArgs));
  for (int i = 0; i < kArgs; ++i) {
    PyObject* field = PyTuple_GET_ITEM(defaults, i);
    if (i < kOverlap) field = tensors[i - kLogits];
    if (i >= kIgnoreIndex && i < kIgnoreIndex + 4) field = numbers[i - kIgnoreIndex];
    if (i == kNeedGrad) field = need_grad ? Py_True : Py_False;
    PyTuple_SET_ITEM(args.ptr(), i,
                     i == kOverlap ? PyLong_FromLongLong(m) : (Py_INCREF(field), field));
  }
  return args.inc_ref().ptr();
}

// (tensor, number): whether a 0-dim tensor in the host's memory is that float; false where that is
// not known.
inline PyObject* is_number(PyObject* const* given) {
  constexpr int32_t kCpu = 1;
  DLTensor t;
  bool same = false;
  if (PyFloat_CheckExact(given[1]) && plain_tensor(given[0], t) && t.device_type == kCpu &&
      t.ndim == 0 && t.data) {
    const char* value = static_cast<const char*>(t.data) + t.byte_offset;
    const double number = PyFloat_AS_DOUBLE(given[1]);
    same = (t.dtype == kFloat32 && *reinterpret_cast<const float*>(value) == number) ||
           (t.dtype == kFloat64 && *reinterpret_cast<const double*>(value) == number);
  }
  return PyBool_FromLong(same);
}

}  // namespace dlb
