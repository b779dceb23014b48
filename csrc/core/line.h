// What ranks share: the line a rank publishes its progress in, its abort word and its doorbell, and the functions that
// hand memory over through them. Every memory order of the protocol between ranks stands in this file.
//
// One thread of one rank writes a field, its peers read it; every field names its writer. The only words that peers
// write are the doorbell and the abort word (compare-and-swap from 0).
//
// Templates over the atomics, so that csrc/tests/model runs these very functions under a model checker, also with each
// memory order weakened: an order that is not needed does not stand here.
#pragma once

#include <atomic>
#include <cstdint>

#include "core/futex.h"

namespace hxcomm {

static_assert(std::atomic<uint64_t>::is_always_lock_free, "shared-memory flags need lock-free 64-bit atomics");

struct NativeAtomics {
  template <class T>
  using Atomic = std::atomic<T>;
  static void full_fence() { std::atomic_thread_fence(std::memory_order_seq_cst); }
  static void wake_all(std::atomic<uint32_t>& word) { futex_wake_all(word); }
};

// progress = sequence * 2^16 + number of finished rounds. One comparison answers "has that peer finished round t of
// operation s", and counters agree after ranks ran different plans.
constexpr uint64_t kRoundBits = 16;
constexpr uint32_t kMaxRounds = (1u << kRoundBits) - 2;

constexpr uint64_t progress_value(uint64_t sequence, uint64_t finished_rounds) {
  return (sequence << kRoundBits) + finished_rounds;
}

// One cache line per rank and group. A peer that sees an arrival finds all it needs in the line it just fetched.
template <class Atomics>
struct alignas(64) BasicLine {
  template <class T>
  using Atomic = typename Atomics::template Atomic<T>;

  Atomic<uint64_t> progress;           // written by its rank only
  Atomic<uint64_t> fingerprint[2];     // by parity of the sequence; written by its rank before the arrival
  Atomic<uint64_t> scratch_offset[2];  // where this rank's scratch lies in its segment; as fingerprint
  Atomic<uint64_t> membership;         // the group's nonce while the rank is a member, 0 once it has left
  // Of its host's leader, where there are other hosts: sequence * 2 + whether all of them agreed on that operation.
  Atomic<uint64_t> verdict;

  // Hands over all that this rank has written so far, and takes back what its peers were given to read: they are done
  // with everything that the value says is finished.
  void publish(uint64_t value) { progress.store(value, std::memory_order_release); }
  uint64_t reached() const { return progress.load(std::memory_order_acquire); }
  // Once true, this rank may read what that one wrote before it published `value`, and overwrite what it read.
  bool has_reached(uint64_t value) const { return reached() >= value; }

  // Relaxed: handed over by publish() like any other memory; atomics only because peers may read them at any time.
  void set_fingerprint(uint64_t sequence, uint64_t value) {
    fingerprint[sequence & 1].store(value, std::memory_order_relaxed);
  }
  uint64_t fingerprint_of(uint64_t sequence) const { return fingerprint[sequence & 1].load(std::memory_order_relaxed); }
  void set_scratch_offset(uint64_t sequence, uint64_t value) {
    scratch_offset[sequence & 1].store(value, std::memory_order_relaxed);
  }
  uint64_t scratch_offset_of(uint64_t sequence) const {
    return scratch_offset[sequence & 1].load(std::memory_order_relaxed);
  }

  // Hands over what this rank has learnt of other hosts' calls. One word suffices: all ranks of the host have arrived
  // at this operation, so none looks for the verdict on an earlier one any more.
  void publish_verdict(uint64_t sequence, bool agreed) {
    verdict.store(sequence * 2 + (agreed ? 1 : 0), std::memory_order_release);
  }
  bool has_verdict(uint64_t sequence) const { return verdict.load(std::memory_order_acquire) >= sequence * 2; }
  bool agreed() const { return (verdict.load(std::memory_order_relaxed) & 1) != 0; }

  // Before anybody is told where the line lies.
  void join(uint64_t nonce) { membership.store(nonce, std::memory_order_relaxed); }
  // The rank has published all that it owes, and touches its peers' memory no more.
  void leave() { membership.store(0, std::memory_order_release); }
  // Once false, has_reached() gives the rank's last word, and memory that it used is free.
  bool is_member(uint64_t nonce) const { return membership.load(std::memory_order_acquire) == nonce; }
};
using Line = BasicLine<NativeAtomics>;
static_assert(sizeof(Line) == 64);

// Set once by any rank of the group, its own or a peer's: 0 -> {cause, origin, subject}. On a line of its own, because
// every waiting rank polls its own abort word and must not steal the peers' progress lines for that.
template <class Atomics>
struct alignas(64) BasicAbortLine {
  typename Atomics::template Atomic<uint64_t> word;
  typename Atomics::template Atomic<uint64_t> acknowledged;  // written by its rank only: 0, then 1 for good

  // False where another cause was first; that one stays. Release: the origin has written down the reason before.
  bool set(uint64_t cause) {
    uint64_t none = 0;
    return word.compare_exchange_strong(none, cause, std::memory_order_release, std::memory_order_relaxed);
  }
  bool is_set() const { return word.load(std::memory_order_relaxed) != 0; }  // for polling
  // Once not 0, the reason in the origin's memory may be read.
  uint64_t cause() const { return word.load(std::memory_order_acquire); }

  // The rank has seen the word, and touches its peers' memory no more, though it has not left the group.
  void acknowledge() { acknowledged.store(1, std::memory_order_release); }
  // Once true, memory that the rank could have stored to is free.
  bool is_acknowledged() const { return acknowledged.load(std::memory_order_acquire) != 0; }
};
using AbortLine = BasicAbortLine<NativeAtomics>;
static_assert(sizeof(AbortLine) == 64);

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

// A text that a process leaves for others in memory that they know already.
template <class Atomics>
struct BasicNoteTag {
  typename Atomics::template Atomic<uint64_t> tag;  // what the text is about, 0: nothing; written by its process only

  void withdraw() { tag.store(0, std::memory_order_relaxed); }
  void publish(uint64_t about) { tag.store(about, std::memory_order_release); }
  // Once it is what one looks for, the text may be read.
  uint64_t about() const { return tag.load(std::memory_order_acquire); }
};

// How to wake the threads of a process. A waiter announces itself, looks at what it waits for, and sleeps while the
// doorbell has the value that announcing gave. A publisher publishes, fences, and rings where it sees a sleeper.
template <class Atomics>
struct BasicDoorbell {
  template <class T>
  using Atomic = typename Atomics::template Atomic<T>;

  alignas(64) Atomic<uint32_t> sleepers;  // written by its process: threads about to sleep on the doorbell
  alignas(64) Atomic<uint32_t> rings;     // incremented by whoever rings; slept on with futex

  // Without the two fences a rank could go to sleep just as the flag it needs is set: either the publisher sees the
  // sleeper and rings, or the sleeper sees what was published. The load comes before the look at the flags (acquire),
  // or a ring that was for them would count as heard.
  uint32_t announce_sleep() {
    sleepers.fetch_add(1, std::memory_order_relaxed);
    Atomics::full_fence();
    return rings.load(std::memory_order_acquire);
  }
  void withdraw_sleep() { sleepers.fetch_sub(1, std::memory_order_relaxed); }

  // Between what was published and has_sleepers() of any doorbell.
  static void fence_after_publishing() { Atomics::full_fence(); }
  bool has_sleepers() const { return sleepers.load(std::memory_order_relaxed) != 0; }
  // Relaxed after fence_after_publishing(), which is a release too.
  void ring() {
    rings.fetch_add(1, std::memory_order_relaxed);
    Atomics::wake_all(rings);
  }
};
using Doorbell = BasicDoorbell<NativeAtomics>;

// At the start of every segment: whose it is, and how to wake that process.
struct alignas(64) SegmentHeader {
  uint64_t magic;
  uint32_t version;
  int32_t pid;
  uint8_t nonce[16];
  // Its threads sleep on descriptors, because they wait for other hosts, too: a ring is a write to its bell as well.
  std::atomic<uint32_t> sleeps_on_descriptors;
  Doorbell doorbell;
};

constexpr uint64_t kSegmentMagic = 0x314D4F4343585848ull;  // "HXXCCOM1"
constexpr uint32_t kProtocolVersion = 6;

}  // namespace hxcomm
