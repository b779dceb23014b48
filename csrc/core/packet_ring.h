// A bounded ring of packets from one rank to one other: what point-to-point messages travel in on a host.
//
// The ring lies in its producer's segment, its two counters in the lines of the two ranks, each written by its owner
// only. A template over the atomics for the reason that core/line.h gives.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/line.h"

namespace hxcomm {

// One per rank and peer, in the rank's control page; written by that rank.
template <class Atomics>
struct alignas(64) BasicPairLine {
  template <class T>
  using Atomic = typename Atomics::template Atomic<T>;

  Atomic<uint64_t> ring_offset;  // where its ring to the peer lies in its segment; 0: it has sent nothing yet
  Atomic<uint64_t> produced;     // packets put into that ring
  Atomic<uint64_t> consumed;     // packets taken out of the peer's ring to it

  // Relaxed: handed over by the first packet.
  void set_ring_offset(uint64_t offset) { ring_offset.store(offset, std::memory_order_relaxed); }
  uint64_t offset_of_ring() const { return ring_offset.load(std::memory_order_relaxed); }
  // The packets are whole; the peer may read them once it has seen the number.
  void publish_produced(uint64_t n) { produced.store(n, std::memory_order_release); }
  uint64_t packets_produced() const { return produced.load(std::memory_order_acquire); }
  // The packets have been copied out; the peer may overwrite them once it has seen the number.
  void publish_consumed(uint64_t n) { consumed.store(n, std::memory_order_release); }
  uint64_t packets_consumed() const { return consumed.load(std::memory_order_acquire); }
};
using PairLine = BasicPairLine<NativeAtomics>;
static_assert(sizeof(PairLine) == 64);

enum class PacketKind : uint8_t {
  eager = 1,     // a whole message
  announce = 2,  // a message that does not fit in a packet: its sender waits for `request` or, of device hx, `taken`
  request = 3,   // the receiver has a buffer for the announced message
  data = 4,      // a piece of a requested message
  refuse = 5,    // the message met a receive that it does not fit; the payload says why
  taken = 6,     // the receiver has copied the announced message out of its sender's tensor
};

struct Packet {
  static constexpr size_t kPayloadBytes = 16 << 10;
  PacketKind kind;
  uint8_t dtype;
  uint8_t device;  // DeviceKind of the sender's tensor
  uint32_t payload_bytes;
  int32_t tag;
  uint64_t message;  // numbers a sender's messages to one peer; in request, refuse and taken, the peer's number
  uint64_t count;    // elements of the whole message
  uint64_t offset;   // bytes; data: of the payload in the message; announce of hx: of the tensor in its segment
  alignas(64) std::byte payload[kPayloadBytes];
};

constexpr uint64_t kRingPackets = 16;
constexpr size_t kRingBytes = kRingPackets * sizeof(Packet);

}  // namespace hxcomm
