#include "torch/errors.h"

#include <torch/csrc/Exceptions.h>
#include <torch/csrc/utils/pybind.h>

namespace hxcomm::torch_glue {
namespace {

const char* class_of(ErrorKind kind) {
  switch (kind) {
    case ErrorKind::peer_failed:
      return "PeerFailedError";
    case ErrorKind::mismatch:
      return "MismatchError";
    case ErrorKind::timeout:
      return "CommTimeoutError";
    case ErrorKind::init:
      return "InitError";
    default:
      return "AbortedError";
  }
}

// torch translates descendants of PyTorchError to their own Python class wherever C++ meets Python (pybind11 bindings,
// Work.wait, the dispatcher's THPVariable wrappers); any other exception would arrive as RuntimeError.
struct TypedError final : ::torch::PyTorchError {
  TypedError(ErrorKind kind, const std::string& message) : ::torch::PyTorchError(message), kind_(kind) {}

  PyObject* python_type() override {
    const py::gil_scoped_acquire gil;
    // A borrowed reference that lives as long as the module hxcomm.errors.
    return py::module_::import("hxcomm.errors").attr(class_of(kind_)).ptr();
  }

 private:
  ErrorKind kind_;
};

}  // namespace

void throw_typed(ErrorKind kind, const std::string& message) {
  if (kind == ErrorKind::interrupted) {
    const py::gil_scoped_acquire gil;
    if (PyErr_Occurred() != nullptr) {
      python_error error;  // KeyboardInterrupt, or whatever the program's signal handler raised
      error.persist();
      throw error;
    }
  }
  if (kind == ErrorKind::usage || kind == ErrorKind::interrupted)
    throw c10::ValueError({__func__, __FILE__, __LINE__}, message);
  throw TypedError(kind, message);
}

}  // namespace hxcomm::torch_glue
