// The word by which a rank tells another one that its puts into a window are there.
//
// One per window and ordered pair of ranks; it counts, and never goes back. It lies in the segment of the rank that
// signals; of a rank of another host, a mirror of it in the process that waits. A template over the atomics for the
// reason that core/line.h gives.
#pragma once

#include <cstdint>

#include "core/line.h"

namespace hxcomm {

template <class Atomics>
struct alignas(64) BasicSignalLine {
  typename Atomics::template Atomic<uint64_t> signals;  // written by the rank that signals; a mirror: by who hears it

  // Hands over all that this rank has put so far. Whoever calls it holds a lock: there is one writer at a time.
  void signal() { signals.store(signals.load(std::memory_order_relaxed) + 1, std::memory_order_release); }
  // Once it is n, what was put before the n-th signal may be read, and what its rank read before may be overwritten.
  uint64_t signalled() const { return signals.load(std::memory_order_acquire); }
};
using SignalLine = BasicSignalLine<NativeAtomics>;
static_assert(sizeof(SignalLine) == 64);

}  // namespace hxcomm
