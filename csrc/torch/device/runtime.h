// Registers with torch the device guard and the hooks of hx: current device, streams, events, generators.
#pragma once

namespace hxcomm::device {

void prepare_runtime();          // in `import torch`
bool start_autograd(int chips);  // when the device is made; whether it had to start threads
void start_profiler();           // the same

}  // namespace hxcomm::device
