// The device's part of hxcomm._C.
#pragma once

#include <torch/csrc/utils/pybind.h>

namespace hxcomm::device {

void bind(py::module_& m);

}  // namespace hxcomm::device
