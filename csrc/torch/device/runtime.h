// Registers with torch the device guard and the hooks of hx: current device, streams, events, generators.
#pragma once

namespace hxcomm::device {

void start_runtime();            // once, after start_memory()
void start_autograd(int chips);  // once, after start_runtime()

}  // namespace hxcomm::device
