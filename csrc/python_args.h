// DlbArgs from Python objects. In C++ since it is a good part of what a call for a few rows costs.
#pragma once
#include <pybind11/pybind11.h>

#include "args.h"

namespace dlb {

namespace py = pybind11;

inline py::object owned(PyObject* result) {
  if (!result) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(result);
}

inline int64_t integer(PyObject* number) {
  const long long value = PyLong_AsLongLong(number);
  if (value == -1 && PyErr_Occurred()) throw py::error_already_set();
  return value;
}

// A method of tensors that returns an integer; 0 for None.
class Method {
 public:
  explicit Method(const char* name) : name_(PyUnicode_InternFromString(name)) {}

  template <class... Arguments>
  int64_t operator()(PyObject* tensor, Arguments... arguments) const {
    if (tensor == Py_None) return 0;
    PyObject* all[] = {tensor, arguments...};
    return integer(
        owned(PyObject_VectorcallMethod(name_, all, 1 + sizeof...(arguments), nullptr)).ptr());
  }

 private:
  PyObject* name_;  // lives as long as the process
};

inline void* address(PyObject* tensor) {
  static const Method data_ptr("data_ptr");
  return reinterpret_cast<void*>(data_ptr(tensor));
}

// A temperature, alpha or lam: a float, or a tensor of one value, or of one a row.
inline void put_setting(PyObject* setting, double& value, const void*& values, int32_t& step) {
  static const Method dim("dim");
  if (PyFloat_Check(setting)) {
    value = PyFloat_AS_DOUBLE(setting);
  } else {
    values = address(setting);
    step = int32_t(dim(setting));
  }
}

// `args` is a LossArgs of dlb_fused/backends.py. scalars: ce_count, kl_count, grad_scale. outputs:
// loss, parts, dlogits, next_logits, next_labels, next_valid, stats. dtype and last_dtype are
// DlbDtypes.
inline DlbArgs args_from(const py::tuple& args, const py::tuple& scalars, const py::tuple& outputs,
                         int64_t fresh, int32_t threads, int32_t dtype, int32_t last_dtype) {
  static const Method stride("stride");
  static PyObject* const shape_name = PyUnicode_InternFromString("shape");
  static PyObject* const first = PyLong_FromLong(0);
  static PyObject* const before_last = PyLong_FromLong(-2);
  if (args.size() < 24 || scalars.size() != 3 || outputs.size() != 7)
    throw py::value_error("not the tuples that dlb_fused/native.py describes");
  PyObject* const* given = &PyTuple_GET_ITEM(args.ptr(), 0);
  PyObject* const* scalar = &PyTuple_GET_ITEM(scalars.ptr(), 0);
  PyObject* const* written = &PyTuple_GET_ITEM(outputs.ptr(), 0);
  const py::object shape = owned(PyObject_GetAttr(given[0], shape_name));

  DlbArgs a = {};
  a.B = integer(PyTuple_GET_ITEM(shape.ptr(), 0));
  a.C = integer(PyTuple_GET_ITEM(shape.ptr(), 1));
  a.overlap = integer(given[3]);
  a.fresh = fresh;
  a.logits_stride = stride(given[0], first);
  a.last_stride = stride(given[2], before_last);
  a.dlogits_stride = stride(written[2], first);
  a.ignore_index = integer(given[8]);
  a.logits = address(given[0]);
  a.labels = static_cast<int64_t*>(address(given[1]));
  a.last_logits = address(given[2]);
  a.teacher_rows = static_cast<int64_t*>(address(given[4]));
  a.last_labels = static_cast<int64_t*>(address(given[5]));
  a.last_valid = static_cast<uint8_t*>(address(given[6]));
  a.weight = address(given[7]);
  a.label_smoothing = PyFloat_AsDouble(given[9]);
  put_setting(given[10], a.temperature, a.temperatures, a.temperature_step);
  put_setting(given[11], a.alpha, a.alphas, a.alpha_step);
  a.ce_count = address(scalar[0]);
  a.kl_count = address(scalar[1]);
  a.grad_scale = address(scalar[2]);
  a.loss = address(written[0]);
  a.parts = address(written[1]);
  a.dlogits = address(written[2]);
  a.next_logits = address(written[3]);
  a.next_labels = static_cast<int64_t*>(address(written[4]));
  a.next_valid = static_cast<uint8_t*>(address(written[5]));
  a.stats = static_cast<int64_t*>(address(written[6]));
  a.labels_b = static_cast<int64_t*>(address(given[21]));
  put_setting(given[22], a.lam, a.lams, a.lam_step);
  a.distill_ignored = given[23] == Py_True;
  a.dtype = dtype;
  a.last_dtype = last_dtype;
  a.threads = threads;
  return a;
}

}  // namespace dlb
