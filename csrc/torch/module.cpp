// hxcomm._C: the glue between torch and the communicator.
#include <pybind11/functional.h>
#include <torch/csrc/utils/pybind.h>

#include "communicator/api.h"
#include "torch/communicator.h"
#include "torch/communicator_backend.h"
#include "torch/device/bindings.h"
#include "torch/nothing.h"
#include "torch/process_group.h"
#include "torch/timed_calls.h"
#include "torch/window.h"

namespace {

using hxcomm::Api;
using hxcomm::torch_glue::NothingProcessGroup;
using hxcomm::torch_glue::ProcessGroup;
using hxcomm::torch_glue::TimedCalls;

const Api* api_from(const py::capsule& capsule) {
  const Api* api = capsule.get_pointer<const Api>();
  if (std::string(capsule.name()) != hxcomm::kApiCapsule || api->version != hxcomm::kApiVersion)
    throw std::runtime_error("hxcomm._core and hxcomm._C are of different builds; reinstall hxcomm");
  return api;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "hxcomm's torch.distributed backend in C++.";
  py::module_::import("torch._C._distributed_c10d");  // knows the base class
  py::class_<ProcessGroup, c10d::Backend, c10::intrusive_ptr<ProcessGroup>>(m, "ProcessGroup")
      .def(py::init([](int rank, int size, const py::capsule& api, const py::capsule& group, double timeout_s,
                       c10::intrusive_ptr<ProcessGroup::Options> options, ProcessGroup::Shrink shrink,
                       ProcessGroup::Split split, TimedCalls::Timer timer, const std::string& name) {
             const auto timeout = std::chrono::milliseconds(static_cast<int64_t>(timeout_s * 1e3));
             return c10::make_intrusive<ProcessGroup>(
                 rank, size, api_from(api), group.get_pointer<void>(), timeout, std::move(options), std::move(shrink),
                 std::move(split), timer ? TimedCalls::make(name, rank, size, std::move(timer)) : nullptr);
           }),
           py::kw_only(), py::arg("rank"), py::arg("size"), py::arg("api"), py::arg("group"), py::arg("timeout_s"),
           py::arg("options"), py::arg("shrink"), py::arg("split"), py::arg("timer") = nullptr, py::arg("name") = "")
      .def_property_readonly("options", &ProcessGroup::getBackendOptions)
      // torch calls this when it makes a device-bound group, and later makes tensors there from C++ (in barrier).
      .def("eager_connect_single_device",
           [](ProcessGroup&, const c10::Device& device) {
             if (device.is_privateuseone()) py::module_::import("hxcomm.device.lifecycle").attr("init")();
           })
      // Of ranks that new_group() leaves out of a device-bound group: here they have nothing to do.
      .def("perform_nocolor_split", [](ProcessGroup&, const c10::Device&) {});
  py::class_<NothingProcessGroup, c10d::Backend, c10::intrusive_ptr<NothingProcessGroup>>(m, "NothingProcessGroup")
      .def(py::init([](int rank, int size) { return c10::make_intrusive<NothingProcessGroup>(rank, size); }),
           py::kw_only(), py::arg("rank"), py::arg("size"));
  hxcomm::torch_glue::bind_communicator(m);
  hxcomm::torch_glue::bind_window(m);
  hxcomm::torch_glue::bind_communicator_backend(m);
  hxcomm::device::bind(m);
  m.def("clock_collectives", &TimedCalls::report,
        "Of each group: name, rank, ((op, algorithm, nbytes, item_bytes, root), calls, ps) of what it ran, what was "
        "not timed (collectives of CPU tensors, messages, operations on windows), and its events.");
}
