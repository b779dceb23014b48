// A group of ranks that run collectives together: order, entry, fingerprints, deadlines, abort.
//
// Operations of a group run strictly in sequence; only the head of the queue stages, publishes and transfers. Whoever
// holds the driver lock advances the head. Every operation begins with everyone: a rank stages from its own input into
// its own scratch, publishes its fingerprint and arrival, waits for every peer's arrival, compares fingerprints, and
// only then touches a peer's memory. So nobody is more than one operation ahead, and two of everything (fingerprints,
// descriptors, scratch, by parity of the sequence) suffice.
#pragma once

#include <deque>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

#include "communicator/call.h"
#include "communicator/crossing.h"
#include "communicator/descriptor.h"
#include "communicator/one_sided.h"
#include "communicator/point_to_point.h"
#include "communicator/progress.h"
#include "transport/endpoint.h"

namespace hxcomm {

struct GroupConfig {
  std::string name;
  int rank = 0;
  int world_size = 1;
  std::vector<std::string> labels;  // "rank 3 (host b, pid 8286)", for messages
  uint64_t nonce = 1;               // equal on every rank, never used before, not 0
  uint64_t first_sequence = 1;
  int64_t spin_ns = -1;  // how long a waiter spins before it sleeps; -1: chosen from cores and ranks
  bool compare_shapes = false;
  std::string dump_folder;  // where an error leaves the flight ring; "": nowhere
  // Times the waits within operations (two looks at the clock each) and leaves the statistics to `progress` at the end.
  bool keep_statistics = false;
};

class Group : public std::enable_shared_from_this<Group> {
 public:
  // Allocates this rank's control page. Throws Error{init}.
  Group(std::shared_ptr<Endpoint> endpoint, std::shared_ptr<Progress> progress, GroupConfig config);
  ~Group();

  uint64_t control_offset() const { return control_offset_; }
  // Every peer must be attached before the first operation. Throws Error{init} when the offset is out of range.
  void attach(int rank, std::shared_ptr<Peer> peer, uint64_t control_offset);
  // Instead of attach(), for the ranks of other hosts; after it, before the first operation. By rank, the number of its
  // host and its process, to which the endpoint's wire is connected or will be.
  void cross(std::vector<int> hosts, std::vector<Nonce> processes);
  void set_label(int rank, std::string label) { config_.labels[static_cast<size_t>(rank)] = std::move(label); }
  void start(Planner planner, std::shared_ptr<TransferHook> hook);

  // Posts a call. Throws Error{usage} where the call cannot be planned, or the error that ended the group.
  std::shared_ptr<Op> post(Call call, std::function<void(const Error*)> on_finish = {});
  // Drives the group until `op` is finished or its deadline (or `timeout_ns` from now, if not negative) passes; a
  // deadline that passes aborts the group on all ranks. Throws the op's error, or Error{interrupted}.
  void wait(const std::shared_ptr<Op>& op, int64_t timeout_ns = -1);
  // One attempt to advance, for a caller who goes on with other work. Wakes the background thread if needed.
  void advance_in_background();
  // The front end refuses a call of this rank (wrong dtype, device, ...): it still takes its place in the sequence,
  // and the peers raise MismatchError quoting `reason`. Does not block and does not throw.
  void refuse(Call call, const std::string& reason) noexcept;

  // Ends the group on every rank: pending and later operations raise. Thread-safe, does not block.
  void abort(AbortCause cause, int subject, const std::string& reason);
  // Of `ranks`, those of this host that may still store to this rank's memory for an operation of this group: they
  // live, have not left and have not acknowledged that it has ended. `tell`: ends it for them, as this rank's doing,
  // and has them acknowledge; does not block, so ask again. Before leave().
  std::vector<int> not_fenced(const std::vector<int>& ranks, bool tell);
  // Ends the process of a rank of this host with SIGKILL.
  void kill(int rank) const;
  // Takes this rank out of the group: pending operations here fail, peers that still need it raise. Idempotent.
  void leave();
  bool alive() const;
  // For memory that peers may still touch after an operation on hx tensors has failed: `release` is called, from any
  // thread, once every peer has left the group or is dead.
  void keep_until_peers_left(std::function<void()> release);
  bool has_left() const { return left_.load(std::memory_order_relaxed); }

  int rank() const { return config_.rank; }
  int world_size() const { return config_.world_size; }
  // The host of each rank, by number.
  std::vector<int> hosts() const;
  const std::string& name() const { return config_.name; }
  // "rank 3 (host b, pid 8286) was killed by SIGKILL"; "" of a rank that is alive or whose process is not known.
  std::string death_of(int rank) const;
  // Takes the oldest of the collectives with an issue_ps that have begun here. False: there is none.
  bool next_timed(TimedCall* timed);
  uint64_t next_sequence() const { return next_sequence_.load(std::memory_order_relaxed); }
  std::vector<std::shared_ptr<const Statistic>> statistics() const;

  OneSided& one_sided() { return one_sided_; }

  bool has_posted() const { return posted_.load(std::memory_order_relaxed) > 0; }
  bool try_advance(bool look_at_clock);

 private:
  friend class Crossing;
  friend class Floor;
  friend class OneSided;
  friend class PointToPoint;
  enum class Step { moved, blocked, finished };
  using Finished = std::vector<std::shared_ptr<Op>>;

  Choice choose(const Call& call);
  void require_in_segment(const Call& call) const;
  std::shared_ptr<Statistic> statistic_of(const Call& call, const Choice& choice);  // needs planner_mutex_
  void count_message(const Op& op);
  void keep_statistics();
  std::shared_ptr<Op> post_message(std::shared_ptr<Op> op);
  std::shared_ptr<Op> enqueue(std::shared_ptr<Op> op);
  bool advance(Finished* finished, bool look_at_clock);  // needs driver_
  Step step(Op& op);
  Step begin(Op& op);
  Step arrive(Op& op);
  Step judge(Op& op);
  Step agree(Op& op);
  Step enter(Op& op);
  void compare_counts(Op& op);
  void look_abroad(Op& op);
  void bind_peers(Op& op);
  void note_times(const Op& op);
  Descriptors descriptors(uint64_t sequence) const;
  // A rank of another host has ended the group.
  void end_by(int rank, uint64_t word, std::string_view reason);
  void pass_on_abort();
  std::function<bool()> all_left() const;
  void pay_debts();
  Step run(Op& op);
  void end(Op& op, std::unique_ptr<Error> error);
  struct Awaited {
    int peer = 0;
    uint64_t value = 0;      // that the peer's progress must reach
    bool from_afar = false;  // instead, something from another host: of the peer, or (own rank) of several
  };
  Awaited awaited_by(const Op& op) const;  // what an op that is blocked waits for
  void check_failures(Op& op, bool look_at_clock);
  bool try_lock(std::mutex& mutex);
  bool spin();
  bool spin_abroad(const Awaited& awaited);
  bool drive(const Op& op);
  void complete(Finished& finished);
  std::unique_ptr<Error> failure(const Op* op) const;
  std::string dump(const std::string& why) const;
  std::string reason_of(uint64_t word) const;
  std::string waiting_for(const Op& op) const;
  std::string waiting_abroad_for(const Op& op, const Awaited& awaited) const;
  int left_by(const Op& op);
  void publish(uint64_t value);
  void ring_sleepers();
  void ensure_scratch(uint64_t sequence, size_t nbytes);
  Control& control(int rank) const { return *controls_[static_cast<size_t>(rank)]; }
  // What `rank` says about its messages with `peer`.
  PairLine& pair_line(int rank, int peer) const { return pair_line_at(control(rank), config_.world_size, peer); }
  Control& own() const { return control(config_.rank); }
  void on_death(const Peer& peer);
  void acknowledge_abort();
  bool forked() const;  // this process is a child of the one that made the group
  void refuse_after_fork() const;

  std::shared_ptr<Endpoint> endpoint_;
  std::shared_ptr<Progress> progress_;
  GroupConfig config_;
  uint64_t control_offset_ = 0;
  std::vector<std::shared_ptr<Peer>> peers_;  // own rank: null
  std::vector<Control*> controls_;
  std::vector<Line*> lines_;
  std::vector<std::byte*> segments_;  // base of each rank's segment
  std::vector<size_t> segment_bytes_;
  std::vector<int> local_;                             // the ranks of this host, this one among them
  std::vector<std::unique_ptr<std::byte[]>> mirrors_;  // what stands for the control pages of ranks of other hosts
  std::shared_ptr<Crossing> crossing_;                 // null where there are none
  std::shared_ptr<TransferHook> hook_;
  uint64_t death_token_ = 0;
  int forks_at_birth_ = 0;
  int spin_pauses_ = 0;
  int spin_yields_ = 0;

  std::mutex queue_mutex_;
  std::deque<std::shared_ptr<Op>> queue_;
  std::atomic<int> posted_{0};
  std::atomic<bool> passed_by_{false};  // a thread found a lock taken that it wanted to look at the peers with

  std::mutex driver_;                // held by the one thread that advances the head; the fields below are its
  std::vector<std::byte*> scratch_;  // where each rank's scratch of the head's parity lies
  std::vector<const Block*> inputs_, outputs_;  // of the head, by rank
  std::vector<Block> peer_blocks_;              // of a mapped head: what the two point to for peers
  struct Slot {
    uint64_t offset = 0;
    size_t nbytes = 0;
  } slots_[2];
  uint64_t flush_before_ = 0;  // peers must have arrived at this sequence before the next op may begin
  int64_t last_end_ns_ = 0;    // when the operation before ended
  std::atomic<uint64_t> next_sequence_;

  std::mutex timed_mutex_;
  std::deque<TimedCall> timed_;  // what next_timed() has not taken yet

  mutable std::mutex planner_mutex_;
  Planner planner_;
  std::vector<std::shared_ptr<Statistic>> statistics_;
  struct KeyHash {
    size_t operator()(const ChoiceKey& key) const;
  };
  std::unordered_map<ChoiceKey, Choice, KeyHash> choices_;

  PointToPoint point_to_point_;
  OneSided one_sided_;
  std::mutex abort_mutex_;
  std::mutex telling_;  // from before an abort sets a word until the other hosts have been told; before abort_mutex_
  mutable std::once_flag dumped_;
  mutable std::string dump_note_;  // where the dump is, or why there is none
  std::atomic<bool> left_{false};
};

}  // namespace hxcomm
