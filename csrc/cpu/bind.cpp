#include <exception>

#include "../plain_args.h"
#include "../python_args.h"
#include "loss.h"

namespace py = pybind11;

namespace {

constexpr int64_t kReleaseElements = 1 << 15;  // below this the call is over before it would pay

int64_t run(const DlbArgs& a) {
  if (a.B * a.C < kReleaseElements) return dlb_cpu_loss(&a);
  py::gil_scoped_release release;
  return dlb_cpu_loss(&a);
}

// A new tensor of the shape and type of another.
py::object empty_like(PyObject* tensor) {
  return dlb::owned(PyObject_CallOneArg(dlb::Torch::get().empty_like, tensor));
}

// (B, C) like logits, contiguous.
py::object empty_rows(PyObject* logits) {
  static const dlb::Method new_empty("new_empty");
  const dlb::TensorView z(logits);
  if (z.strides[0] == z.shape[1] && z.strides[1] == 1) return empty_like(logits);
  return new_empty(logits, py::getattr(logits, "shape").ptr());
}

// (args, like, cached, threads): the LossOutputs of a LossArgs. `like` is a LossOutputs whose first
// two are like the new ones; `cached` are the last three. In place of it, where it has no result,
// that of dlb_cpu_loss.
PyObject* forward(PyObject* const* given) {
  static const dlb::Method detach("detach");
  PyObject* const* args = dlb::items(given[0], dlb::kArgs);
  PyObject* const* like = dlb::items(given[1], dlb::kOutputs);
  PyObject* const* cached = dlb::items(given[2], 3);
  PyObject *const logits = args[0], *const grad_scale = args[14];
  const bool need_grad = args[15] == Py_True, inplace = args[16] == Py_True;
  py::object outputs[] = {empty_like(like[0]), empty_like(like[1]), py::none()};
  if (need_grad) outputs[2] = inplace ? detach(logits) : empty_rows(logits);

  PyTypeObject* const type = Py_TYPE(given[1]);
  py::object out = dlb::owned(type->tp_alloc(type, dlb::kOutputs));
  for (int i = 0; i < 6; ++i) {
    PyObject* const output = i < 3 ? outputs[i].ptr() : cached[i - 3];
    PyTuple_SET_ITEM(out.ptr(), i, Py_NewRef(output));
  }
  DlbArgs a = dlb::inputs_from(given[0]);
  dlb::put_outputs(a, dlb::items(out.ptr(), dlb::kOutputs), args[19]);
  a.fresh = dlb::integer(args[17]);
  a.threads = int32_t(dlb::integer(given[3]));
  a.ce_count = dlb::address(args[12]);
  a.kl_count = dlb::address(args[13]);
  // In the type that dlb_real reads.
  const double scale = PyFloat_Check(grad_scale) ? PyFloat_AS_DOUBLE(grad_scale) : 1;
  const float short_scale = float(scale);
  if (!PyFloat_Check(grad_scale)) {
    a.grad_scale = dlb::address(grad_scale);
  } else if (scale != 1) {
    a.grad_scale = a.dtype == DLB_FLOAT64 ? static_cast<const void*>(&scale) : &short_scale;
  }
  const int64_t result = run(a);
  return result == kDlbDone ? out.release().ptr() : PyLong_FromLongLong(result);
}

// (args, scalars, dlogits, threads): writes the gradient; see put_scalars. The result is that of
// dlb_cpu_loss.
PyObject* backward(PyObject* const* given) {
  DlbArgs a = dlb::inputs_from(given[0]);
  dlb::put_scalars(a, dlb::items(given[1], 3));
  dlb::put_gradient(a, given[2]);
  a.threads = int32_t(dlb::integer(given[3]));
  return PyLong_FromLongLong(run(a));
}

// A function of exactly kCount arguments, without pybind11's conversions: for a few rows they would
// take as long as the kernel.
template <PyObject* (*kFunction)(PyObject* const*), int kCount>
PyObject* fast(PyObject*, PyObject* const* given, Py_ssize_t count) {
  if (count != kCount) return PyErr_Format(PyExc_TypeError, "%d arguments, not %zd", kCount, count);
  try {
    return kFunction(given);
  } catch (py::error_already_set& error) {
    error.restore();
  } catch (const py::builtin_exception& error) {
    error.set_error();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}

template <PyObject* (*kFunction)(PyObject* const*), int kCount>
PyMethodDef method(const char* name) {
  return {name,
          reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&fast<kFunction, kCount>)),
          METH_FASTCALL, nullptr};
}

}  // namespace

PYBIND11_MODULE(_cpu, m, py::mod_gil_not_used()) {
  static PyMethodDef functions[] = {method<forward, 4>("forward"),
                                    method<backward, 4>("backward"),
                                    method<dlb::plain_args, 9>("plain_args"),
                                    method<dlb::is_number, 2>("is_number"),
                                    {}};
  dlb::Torch::get();
  if (PyModule_AddFunctions(m.ptr(), functions)) throw py::error_already_set();
  m.def("has_thread_pool", &dlb_cpu_has_thread_pool);
  m.def("force_level", &dlb_cpu_force_level);
  m.attr("DONE") = kDlbDone;
  m.attr("NO_MEMORY") = kDlbNoMemory;
}
