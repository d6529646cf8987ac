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

// (args, scalars, outputs, fresh, threads): see args_from. The result is that of dlb_cpu_loss.
PyObject* loss(PyObject* const* given) {
  return PyLong_FromLongLong(run(dlb::args_from(
      given[0], given[1], given[2], dlb::integer(given[3]), int32_t(dlb::integer(given[4])))));
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
  static PyMethodDef functions[] = {method<loss, 5>("loss"),
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
