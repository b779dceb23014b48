#include "torch/errors.h"

#include <torch/csrc/Exceptions.h>
#include <torch/csrc/utils/pybind.h>

#include "communicator/api.h"

namespace hxcomm::torch_glue {
namespace {

constexpr int kUsage = 6;
constexpr int kInterrupted = 7;
constexpr const char* kClasses[] = {"AbortedError", "PeerFailedError",  "MismatchError",
                                    "AbortedError", "CommTimeoutError", "InitError"};

// torch translates descendants of PyTorchError to their own Python class wherever C++ meets Python (pybind11 bindings,
// Work.wait, the dispatcher's THPVariable wrappers); any other exception would arrive as RuntimeError.
struct TypedError final : ::torch::PyTorchError {
  TypedError(int kind, const std::string& message) : ::torch::PyTorchError(message), kind_(kind) {}

  PyObject* python_type() override {
    const py::gil_scoped_acquire gil;
    // A borrowed reference that lives as long as the module hxcomm.errors.
    return py::module_::import("hxcomm.errors").attr(kClasses[kind_]).ptr();
  }

 private:
  int kind_;
};

}  // namespace

void throw_typed(int kind, const std::string& message) {
  if (kind == kInterrupted) {
    const py::gil_scoped_acquire gil;
    if (PyErr_Occurred() != nullptr) {
      python_error error;  // KeyboardInterrupt, or whatever the program's signal handler raised
      error.persist();
      throw error;
    }
  }
  if (kind == kUsage || kind == kInterrupted) throw c10::ValueError({__func__, __FILE__, __LINE__}, message);
  throw TypedError(kind, message);
}

}  // namespace hxcomm::torch_glue
