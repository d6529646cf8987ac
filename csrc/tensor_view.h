// What a kernel must know of a torch tensor, without torch's headers: by the table of C functions
// that torch publishes as a type attribute for this (DLPack's exchange API, torch 2.10 and later),
// at 60 ns a tensor; by the tensor's methods elsewhere.
#pragma once
#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>

namespace dlb {

namespace py = pybind11;

// ---- the ABI of DLPack 1 (github.com/dmlc/dlpack, dlpack.h), as far as it is used here ----

struct DLDataType {
  uint8_t code, bits;
  uint16_t lanes;
  bool operator==(DLDataType o) const { return code == o.code && bits == o.bits; }
};

struct DLTensor {
  void* data;
  int32_t device_type, device_id;
  int32_t ndim;
  DLDataType dtype;
  int64_t *shape, *strides;  // of the tensor itself: they live as long as it does
  uint64_t byte_offset;
};

struct DLExchange {
  uint32_t major, minor;
  void *older, *allocate, *managed_from_object, *managed_to_object;
  int (*tensor_from_object)(void* object, DLTensor* out);
  void* current_stream;
};

constexpr DLDataType kInt64 = {0, 64, 1}, kFloat16 = {2, 16, 1}, kFloat32 = {2, 32, 1},
                     kFloat64 = {2, 64, 1}, kBFloat16 = {4, 16, 1};

// torch.Tensor and its table, null where this torch has none; torch.empty_like.
struct Torch {
  PyObject *tensor, *empty_like;
  const DLExchange* exchange = nullptr;

  static PyObject* attribute(const char* name) {
    return py::object(py::module_::import("torch").attr(name)).release().ptr();
  }

  Torch() : tensor(attribute("Tensor")), empty_like(attribute("empty_like")) {
    const py::object table =
        py::getattr(py::handle(tensor), "__dlpack_c_exchange_api__", py::none());
    if (table.is_none()) return;
    const auto found =
        static_cast<const DLExchange*>(PyCapsule_GetPointer(table.ptr(), "dlpack_exchange_api"));
    if (!found) throw py::error_already_set();
    if (found->major == 1 && found->tensor_from_object) exchange = found;
  }

  static Torch& get() {
    // Never destroyed: Python may be gone by then. The import may let another thread run, which
    // must not wait for a lock of C++ while it holds Python's: so modules ask for it once as they
    // are imported.
    static Torch* const torch = new Torch;
    return *torch;
  }
};

// ---- the tensor's methods ----

inline py::object owned(PyObject* result) {
  if (!result) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(result);
}

inline int64_t integer(PyObject* number) {
  const long long value = PyLong_AsLongLong(number);
  if (value == -1 && PyErr_Occurred()) throw py::error_already_set();
  return value;
}

inline PyObject* const* items(PyObject* tuple, Py_ssize_t size) {
  if (!PyTuple_Check(tuple) || PyTuple_GET_SIZE(tuple) != size)
    throw py::value_error("not a tuple of the size that dlb_fused/native.py describes");
  return &PyTuple_GET_ITEM(tuple, 0);
}

// Of a LossArgs and a LossOutputs of dlb_fused/backends.py.
constexpr Py_ssize_t kArgs = 24, kOutputs = 6;

class Method {
 public:
  explicit Method(const char* name) : name_(PyUnicode_InternFromString(name)) {}

  template <class... Arguments>
  py::object operator()(PyObject* tensor, Arguments... arguments) const {
    PyObject* all[] = {tensor, arguments...};
    return owned(PyObject_VectorcallMethod(name_, all, 1 + sizeof...(arguments), nullptr));
  }

 private:
  PyObject* name_;  // lives as long as the process
};

// ---- both ----

// Address, type and strides of a tensor of at most three dimensions; all 0 for None.
struct TensorView {
  void* data = nullptr;
  DLDataType dtype = {};
  int32_t dims = 0;
  int64_t shape[3] = {}, strides[3] = {};

  explicit TensorView(PyObject* tensor) {
    if (tensor == Py_None) return;
    if (const DLExchange* exchange = Torch::get().exchange) {
      DLTensor t;
      if (exchange->tensor_from_object(tensor, &t)) throw py::error_already_set();
      data = static_cast<char*>(t.data) + t.byte_offset;
      dtype = t.dtype;
      set_dims(t.ndim);
      bool empty = false;
      for (int i = 0; i < dims; ++i) {
        shape[i] = t.shape[i];
        strides[i] = t.strides[i];
        empty |= shape[i] == 0;
      }
      // Of torch's lazy zeros, for one.
      if (!t.data && !empty) throw py::value_error("dlb_loss: a tensor without memory");
    } else {
      read_by_methods(tensor);
    }
  }

  int64_t row_stride() const { return dims < 2 ? 0 : strides[dims - 2]; }

 private:
  void set_dims(int64_t n) {
    if (n > 3) throw py::value_error("a tensor of more than three dimensions");
    dims = int32_t(n);
  }

  static DLDataType dtype_by_name(py::handle tensor) {
    const std::string name = py::str(tensor.attr("dtype"));
    return name == "torch.float32"    ? kFloat32
           : name == "torch.bfloat16" ? kBFloat16
           : name == "torch.float16"  ? kFloat16
           : name == "torch.float64"  ? kFloat64
                                      : DLDataType{};
  }

  void read_by_methods(PyObject* tensor) {
    static const Method data_ptr("data_ptr"), dim("dim"), size("size"), stride("stride");
    data = reinterpret_cast<void*>(integer(data_ptr(tensor).ptr()));
    dtype = dtype_by_name(tensor);
    set_dims(integer(dim(tensor).ptr()));
    for (int i = 0; i < dims; ++i) {
      const py::int_ axis(i);
      shape[i] = integer(size(tensor, axis.ptr()).ptr());
      strides[i] = integer(stride(tensor, axis.ptr()).ptr());
    }
  }
};

inline bool is_real(DLDataType t) {
  return t == kFloat32 || t == kBFloat16 || t == kFloat16 || t == kFloat64;
}

inline bool rows_of_classes(const DLTensor& t) {
  return t.ndim == 2 && t.shape[1] > 0 && (t.strides[1] == 1 || t.shape[1] == 1) &&
         is_real(t.dtype);
}

inline bool requires_grad(PyObject* tensor) {
  static PyObject* const name = PyUnicode_InternFromString("requires_grad");
  return owned(PyObject_GetAttr(tensor, name)).is(py::handle(Py_True));
}

// Whether it is a torch.Tensor itself, no subclass, that is what its memory says.
inline bool plain_tensor(PyObject* object, DLTensor& t) {
  static const Method is_neg("is_neg");
  const Torch& torch = Torch::get();
  if (reinterpret_cast<PyObject*>(Py_TYPE(object)) != torch.tensor) return false;
  if (!torch.exchange || torch.exchange->tensor_from_object(object, &t)) {
    PyErr_Clear();
    return false;
  }
  return t.dtype == kInt64 || is_neg(object).is(py::handle(Py_False));
}

// m, if the tensors of a call are what dlb_fused/checks.py asks for and nothing needs to be copied;
// -1 if the checks there must say what is wrong, or a copy be made.
inline int64_t plain_overlap(PyObject* logits, PyObject* labels, PyObject* last_logits) {
  DLTensor z, y, u;
  if (!plain_tensor(logits, z) || !plain_tensor(labels, y)) return -1;
  const auto beside_logits = [&z](const DLTensor& t) {
    return t.device_type == z.device_type && t.device_id == z.device_id;
  };
  if (!rows_of_classes(z) || !(y.dtype == kInt64) || y.ndim != 1 || y.shape[0] != z.shape[0] ||
      (y.strides[0] != 1 && y.shape[0] > 1) || !beside_logits(y))
    return -1;
  if (last_logits == Py_None) return 0;
  if (!plain_tensor(last_logits, u) || !rows_of_classes(u) || !beside_logits(u)) return -1;
  if (u.shape[1] != z.shape[1] || u.shape[0] > z.shape[0]) return -1;
  if ((u.dtype == kFloat64) != (z.dtype == kFloat64)) return -1;
  return requires_grad(last_logits) ? -1 : u.shape[0];
}

}  // namespace dlb
