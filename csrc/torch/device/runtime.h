// Registers with torch the device guard and the hooks of hx: current device, streams, events, generators.
#pragma once

namespace hxcomm::device {

void prepare_runtime();          // in `import torch`
void start_autograd(int chips);  // when the device is made
void finish_autograd();          // before Python ends, without the GIL
void start_profiler();           // the same

}  // namespace hxcomm::device
