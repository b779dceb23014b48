#include "torch/device/bindings.h"

#include "torch/device/generator.h"
#include "torch/device/kernels.h"
#include "torch/device/memory.h"
#include "torch/device/runtime.h"
#include "torch/device/virtual_clock.h"

namespace hxcomm::device {
namespace {

void start(const py::capsule& capsule) {
  const auto* api = capsule.get_pointer<const MemoryApi>();
  if (std::string(capsule.name()) != kMemoryCapsule || api->version != kMemoryApiVersion)
    throw std::runtime_error("hxcomm._core and hxcomm._C are of different builds; reinstall hxcomm");
  start_memory(*api);
  start_autograd(api->chips);
  start_profiler();
  start_operators();
  start_recurrent();
  start_kernels();
  start_autocast();
}

}  // namespace

void ensure_started() {
  if (C10_LIKELY(is_started())) return;
  const py::gil_scoped_acquire gil;
  py::module_::import("hxcomm.device.lifecycle").attr("init")();
}

void bind(py::module_& m) {
  bind_virtual_clock(m);
  m.def(
      "device_prepare",
      [] {
        prepare_memory();
        prepare_runtime();
      },
      "Registers with torch what makes the device at its first use; once a process, in `import torch`.");
  m.def("device_start", &start, py::arg("memory"), "Makes the device; once a process.");
  m.def("device_finish", &finish_autograd, py::call_guard<py::gil_scoped_release>(),
        "Waits until autograd's threads are done with what they hold of Python; before the interpreter ends.");
  m.def("device_current", &current_chip, "The chip that hx without an index means in this thread.");
  m.def("device_exchange", &exchange_current_chip, py::arg("chip"), "Changes it and returns what it was.");
  m.def("device_exchange_kernel_chip", &exchange_kernel_chip, py::arg("chip"),
        "The chip in whose memory this thread's CPU tensors are made, -1: none; returns what it was.");
  m.def(
      "device_generator", [](int chip) { return default_generator(chip); }, py::arg("chip"),
      "The chip's default generator of random numbers.");
  m.def(
      "device_op_counts",
      [] {
        py::dict counts;
        for (const Operator* op : operators())
          if (const uint64_t boxed = op->boxed, fast = op->fast; boxed + fast > 0)
            counts[py::str(op->name)] = py::make_tuple(fast, boxed);
        return counts;
      },
      "Operator -> (runs by its fast path, runs by the general one).");
  m.def("device_output_copies", &output_copies, "Outputs that were copied because a kernel allocated them elsewhere.");
  m.def("device_fallback", &set_fallback_mode, py::arg("mode"), "0: run without a fast path; 1: warn once; 2: raise.");
  m.def(
      "device_segment_offset",
      [](uintptr_t data, size_t nbytes) {
        return memory().segment_offset(memory().arenas, reinterpret_cast<const void*>(data), nbytes);
      },
      py::arg("data"), py::arg("nbytes"), "Where a range lies in this process's segment; -1: in no chip's memory.");
}

}  // namespace hxcomm::device
