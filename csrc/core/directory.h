// Which groups a process has: for whoever looks at its segment from outside, without its help (hxcomm/inspection.py).
//
// A table at a fixed place of the segment's first page. Its process writes it; the group's control page says the rest.
#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>

#include "core/line.h"

namespace hxcomm {

struct DirectoryEntry {
  std::atomic<uint64_t> nonce;  // the group's; 0: the entry is free. Written last, and cleared first
  uint64_t control_offset;
};
static_assert(sizeof(DirectoryEntry) == 16);

// A process with more groups runs on; those that found no entry cannot be seen from outside.
struct Directory {
  static constexpr size_t kOffset = 256;
  std::array<DirectoryEntry, (4096 - kOffset) / sizeof(DirectoryEntry)> entries;
};
static_assert(sizeof(SegmentHeader) <= Directory::kOffset && Directory::kOffset + sizeof(Directory) == 4096);

}  // namespace hxcomm
