// What a rank says about its call, for its peers to read when fingerprints differ (and, for uneven calls, always).
//
// Two per rank and group, by parity of the sequence, behind the rank's line. Written by its rank before it publishes
// its arrival. A peer copies one once, with bounded reads, and checks every number in it: it is another process's
// memory.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>

#include "communicator/call.h"
#include "communicator/flight.h"
#include "core/line.h"
#include "core/packet_ring.h"

namespace hxcomm {

struct Descriptor {
  static constexpr int kMaxDims = Shape::kMaxDims;
  static constexpr size_t kTextBytes = 256;
  uint64_t sequence;
  int64_t issue_ps;  // when its rank called the op, in virtual time; -1: not noted
  uint8_t op, dtype, reduce_op, device, uneven, refused;
  uint8_t n_dims;  // shapes of more than 8 dimensions are cut
  uint8_t reserved;
  int32_t root;
  uint16_t n_input, n_output;  // blocks behind it
  uint64_t count;
  uint64_t plan_hash;
  int64_t shape[kMaxDims];
  char algorithm[32];
  char text[kTextBytes];  // why the call was refused
  // Behind it, for uneven calls and mapped plans: Extent inputs[world_size], outputs[world_size], of which the first
  // n_input and n_output are set.
};

struct Extent {
  uint64_t offset;  // of a block of hx memory in its rank's segment
  uint64_t count;   // elements
};

// Which group a control page belongs to, for whoever looks at it from outside (core/directory.h). Written by its rank
// before the directory names the page.
struct alignas(64) Identity {
  int32_t rank;
  int32_t world_size;
  char name[48];  // cut where it is longer
};

// What a rank keeps in its segment for one group, in this order: line, abort word, reason, identity, flight ring, two
// descriptors, pair lines, and room for the descriptors of other hosts' ranks, which its host's leader fills in when
// calls differ. hxcomm/inspection.py has the same offsets.
struct alignas(64) Control {
  static constexpr size_t kReasonBytes = 512;
  Line line;
  AbortLine abort;
  char reason[kReasonBytes];  // written by its rank before it sets an abort word of which it is the origin
  Identity identity;
  Flight flight;
};
static_assert(offsetof(Line, membership) == 40 && offsetof(Control, abort) == 64 && offsetof(Control, reason) == 128);
static_assert(offsetof(Control, identity) == 640 && offsetof(Identity, name) == 8 && offsetof(Control, flight) == 704);
static_assert(sizeof(Control) == 4864);

constexpr size_t descriptor_bytes(int world_size) {
  return (sizeof(Descriptor) + 2 * sizeof(Extent) * static_cast<size_t>(world_size) + 63) / 64 * 64;
}
constexpr size_t control_bytes(int world_size) {
  return sizeof(Control) + 2 * descriptor_bytes(world_size) +
         (sizeof(PairLine) + descriptor_bytes(world_size)) * static_cast<size_t>(world_size);
}

inline Descriptor& descriptor_at(Control& control, int world_size, uint64_t sequence) {
  std::byte* first = reinterpret_cast<std::byte*>(&control) + sizeof(Control);
  return *reinterpret_cast<Descriptor*>(first + (sequence & 1) * descriptor_bytes(world_size));
}
inline PairLine& pair_line_at(Control& control, int world_size, int peer) {
  std::byte* first = reinterpret_cast<std::byte*>(&control) + sizeof(Control) + 2 * descriptor_bytes(world_size);
  return reinterpret_cast<PairLine*>(first)[peer];
}
inline Descriptor& foreign_descriptor_at(Control& control, int world_size, int rank) {
  std::byte* first = reinterpret_cast<std::byte*>(&pair_line_at(control, world_size, world_size));
  return *reinterpret_cast<Descriptor*>(first + static_cast<size_t>(rank) * descriptor_bytes(world_size));
}
inline Extent* inputs_at(Descriptor& descriptor) { return reinterpret_cast<Extent*>(&descriptor + 1); }
inline Extent* outputs_at(Descriptor& descriptor, int world_size) { return inputs_at(descriptor) + world_size; }

// `segment`: where this rank's begins.
void write_descriptor(Descriptor& descriptor, const Op& op, int world_size, const std::byte* segment);

// 64 bits over everything that must be equal on every rank. `with_shape` is HXCOMM_CHECK=shape.
uint64_t fingerprint(const Op& op, bool with_shape);

// What every rank says about an operation, by rank.
using Descriptors = std::vector<Descriptor*>;

// The text of a MismatchError: a table rank | op | dtype | ... of all ranks, with the refusals quoted.
std::string mismatch_table(const Descriptors& descriptors, uint64_t sequence, const std::vector<std::string>& labels);

// Checks the counts of an uneven all_to_all or reduce_scatter of all ranks against each other. Returns "" and the
// largest count, or the text of the mismatch.
std::string compare_uneven(const Descriptors& descriptors, uint64_t sequence, const std::vector<std::string>& labels,
                           uint64_t* longest);

}  // namespace hxcomm
