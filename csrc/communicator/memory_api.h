// What the torch glue may know of the chips' memory: a second versioned table of functions in a PyCapsule, as api.h.
#pragma once

#include <cstddef>
#include <cstdint>

namespace hxcomm {

constexpr uint32_t kMemoryApiVersion = 1;
constexpr const char* kMemoryCapsule = "hxcomm._core.memory";

// One number of an allocator's statistics: now, at most so far, added and taken away in total.
struct MemoryCounter {
  int64_t current, peak, added, removed;
};

struct MemoryStatistics {
  MemoryCounter allocations, active, segments, allocated_bytes, active_bytes, reserved_bytes, requested_bytes;
  int64_t ooms;
};

// Functions are thread-safe and need no GIL. A chip is 0 to chips - 1; its memory begins at base + chip * nbytes.
struct MemoryApi {
  uint32_t version;
  int32_t chips;
  uint64_t nbytes;  // of one chip
  char* base;
  void* arenas;                                              // the first argument of each function
  void* (*allocate)(void* arenas, int chip, size_t nbytes);  // nullptr: no memory
  size_t (*release)(void* arenas, void* block);              // returns the bytes that were asked for
  size_t (*trim)(void* arenas, int chip);
  void (*statistics)(void* arenas, int chip, MemoryStatistics* statistics);
  void (*reset_peaks)(void* arenas, int chip);
  void (*reset_totals)(void* arenas, int chip);
  // Blocks released from now on are kept until unhold(): for peers that are still reading them.
  uint64_t (*hold)(void* arenas, int chip);
  void (*unhold)(void* arenas, int chip, uint64_t token);
  // Where a range lies in this process's segment, as a peer that maps it addresses it; -1: in no chip's memory.
  int64_t (*segment_offset)(void* arenas, const void* data, size_t nbytes);
};

class Arenas;
// A table for these arenas; both live as long as the process's Runtime.
MemoryApi memory_api(Arenas& arenas);

}  // namespace hxcomm
