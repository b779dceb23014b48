// What ranks share: the line a rank publishes its progress in, and the protocol's few memory orders.
//
// One thread of one rank writes a field, its peers read it; every field names its writer. The only words that peers
// write are the doorbell, the sleeper's flag's reader side excepted, and the abort word (compare-and-swap from 0).
#pragma once

#include <atomic>
#include <cstdint>

namespace hxcomm {

static_assert(std::atomic<uint64_t>::is_always_lock_free, "shared-memory flags need lock-free 64-bit atomics");

// progress = sequence * 2^16 + number of finished rounds. One comparison answers "has that peer finished round t of
// operation s", and counters agree after ranks ran different plans.
constexpr uint64_t kRoundBits = 16;
constexpr uint32_t kMaxRounds = (1u << kRoundBits) - 2;

constexpr uint64_t progress_value(uint64_t sequence, uint64_t finished_rounds) {
  return (sequence << kRoundBits) + finished_rounds;
}

// One cache line per rank and group. A peer that sees an arrival finds all it needs in the line it just fetched.
struct alignas(64) Line {
  std::atomic<uint64_t> progress;           // written by its rank only (release); peers read with acquire
  std::atomic<uint64_t> fingerprint[2];     // by parity of the sequence; written by its rank before the arrival
  std::atomic<uint64_t> scratch_offset[2];  // where this rank's scratch lies in its segment; as fingerprint
  std::atomic<uint64_t> membership;         // the group's nonce while the rank is a member, 0 once it has left
};
static_assert(sizeof(Line) == 64);

// Set once by any rank of the group, its own or a peer's: 0 -> {cause, origin, subject}. On a line of its own, because
// every waiting rank polls its own abort word and must not steal the peers' progress lines for that.
struct alignas(64) AbortLine {
  std::atomic<uint64_t> word;
};

enum class AbortCause : uint8_t {
  none = 0,
  peer_died = 1,
  peer_left = 2,  // a peer that was needed had left the group
  timeout = 3,
  called = 4,       // abort()
  interrupted = 5,  // Ctrl-C while blocked
  left = 6,         // in a rank's own word only: it has left the group itself
};

constexpr uint64_t abort_word(AbortCause cause, uint32_t origin, uint32_t subject) {
  return (uint64_t{static_cast<uint8_t>(cause)} << 56) | (uint64_t{origin & 0xFFFFFFu} << 32) | subject;
}
constexpr AbortCause abort_cause(uint64_t word) { return static_cast<AbortCause>(word >> 56); }
constexpr uint32_t abort_origin(uint64_t word) { return static_cast<uint32_t>(word >> 32) & 0xFFFFFFu; }
constexpr uint32_t abort_subject(uint64_t word) { return static_cast<uint32_t>(word); }

// At the start of every segment: whose it is, and how to wake that process.
struct alignas(64) SegmentHeader {
  uint64_t magic;
  uint32_t version;
  int32_t pid;
  uint8_t nonce[16];
  alignas(64) std::atomic<uint32_t> sleepers;  // written by its process: threads about to sleep on the doorbell
  alignas(64) std::atomic<uint32_t> doorbell;  // incremented by whoever rings; slept on with futex
};

constexpr uint64_t kSegmentMagic = 0x314D4F4343585848ull;  // "HXXCCOM1"
constexpr uint32_t kProtocolVersion = 1;

}  // namespace hxcomm
