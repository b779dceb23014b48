#include "communicator/memory_api.h"

#include "core/arena.h"

namespace hxcomm {
namespace {

Arena& arena(void* arenas, int chip) { return static_cast<Arenas*>(arenas)->of_chip(chip); }

MemoryCounter counter(const ArenaCounter& from) { return {from.current, from.peak, from.added, from.removed}; }

}  // namespace

MemoryApi memory_api(Arenas& arenas) {
  return {
      .version = kMemoryApiVersion,
      .chips = arenas.chips(),
      .nbytes = arenas.bytes_per_chip(),
      .base = reinterpret_cast<char*>(arenas.base()),
      .arenas = &arenas,
      .allocate = [](void* a, int chip, size_t nbytes) { return arena(a, chip).allocate(nbytes); },
      .release =
          [](void* a, void* block) {
            const int chip = static_cast<Arenas*>(a)->chip_of(block);
            return chip >= 0 ? arena(a, chip).release(block) : 0;
          },
      .trim = [](void* a, int chip) { return arena(a, chip).trim(); },
      .statistics =
          [](void* a, int chip, MemoryStatistics* to) {
            const ArenaStatistics s = arena(a, chip).statistics();
            *to = {counter(s.allocations),     counter(s.active),
                   counter(s.segments),        counter(s.allocated_bytes),
                   counter(s.active_bytes),    counter(s.reserved_bytes),
                   counter(s.requested_bytes), s.ooms};
          },
      .reset_peaks = [](void* a, int chip) { arena(a, chip).reset_peaks(); },
      .reset_totals = [](void* a, int chip) { arena(a, chip).reset_totals(); },
      .hold = [](void* a, int chip) { return arena(a, chip).hold(); },
      .unhold = [](void* a, int chip, uint64_t token) { arena(a, chip).unhold(token); },
      .segment_offset = [](void* a, const void* data,
                           size_t nbytes) { return static_cast<Arenas*>(a)->segment_offset(data, nbytes); },
  };
}

}  // namespace hxcomm
