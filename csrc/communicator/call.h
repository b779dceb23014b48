// One collective call as the communicator sees it: what the caller asked for, already checked by the front end.
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "core/errors.h"
#include "core/executor.h"
#include "core/plan.h"
#include "core/types.h"

namespace hxcomm {

enum class OpCode : uint8_t {  // the order of hxcomm.algorithms.OPS
  all_reduce = 0,
  broadcast = 1,
  reduce = 2,
  all_gather = 3,
  reduce_scatter = 4,
  gather = 5,
  scatter = 6,
  all_to_all = 7,
  barrier = 8,
  send = 9,  // the two between two ranks
  recv = 10,
  put = 11,  // the three on a window
  signal = 12,
  wait_signal = 13,
};
constexpr int kOpCodes = 14;
const char* op_name(OpCode op);
constexpr bool is_point_to_point(OpCode op) { return op == OpCode::send || op == OpCode::recv; }
constexpr bool is_one_sided(OpCode op) { return op >= OpCode::put; }
constexpr bool reduces(OpCode op) {
  return op == OpCode::all_reduce || op == OpCode::reduce || op == OpCode::reduce_scatter;
}

// The blocks of one buffer. One is kept in place, because that is what all_reduce has, and an allocation costs as much
// as a tenth of a whole small operation.
class Blocks {
 public:
  void push_back(Block block) {
    if (n_ == 0) {
      first_ = block;
    } else {
      if (more_.empty()) more_.push_back(first_);
      more_.push_back(block);
    }
    ++n_;
  }
  size_t size() const { return n_; }
  const Block* data() const { return more_.empty() ? &first_ : more_.data(); }
  const Block& operator[](size_t i) const { return data()[i]; }
  const Block* begin() const { return data(); }
  const Block* end() const { return data() + n_; }

 private:
  Block first_;
  std::vector<Block> more_;  // all of them, where there are several
  size_t n_ = 0;
};

// A shape for messages and HXCOMM_CHECK=shape; cut after eight dimensions.
struct Shape {
  static constexpr size_t kMaxDims = 8;
  int64_t extents[kMaxDims] = {};
  size_t n_dims = 0;

  void assign(const int64_t* first, size_t n) {
    n_dims = std::min(n, kMaxDims);
    std::copy_n(first, n_dims, extents);
  }
};

struct Call {
  OpCode op{};
  DType dtype = DType::uint8;
  ReduceOp reduce_op = ReduceOp::sum;  // of ops that reduce
  double factor = 1;                   // PREMUL_SUM: of this rank; it may differ by rank
  DeviceKind device = DeviceKind::cpu;
  bool uneven = false;  // counts differ by pair (all_to_all) or rank (reduce_scatter); compared from the descriptors
  int32_t root = -1;    // of a send or recv: the peer, -1 for any source; on a window: the other rank
  int32_t tag = 0;      // of a send or recv
  int32_t hints = 0;    // what the caller asks the planner for; 0: nothing
  uint64_t window = 0;  // one-sided: its id
  uint64_t offset = 0;  // of a put: where in the other rank's part, in elements
  uint64_t count = 0;   // elements of one block, equal on every rank (0 where uneven)
  Blocks input;         // as many as the plan's layout has blocks here
  Blocks output;
  Shape shape;              // of the caller's tensor
  int64_t timeout_ns = 0;   // from the moment the call is posted
  bool name_first = false;  // where that passes, name only the first of the ranks that are missing
  int64_t issue_ps = -1;    // of a collective: when this rank calls it, in virtual time; -1: not noted
  uint64_t ticket = 0;      // the caller's number of it
};

// A collective that all ranks have begun, and when each called it in virtual time.
struct TimedCall {
  uint64_t ticket;
  OpCode op;
  int32_t root;
  std::shared_ptr<const Plan> plan;
  uint64_t nbytes;  // of the longest block on any rank
  size_t item_bytes;
  std::vector<int64_t> issued_ps;  // by rank
};

// What a group has done so far with one algorithm of one op, or with messages (calls and elements only, an empty plan;
// counted where GroupConfig::keep_statistics). Written by the group's driver, read by anybody.
struct Statistic {
  OpCode op;
  int32_t root;
  DType dtype;
  std::shared_ptr<const Plan> plan;
  std::atomic<uint64_t> calls{0};
  std::atomic<uint64_t> elements{0};   // of one block (the mean where they differ) per call, added up
  std::atomic<int64_t> time_ns{0};     // from becoming the head of the queue to the end
  std::atomic<int64_t> waiting_ns{0};  // of that, with nothing to do; counted where GroupConfig::keep_statistics
};

// What a planner answers for a call: which plan to run, and how long a window of it to run at a time.
struct Choice {
  std::shared_ptr<const Plan> plan;
  uint64_t segment_bytes = 0;              // window of one block, in bytes
  std::shared_ptr<Statistic> statistic{};  // filled in by the group
};

// What a choice may depend on. All but the hints is equal on every rank of a call that is not a mismatch.
struct ChoiceKey {
  OpCode op;
  DType dtype;
  ReduceOp reduce_op;
  int32_t root;
  uint64_t nbytes;  // of one block; 0 for uneven calls, whose counts differ by rank
  bool mapped;      // peers reach the tensors themselves, so nothing needs to be staged
  int32_t hints;    // may differ by rank; what the choice then is may not
  bool operator==(const ChoiceKey&) const = default;
};
using Planner = std::function<Choice(const ChoiceKey&)>;

// A posted call on its way. Owned by the group's queue and by the Work that the caller holds.
struct Op {
  Call call;
  Choice choice;
  std::string refusal;      // not empty: the front end refused the call; it only tells the peers so
  char call_site[24] = {};  // "train.py:41" where that is traced
  int64_t posted_ns = 0;
  int64_t deadline_ns = 0;
  // Run once, by whichever thread finishes the op, without the group's locks; null where it succeeded.
  std::function<void(const Error*)> on_finish;

  // Owned by whoever holds the group's driver lock.
  enum class Phase : uint8_t { begin, arriving, agreeing, running };
  Phase phase = Phase::begin;
  uint64_t sequence = 0;        // of the current segment
  uint64_t first_sequence = 0;  // of the first: the one messages name
  int64_t record = -1;          // its number in the flight ring, once it is there
  uint64_t low = 0;             // the window's first element
  uint64_t window = 0;
  uint64_t longest = 0;    // elements of the longest block on any rank
  size_t next_local = 0;   // the next rank of this host to look at, as the group lists them
  int64_t blocked_ns = 0;  // when it last found nothing to do; 0: never, or nobody measures
  int64_t waited_ns = 0;   // from then until it was tried again, in total
  Execution execution;

  bool mapped() const { return choice.plan && !choice.plan->is_private; }

  // Written last by the driver (release); anybody may read them after seeing `finished` (acquire).
  int source = -1;  // of a recv: the rank whose message it met
  std::unique_ptr<Error> error;
  std::atomic<bool> finished{false};
};

}  // namespace hxcomm
