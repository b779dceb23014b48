// Checks the protocol of core/line.h, packet_ring.h, notes.h and signal.h: their own functions, in many schedules of 2
// and 3 ranks, under every reordering that C++ allows. Then once more without each of their memory orders, which must
// be noticed.
//
// What is played is what communicator/ and core/executor.h do with them, without plans and messages: the hand-over of
// an operation, sleeping and waking, abort and its acknowledgement, notes, leaving, a ring of packets, and a window
// with its signals.
#include <cstdint>
#include <iostream>
#include <string>
#include <vector>

#include "core/line.h"
#include "core/packet_ring.h"
#include "core/signal.h"
#include "tests/model/relacy_atomics.h"

using namespace hxcomm;
using namespace hxcomm::model;

namespace {

using rl::thread_id_t;
constexpr uint64_t kNonce = 7;

struct Rank {
  BasicLine<RelacyAtomics> line;
  BasicAbortLine<RelacyAtomics> abort;
  BasicDoorbell<RelacyAtomics> doorbell;
  Cell scratch[2], result[2];  // by parity of the sequence
  Cell reason;
  Cell foreign;                            // of a host's leader: what ranks of other hosts call
  BasicPairLine<RelacyAtomics> to_next;    // what this rank says about its ring to the next one
  BasicPairLine<RelacyAtomics> from_last;  // and about the ring of the one before
  Cell packets[2];
  Cell window;                         // what the rank before puts into
  BasicSignalLine<RelacyAtomics> put;  // to the next rank: it has put
  BasicSignalLine<RelacyAtomics> got;  // to the rank before: what it put has been read
  BasicNoteTag<RelacyAtomics> note;
  Cell text;
};

void expect(bool holds, const char* what, const std::source_location& where = std::source_location::current()) {
  if (!holds) rl::ctx().fail_test(what, rl::test_result_user_assert_failed, info_of(where));
}

void yield(const std::source_location& where = std::source_location::current()) { rl::yield(1, info_of(where)); }

// N ranks that know each other: before() is the bootstrap, which orders what each wrote before with all that follows.
template <class Scenario, thread_id_t N>
struct Ranks : rl::test_suite<Scenario, N> {
  Rank ranks[N];

  void before() {
    for (Rank& rank : ranks) {
      rank.line.progress.store(0, std::memory_order_relaxed);
      for (uint64_t sequence : {0, 1}) {
        rank.line.set_fingerprint(sequence, 0);
        rank.line.set_scratch_offset(sequence, 0);
      }
      rank.line.verdict.store(0, std::memory_order_relaxed);
      rank.line.join(kNonce);
      rank.abort.word.store(0, std::memory_order_relaxed);
      rank.abort.acknowledged.store(0, std::memory_order_relaxed);
      rank.note.withdraw();
      rank.doorbell.sleepers.store(0, std::memory_order_relaxed);
      rank.doorbell.rings.store(0, std::memory_order_relaxed);
      rank.to_next.set_ring_offset(0);
      rank.to_next.produced.store(0, std::memory_order_relaxed);
      rank.from_last.consumed.store(0, std::memory_order_relaxed);
      rank.put.signals.store(0, std::memory_order_relaxed);
      rank.got.signals.store(0, std::memory_order_relaxed);
    }
  }

  void spin_until(thread_id_t peer, uint64_t value) {
    while (!ranks[peer].line.has_reached(value)) yield();
  }

  void ring_sleepers(thread_id_t me) {
    BasicDoorbell<RelacyAtomics>::fence_after_publishing();
    for (thread_id_t peer = 0; peer < N; ++peer)
      if (peer != me && ranks[peer].doorbell.has_sleepers()) ranks[peer].doorbell.ring();
  }

  template <class Condition>
  void sleep_until(thread_id_t me, Condition&& holds) {
    auto& doorbell = ranks[me].doorbell;
    while (!holds()) {
      const uint32_t rings = doorbell.announce_sleep();
      if (!holds()) doorbell.rings.sleep_while(rings);
      doorbell.withdraw_sleep();
    }
  }
};

// Operations as an executor runs them: stage, arrive, judge, read the peers' scratch, store to the peers' scratch,
// publish a round, wait for it. Three, so that a slot is used again, two operations after.
template <thread_id_t N>
struct HandOver : Ranks<HandOver<N>, N> {
  static constexpr const char* kName = "hand over";

  static uint64_t contribution(uint64_t rank, uint64_t sequence) { return (rank + 1) * 100 + sequence; }
  static uint64_t offset(uint64_t rank, uint64_t sequence) { return (rank + 1) * 4096 + sequence; }

  void thread(thread_id_t me) {
    for (uint64_t sequence = 1; sequence <= 3; ++sequence) {
      Rank& own = this->ranks[me];
      const uint64_t parity = sequence & 1;
      own.scratch[parity].store(contribution(me, sequence));
      own.line.set_scratch_offset(sequence, offset(me, sequence));
      own.line.set_fingerprint(sequence, sequence);
      own.line.publish(progress_value(sequence, 1));
      for (thread_id_t peer = 0; peer < N; ++peer) this->spin_until(peer, progress_value(sequence, 1));

      uint64_t sum = 0, want = 0;
      for (thread_id_t peer = 0; peer < N; ++peer) {
        const Rank& rank = this->ranks[peer];
        expect(rank.line.fingerprint_of(sequence) == sequence, "the fingerprint of another operation");
        expect(rank.line.scratch_offset_of(sequence) == offset(peer, sequence), "the scratch of another operation");
        sum += rank.scratch[parity].load();
        want += contribution(peer, sequence);
      }
      expect(sum == want, "a stale contribution");

      const auto owner = static_cast<thread_id_t>(sequence % N);
      if (me == owner)
        for (Rank& rank : this->ranks) rank.result[parity].store(sum);
      own.line.publish(progress_value(sequence, 2));
      this->spin_until(owner, progress_value(sequence, 2));
      expect(own.result[parity].load() == want, "a stale result");
    }
  }
};

// Ranks that sleep while they wait. A wake-up that is lost leaves a rank asleep for ever, which Relacy reports.
template <thread_id_t N>
struct SleepAndWake : Ranks<SleepAndWake<N>, N> {
  static constexpr const char* kName = "sleep and wake";

  void thread(thread_id_t me) {
    for (uint64_t value = 1; value <= 2; ++value) {
      this->ranks[me].line.publish(value);
      this->ring_sleepers(me);
      for (thread_id_t peer = 0; peer < N; ++peer)
        this->sleep_until(me, [&] { return this->ranks[peer].line.has_reached(value); });
    }
  }
};

// The last rank waits, spinning or asleep, for what never comes; all others end the group, at once and each for a
// reason of its own.
template <thread_id_t N>
struct Abort : Ranks<Abort<N>, N> {
  static constexpr const char* kName = "abort";

  void abort(thread_id_t me) {
    Rank& own = this->ranks[me];
    if (own.abort.is_set()) return;
    own.reason.store(100 + me);
    const uint64_t word = abort_word(AbortCause::called, me, me);
    if (!own.abort.set(word)) return;
    for (thread_id_t peer = 0; peer < N; ++peer)
      if (peer != me && this->ranks[peer].line.is_member(kNonce)) this->ranks[peer].abort.set(word);
    this->ring_sleepers(me);
    own.doorbell.ring();
  }

  void thread(thread_id_t me) {
    Rank& own = this->ranks[me];
    if (me + 1 < N)
      abort(me);
    else if (rl::rand(2) == 0)
      while (!own.abort.is_set()) yield();
    else
      this->sleep_until(me, [&] { return own.abort.is_set(); });
    const uint64_t word = own.abort.cause();
    const uint32_t origin = abort_origin(word);
    expect(abort_cause(word) == AbortCause::called && origin + 1 < N, "no cause that anybody had");
    expect(this->ranks[origin].reason.load() == 100 + origin, "the reason of another cause");
    expect(own.abort.cause() == word, "a second cause instead of the first");
  }
};

// Rank 0 ends the group while the others store into its memory, and uses that memory again once each has acknowledged.
template <thread_id_t N>
struct Acknowledge : Ranks<Acknowledge<N>, N> {
  static constexpr const char* kName = "acknowledge";

  void thread(thread_id_t me) {
    Rank& own = this->ranks[me];
    Rank& first = this->ranks[0];
    if (me == 0) {
      const uint64_t word = abort_word(AbortCause::called, me, me);
      for (Rank& rank : this->ranks) rank.abort.set(word);
      for (thread_id_t peer = 1; peer < N; ++peer)
        while (!this->ranks[peer].abort.is_acknowledged()) yield();
      for (Cell& cell : own.scratch) cell.store(7);
    } else {
      while (!own.abort.is_set()) {
        first.scratch[me - 1].store(me);
        yield();
      }
      own.abort.acknowledge();
    }
  }
};

// Each rank leaves a note for all.
template <thread_id_t N>
struct Notes : Ranks<Notes<N>, N> {
  static constexpr const char* kName = "notes";

  void thread(thread_id_t me) {
    Rank& own = this->ranks[me];
    own.text.store(100 + me);
    own.note.publish(kNonce);
    for (thread_id_t peer = 0; peer < N; ++peer) {
      while (this->ranks[peer].note.about() != kNonce) yield();
      expect(this->ranks[peer].text.load() == uint64_t{100} + peer, "another text");
    }
  }
};

// All but rank 0 publish what they owe, read its scratch once more, and leave. Rank 0 must not take one that has done
// its part for one that it misses, and gives its scratch back when all have left.
template <thread_id_t N>
struct Leave : Ranks<Leave<N>, N> {
  static constexpr const char* kName = "leave";

  void thread(thread_id_t me) {
    Rank& own = this->ranks[me];
    constexpr uint64_t kLast = progress_value(1, 2);
    if (me == 0) {
      own.scratch[1].store(1);
      own.line.publish(progress_value(1, 1));
      for (thread_id_t peer = 1; peer < N; ++peer) {
        const auto& line = this->ranks[peer].line;
        while (!line.has_reached(kLast)) {
          if (!line.is_member(kNonce)) expect(line.has_reached(kLast), "a rank that owed nothing is missed");
          yield();
        }
      }
      for (thread_id_t peer = 1; peer < N; ++peer)
        while (this->ranks[peer].line.is_member(kNonce)) yield();
      own.scratch[1].store(2);
    } else {
      this->spin_until(0, progress_value(1, 1));
      own.line.publish(kLast);
      expect(this->ranks[0].scratch[1].load() == 1, "scratch that was given back");
      own.line.leave();
      this->ring_sleepers(me);
    }
  }
};

// Each rank sends five packets to the next one through a ring of two, receives those of the one before, and leaves. One
// that has left and whose ring is empty will send no more, so nobody may be found missing.
template <thread_id_t N>
struct PacketRing : Ranks<PacketRing<N>, N> {
  static constexpr const char* kName = "packet ring";
  static constexpr uint64_t kPackets = 5, kCapacity = 2, kOffset = 4096;

  void thread(thread_id_t me) {
    Rank& own = this->ranks[me];
    Rank& next = this->ranks[(me + 1) % N];
    Rank& last = this->ranks[(me + N - 1) % N];
    uint64_t produced = 0, consumed = 0;
    while (produced < kPackets || consumed < kPackets) {
      if (produced == 0) own.to_next.set_ring_offset(kOffset);
      if (produced < kPackets && produced - next.from_last.packets_consumed() < kCapacity) {
        own.packets[produced % kCapacity].store(100 * me + produced);
        own.to_next.publish_produced(++produced);
      }
      const bool left = !last.line.is_member(kNonce);
      if (last.to_next.packets_produced() > consumed) {
        expect(last.to_next.offset_of_ring() == kOffset, "the offset of a ring that is not there");
        expect(last.packets[consumed % kCapacity].load() == 100 * ((me + N - 1) % N) + consumed, "another packet");
        own.from_last.publish_consumed(++consumed);
      } else if (consumed < kPackets) {
        expect(!left, "a rank that owed nothing is missed");
      }
      yield();
    }
    own.line.leave();
  }
};

// The leader tells its host what it has learnt of the others, once all have arrived; one place for it suffices.
template <thread_id_t N>
struct Verdict : Ranks<Verdict<N>, N> {
  static constexpr const char* kName = "verdict";

  void thread(thread_id_t me) {
    for (uint64_t sequence = 1; sequence <= 2; ++sequence) {
      Rank& leader = this->ranks[0];
      this->ranks[me].line.publish(progress_value(sequence, 1));
      if (me == 0) {
        for (thread_id_t peer = 1; peer < N; ++peer) this->spin_until(peer, progress_value(sequence, 1));
        leader.foreign.store(100 + sequence);
        leader.line.publish_verdict(sequence, sequence == 2);
      }
      while (!leader.line.has_verdict(sequence)) yield();
      expect(leader.line.agreed() == (sequence == 2), "the verdict on another operation");
      expect(leader.foreign.load() == 100 + sequence, "the calls of another operation");
    }
  }
};

// Each rank puts three numbers into the window of the next one, one at a time: a signal says that one is there, and one
// back that it was read. Waiters spin or sleep.
template <thread_id_t N>
struct Window : Ranks<Window<N>, N> {
  static constexpr const char* kName = "window";

  void await(thread_id_t me, const BasicSignalLine<RelacyAtomics>& line, uint64_t value) {
    if (rl::rand(2) == 0)
      while (line.signalled() < value) yield();
    else
      this->sleep_until(me, [&] { return line.signalled() >= value; });
  }

  void thread(thread_id_t me) {
    Rank& own = this->ranks[me];
    Rank& next = this->ranks[(me + 1) % N];
    const thread_id_t last = (me + N - 1) % N;
    for (uint64_t number = 1; number <= 3; ++number) {
      await(me, next.got, number - 1);
      next.window.store(100 * me + number);
      own.put.signal();
      this->ring_sleepers(me);
      await(me, this->ranks[last].put, number);
      expect(own.window.load() == 100 * last + number, "another number than was put");
      own.got.signal();
      this->ring_sleepers(me);
    }
  }
};

// Runs a scenario in that many schedules, the same ones every time, and returns what went wrong in the first that
// failed, or "".
template <class Scenario>
std::string fault_of(rl::iteration_t schedules) {
  std::ostream nowhere(nullptr);
  rl::test_params params;
  params.iteration_count = schedules;
  params.execution_depth_limit = 100'000;
  params.output_stream = params.progress_stream = &nowhere;
  if (rl::simulate<Scenario>(params)) return "";
  return std::string(rl::test_result_str(params.test_result)) + " in schedule " + std::to_string(params.stop_iteration);
}

struct Check {
  std::string name;
  std::string (*fault)(rl::iteration_t schedules);
};

template <template <thread_id_t> class Scenario>
void add(std::vector<Check>& checks) {
  const std::string name = Scenario<2>::kName;
  checks.push_back({name + ", 2 ranks", fault_of<Scenario<2>>});
  checks.push_back({name + ", 3 ranks", fault_of<Scenario<3>>});
}

std::string first_fault(const std::vector<Check>& checks, rl::iteration_t schedules) {
  for (const Check& check : checks)
    if (const std::string fault = check.fault(schedules); !fault.empty()) return check.name + ": " + fault;
  return "";
}

}  // namespace

// Usage: line_model [schedules of each check]. Ends with 1 where a schedule of the protocol as it is fails.
int main(int argc, char** argv) {
  const rl::iteration_t schedules = argc > 1 ? std::stoul(argv[1]) : 10'000;
  std::vector<Check> checks;
  add<HandOver>(checks);
  add<SleepAndWake>(checks);
  add<Abort>(checks);
  add<Acknowledge>(checks);
  add<Notes>(checks);
  add<Leave>(checks);
  add<PacketRing>(checks);
  add<Verdict>(checks);
  add<Window>(checks);

  const std::string fault = first_fault(checks, schedules);
  std::cout << "as it is: " << (fault.empty() ? "right" : fault) << " (" << checks.size() << " checks of " << schedules
            << " schedules)" << std::endl;
  if (!fault.empty()) return 1;
  size_t caught = 0;
  const size_t total = weakenings.size();
  for (size_t i = 0; i < total; ++i) {
    weakenings.apply(i);
    const std::string found = first_fault(checks, schedules);
    caught += !found.empty();
    std::cout << weakenings[i].text() << ": " << (found.empty() ? "NOT CAUGHT" : "caught, " + found) << std::endl;
  }
  std::cout << "caught " << caught << " of " << total << std::endl;
  return 0;
}
