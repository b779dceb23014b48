// One operation's way through a group: begin, arrive, judge, run, and again for the next window of a long one.
#include <algorithm>

#include "communicator/group.h"
#include "core/checks.h"
#include "core/clock.h"
#include "core/failpoint.h"

namespace hxcomm {
namespace {

// A window is cut until all scratch chunks of a plan fit in this: rooted ops stage one chunk per rank.
constexpr size_t kMaxScratchBytes = 4 << 20;

// A slot starts this small: 256 groups then cost 4 MiB, and what a decode step sends fits.
constexpr size_t kFirstSlotBytes = 8192;

// Elements: more than any block has.
constexpr uint64_t kWholeBlock = uint64_t{1} << 44;

uint64_t window_for(const Op& op) {
  const Plan& plan = *op.choice.plan;
  const DType dtype = op.call.dtype;
  // Windows are for what is staged or sent: where peers reach the tensors themselves, all of it is one.
  uint64_t window =
      op.mapped() && !plan.crosses ? kWholeBlock : std::max<uint64_t>(op.choice.segment_bytes / item_size(dtype), 64);
  if (plan.crosses) {
    // A message is a chunk at most, and the pieces of a block are rounded up to 16 elements.
    const auto pieces =
        static_cast<uint64_t>(std::min(plan.input.blocks > 0 ? plan.input.pieces : plan.output.pieces,
                                       plan.output.blocks > 0 ? plan.output.pieces : plan.input.pieces));
    window = std::min(window, (kMaxMessageBytes / accumulation_size(dtype) - 16) * pieces);
  }
  // Unequal counts are not known everywhere yet, so the window must not depend on them.
  if (!op.call.uneven) window = std::min(window, op.call.count);
  while (window > 64 && plan.scratch_chunks > 0 &&
         static_cast<size_t>(plan.scratch_chunks) * scratch_stride(plan, dtype, op.call.reduce_op, window) >
             kMaxScratchBytes)
    window /= 2;
  return window;
}

}  // namespace

void Group::publish(uint64_t value) {
  own().line.publish(value);
  ring_sleepers();
}

void Group::ring_sleepers() {
  Doorbell::fence_after_publishing();
  for (const auto& peer : peers_)
    if (peer) peer->ring_if_asleep();
}

void Group::ensure_scratch(uint64_t sequence, size_t nbytes) {
  // The slot of this parity is free: every peer has arrived at sequence - 1, so all are done with sequence - 2.
  Slot& slot = slots_[sequence & 1];
  if (slot.nbytes < nbytes) {
    size_t size = std::max(slot.nbytes, kFirstSlotBytes);
    while (size < nbytes) size *= 2;
    const uint64_t offset = endpoint_->segment().allocate(size);
    if (slot.nbytes > 0) endpoint_->segment().release(slot.offset, slot.nbytes);
    slot = {offset, size};
  }
  const auto me = static_cast<size_t>(config_.rank);
  own().line.set_scratch_offset(sequence, slot.offset);
  scratch_[me] = segments_[me] + slot.offset;
}

Group::Step Group::begin(Op& op) {
  if (kChecked && own().abort.is_set()) throw *failure(&op);
  if (flush_before_ != 0) {
    // After a refused call this rank has not waited for anyone; it may not run two operations ahead.
    for (; op.next_local < local_.size(); ++op.next_local)
      if (!control(local_[op.next_local]).line.has_reached(progress_value(flush_before_, 1))) return Step::blocked;
    flush_before_ = 0;
  }
  op.next_local = 0;
  const bool first = op.first_sequence == 0;
  const auto me = static_cast<size_t>(config_.rank);
  if (first && op.refusal.empty()) {
    op.window = window_for(op);
    op.longest = op.call.count;
  }
  const size_t stride =
      op.refusal.empty() ? scratch_stride(*op.choice.plan, op.call.dtype, op.call.reduce_op, op.window) : 0;
  const uint64_t sequence = next_sequence_.load(std::memory_order_relaxed);
  if (op.refusal.empty()) ensure_scratch(sequence, static_cast<size_t>(op.choice.plan->scratch_chunks) * stride);

  next_sequence_.store(sequence + 1, std::memory_order_relaxed);
  op.sequence = sequence;
  if (first) {
    op.first_sequence = sequence;
    op.record = static_cast<int64_t>(own().flight.open(op));
  }
  if (!op.refusal.empty()) {
    write_descriptor(descriptor_at(own(), config_.world_size, sequence), op, config_.world_size, segments_[me]);
    own().line.set_fingerprint(sequence, fingerprint(op, false));
    if (crossing_) crossing_->begin(op);
    publish(progress_value(sequence, 1));
    // Where there are other hosts, it takes part in their verdict, though nobody here waits for it.
    if (crossing_) {
      op.phase = Op::Phase::arriving;
      return Step::moved;
    }
    flush_before_ = sequence;
    return Step::finished;
  }
  Binding binding;
  binding.plan = op.choice.plan.get();
  binding.dtype = op.call.dtype;
  binding.reduce_op = op.call.reduce_op;
  binding.factor = op.call.factor;
  inputs_[me] = op.call.input.data();
  outputs_[me] = op.call.output.data();
  binding.inputs = inputs_.data();
  binding.outputs = outputs_.data();
  binding.low = op.low;
  binding.high = op.low + op.window;
  binding.scratch = scratch_.data();
  binding.scratch_stride = stride;
  binding.sequence = sequence;
  binding.lines = lines_.data();
  binding.messages = crossing_.get();
  op.execution.start(binding, hook_.get());
  op.execution.run([] {});  // stages; plans cannot publish or wait before ENTER
  if (kChecked && first) {
    write_descriptor(descriptor_at(own(), config_.world_size, sequence), op, config_.world_size, segments_[me]);
    own().line.set_fingerprint(sequence, fingerprint(op, config_.compare_shapes));
  }
  if (crossing_) crossing_->begin(op);
  failpoint(Failpoint::staged);
  publish(progress_value(sequence, 1));
  own().flight.set_state(static_cast<uint64_t>(op.record), FlightState::arrived);
  failpoint(Failpoint::arrived);
  op.phase = Op::Phase::arriving;
  return Step::moved;
}

Group::Step Group::arrive(Op& op) {
  const uint64_t arrival = progress_value(op.sequence, 1);
  for (; op.next_local < local_.size(); ++op.next_local)
    if (!control(local_[op.next_local]).line.has_reached(arrival)) return Step::blocked;
  return judge(op);
}

Group::Step Group::judge(Op& op) {
  if (!kChecked || op.sequence != op.first_sequence) return enter(op);
  const uint64_t mine = own().line.fingerprint_of(op.sequence);
  const bool alike = std::all_of(local_.begin(), local_.end(),
                                 [&](int r) { return control(r).line.fingerprint_of(op.sequence) == mine; });
  if (crossing_) {
    if (crossing_->leads()) crossing_->announce(op, alike ? mine : 0);
    // The counts of an uneven call lie in the descriptors of the other hosts' ranks, too.
    if (alike && mine != 0 && !op.call.uneven) return enter(op);
    op.phase = Op::Phase::agreeing;
    return Step::moved;
  }
  if (!alike) throw Error(ErrorKind::mismatch, mismatch_table(descriptors(op.sequence), op.sequence, config_.labels));
  // Every rank reads every rank's counts, so all reach the same verdict without asking each other again.
  if (op.call.uneven) compare_counts(op);
  return enter(op);
}

// The verdict of all hosts, where this rank cannot begin without it: the ranks here differ, or it must know the counts
// of all.
Group::Step Group::agree(Op& op) {
  look_abroad(op);
  if (crossing_->verdict(op) == Crossing::Verdict::pending) return Step::blocked;
  if (!op.refusal.empty()) return Step::finished;
  compare_counts(op);
  return enter(op);
}

// Throws where the hosts have found that their ranks call different operations.
void Group::look_abroad(Op& op) {
  if (crossing_->verdict(op) != Crossing::Verdict::differ || !op.refusal.empty()) return;
  crossing_->drop_queued();        // its receivers may have raised already, and take nothing until their next call
  if (crossing_->lends()) return;  // the user is about to have that memory back
  throw Error(ErrorKind::mismatch, mismatch_table(descriptors(op.first_sequence), op.first_sequence, config_.labels));
}

void Group::compare_counts(Op& op) {
  const std::string text =
      compare_uneven(descriptors(op.first_sequence), op.first_sequence, config_.labels, &op.longest);
  if (!text.empty()) throw Error(ErrorKind::mismatch, text);
}

Descriptors Group::descriptors(uint64_t sequence) const {
  const int n = config_.world_size;
  Descriptors all;
  for (int r = 0; r < n; ++r)
    all.push_back(crossing_ && crossing_->is_remote(r) ? &foreign_descriptor_at(control(crossing_->leader()), n, r)
                                                       : &descriptor_at(control(r), n, sequence));
  return all;
}

// Everybody here makes the same call: from now on this rank touches its peers' memory.
Group::Step Group::enter(Op& op) {
  const size_t needed = static_cast<size_t>(op.choice.plan->scratch_chunks) * op.execution.binding().scratch_stride;
  for (const int r : local_) {
    if (r == config_.rank) continue;
    const auto i = static_cast<size_t>(r);
    const uint64_t offset = control(r).line.scratch_offset_of(op.sequence);
    if (offset > segment_bytes_[i] || segment_bytes_[i] - offset < needed)
      throw Error(ErrorKind::aborted, config_.labels[i] + " published a scratch offset of " + std::to_string(offset) +
                                          ", outside its segment: its memory is corrupt");
    scratch_[i] = segments_[i] + offset;
  }
  if (op.mapped()) bind_peers(op);
  if (op.call.issue_ps >= 0 && op.sequence == op.first_sequence) note_times(op);
  op.execution.entered();
  op.phase = Op::Phase::running;
  own().flight.set_state(static_cast<uint64_t>(op.record), FlightState::running);
  failpoint(Failpoint::judged);
  return Step::moved;
}

// Where the peers' tensors lie, as they say in their descriptors: other processes' memory, so every number is read once
// and checked.
void Group::bind_peers(Op& op) {
  const auto n = static_cast<size_t>(config_.world_size);
  const Plan& plan = *op.choice.plan;
  peer_blocks_.resize(2 * n * n);
  for (const int local : local_) {
    const auto r = static_cast<size_t>(local);
    if (local == config_.rank) continue;
    Descriptor& described = descriptor_at(control(static_cast<int>(r)), config_.world_size, op.first_sequence);
    const auto bind = [&](const Extent* from, size_t published, int32_t needed, Block* to) {
      if (published < static_cast<size_t>(needed))
        throw Error(ErrorKind::aborted, config_.labels[r] + " published " + std::to_string(published) +
                                            " tensors where its peers touch " + std::to_string(needed));
      for (size_t i = 0; i < static_cast<size_t>(needed); ++i) {
        const Extent extent = from[i];
        const uint64_t nbytes = extent.count * item_size(op.call.dtype);
        if (extent.count > kWholeBlock || (!op.call.uneven && extent.count != op.call.count) ||
            extent.offset > segment_bytes_[r] || segment_bytes_[r] - extent.offset < nbytes)
          throw Error(ErrorKind::aborted, config_.labels[r] + " published a tensor of " + std::to_string(extent.count) +
                                              " elements at byte " + std::to_string(extent.offset) +
                                              " of its segment: its memory is corrupt");
        to[i] = {segments_[r] + extent.offset, extent.count};
      }
      return to;
    };
    inputs_[r] = bind(inputs_at(described), described.n_input, plan.input_blocks[r], &peer_blocks_[2 * r * n]);
    outputs_[r] = bind(outputs_at(described, config_.world_size), described.n_output, plan.output_blocks[r],
                       &peer_blocks_[(2 * r + 1) * n]);
  }
}

// Every rank reads the same times, so whatever they compute from them is the same everywhere. One that a rank did not
// note is not timed by any.
void Group::note_times(const Op& op) {
  TimedCall timed{op.call.ticket,
                  op.call.op,
                  op.call.root,
                  op.choice.plan,
                  op.longest * item_size(op.call.dtype),
                  item_size(op.call.dtype),
                  std::vector<int64_t>(static_cast<size_t>(config_.world_size), -1)};
  for (const int r : local_)
    timed.issued_ps[static_cast<size_t>(r)] = descriptor_at(control(r), config_.world_size, op.sequence).issue_ps;
  if (std::any_of(timed.issued_ps.begin(), timed.issued_ps.end(), [](int64_t ps) { return ps < 0; })) return;
  const std::lock_guard lock(timed_mutex_);
  timed_.push_back(std::move(timed));
}

bool Group::next_timed(TimedCall* timed) {
  const std::lock_guard lock(timed_mutex_);
  if (timed_.empty()) return false;
  *timed = std::move(timed_.front());
  timed_.pop_front();
  return true;
}

Group::Step Group::run(Op& op) {
  if (op.execution.run([this] { ring_sleepers(); }) == Execution::Status::blocked) return Step::blocked;
  if (crossing_ && !crossing_->all_sent()) return Step::blocked;
  // Peers store into this rank's tensors: one that failed in the middle has set the word before it told its user.
  if (op.mapped() && own().abort.is_set()) throw *failure(&op);
  op.low += op.window;
  if (op.low >= op.longest) return Step::finished;
  op.phase = Op::Phase::begin;
  op.next_local = 0;
  return Step::moved;
}

Group::Step Group::step(Op& op) {
  switch (op.phase) {
    case Op::Phase::begin:
      return begin(op);
    case Op::Phase::arriving:
      return arrive(op);
    case Op::Phase::agreeing:
      return agree(op);
    default:
      return run(op);
  }
}

void Group::end(Op& op, std::unique_ptr<Error> error) {
  const int64_t now = now_ns();
  if (!error && op.refusal.empty()) {
    Statistic& statistic = *op.choice.statistic;
    uint64_t elements = op.call.count;
    if (op.call.uneven) {
      for (const Block& block : op.call.input) elements += block.count;
      elements /= static_cast<uint64_t>(config_.world_size);
    }
    statistic.calls.fetch_add(1, std::memory_order_relaxed);
    statistic.elements.fetch_add(elements, std::memory_order_relaxed);
    // It became the head when it was posted or when the one before it ended: no clock is read at the start.
    statistic.time_ns.fetch_add(now - std::max(op.posted_ns, last_end_ns_), std::memory_order_relaxed);
    statistic.waiting_ns.fetch_add(op.waited_ns, std::memory_order_relaxed);
  }
  last_end_ns_ = now;
  if (crossing_ && op.first_sequence > 0) crossing_->finish(op, error != nullptr);
  if (op.record < 0) op.record = static_cast<int64_t>(own().flight.open(op));
  own().flight.close(static_cast<uint64_t>(op.record), !error && op.refusal.empty(), now);
  failpoint(Failpoint::ended);
  op.error = std::move(error);
  op.finished.store(true, std::memory_order_release);
}

bool Group::advance(Finished* finished, bool look_at_clock) {
  bool moved = false;
  if (crossing_) endpoint_->pump_wire();
  for (;;) {
    std::shared_ptr<Op> op;
    {
      std::lock_guard lock(queue_mutex_);
      if (queue_.empty()) {
        // What is posted from now on does not begin.
        if (own().abort.is_set() && !one_sided_.is_copying()) own().abort.acknowledge();
        return moved;
      }
      op = queue_.front();
    }
    std::unique_ptr<Error> error;
    try {
      if (crossing_) crossing_->absorb();
      if (op->blocked_ns != 0) op->waited_ns += now_ns() - op->blocked_ns;
      Step outcome;
      while ((outcome = step(*op)) == Step::moved) moved = true;
      if (outcome == Step::blocked) {
        if (config_.keep_statistics) op->blocked_ns = now_ns();
        if (crossing_ && op->phase >= Op::Phase::agreeing) look_abroad(*op);
        check_failures(*op, look_at_clock);
        return moved;
      }
    } catch (const Error& e) {
      error = std::make_unique<Error>(e);
      // Whatever is not a mismatch leaves this rank in the middle of an operation: the group cannot go on.
      if (e.kind() != ErrorKind::mismatch) {
        abort(AbortCause::called, config_.rank, e.message());
        if (op->mapped()) pass_on_abort();
      }
    } catch (const std::exception& e) {  // out of memory, say: this may be the background thread
      error = std::make_unique<Error>(ErrorKind::aborted, e.what());
      abort(AbortCause::called, config_.rank, e.what());
      if (op->mapped()) pass_on_abort();
    }
    end(*op, std::move(error));
    {
      std::lock_guard lock(queue_mutex_);
      queue_.pop_front();
      own().flight.n_queued.store(queue_.size(), std::memory_order_relaxed);
      posted_.fetch_sub(1, std::memory_order_relaxed);
      progress_->operation_finished();
    }
    finished->push_back(std::move(op));
    moved = true;
  }
}

void Group::complete(Finished& finished) {
  if (finished.empty()) return;
  for (const auto& op : finished)
    if (op->on_finish) {
      op->on_finish(op->error.get());
      op->on_finish = nullptr;
    }
  // Somebody of this process may sleep on an operation that this thread has just finished.
  Doorbell::fence_after_publishing();
  if (endpoint_->segment().header().doorbell.has_sleepers()) endpoint_->ring_own_doorbell();
  finished.clear();
}

}  // namespace hxcomm
