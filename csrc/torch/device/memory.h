// Where tensors on hx live: the chips' arenas in this process's shared segment, handed over as a table of functions.
#pragma once

#include <c10/core/Allocator.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/Device.h>

#include "communicator/memory_api.h"

namespace hxcomm::device {

constexpr c10::DeviceType kHx = c10::DeviceType::PrivateUse1;

// Registers the allocator of hx; the device is made when it is first asked.
void prepare_memory();
// Takes the table. Once, before anything else below.
void start_memory(const MemoryApi& api);
bool is_started();
void ensure_started();  // calls Python to make the device, where it is not made yet
const MemoryApi& memory();

inline bool in_chip_memory(const void* data) {
  const MemoryApi& m = memory();
  return static_cast<uint64_t>(static_cast<const char*>(data) - m.base) < static_cast<uint64_t>(m.chips) * m.nbytes;
}

// Throws in a forked child: the chips' memory is not mapped there.
void check_not_forked();

// The chip that this thread's `hx` without an index means.
int current_chip();
void set_current_chip(int chip);  // throws where there is no such chip
int exchange_current_chip(int chip);

// While an operation runs as a CPU kernel, this thread's CPU allocations come from this chip's arena: so its outputs
// land where they belong. -1: they come from the host, as always.
int exchange_kernel_chip(int chip);

c10::DeviceAllocator* chip_allocator();
c10::Allocator* host_allocator();  // the proxy that stands in for torch's CPU allocator
c10::Allocator* pinned_allocator();
bool is_pinned(const void* data);

}  // namespace hxcomm::device
