// How a rank waits: spin on the one flag it needs, yield, then sleep on the process's doorbell.
#include <immintrin.h>
#include <sched.h>

#include <algorithm>
#include <cstdio>

#include "communicator/group.h"
#include "core/checks.h"
#include "core/clock.h"

namespace hxcomm {
namespace {

// A sleeper looks at signals, deadlines and departed peers this often; everything else rings the doorbell.
constexpr int64_t kLookUpNs = 100'000'000;

// How often a rank looks for something from another host before it sleeps. all_reduce of 16 KiB between two network
// namespaces on 2 cores, p50 in us at 0, 20, 200 and 2,000 looks: 78 to 80, 37 to 72, 46 to 72 and 46 with one rank a
// host, 199, 272, 131 and 127 with two.
constexpr int kLooksAbroad = 200;

std::string seconds(int64_t ns) {
  char text[32];
  std::snprintf(text, sizeof(text), "%.3g s", static_cast<double>(ns) * 1e-9);
  return text;
}

}  // namespace

Group::Awaited Group::awaited_by(const Op& op) const {
  switch (op.phase) {
    case Op::Phase::begin:
      return {local_[op.next_local], progress_value(flush_before_, 1)};
    case Op::Phase::arriving:
      return {local_[op.next_local], progress_value(op.sequence, 1)};
    case Op::Phase::agreeing:
      return {crossing_->leader(), op.first_sequence, /*from_afar=*/true};
    default:
      break;
  }
  switch (op.execution.blocked_at()) {
    case Instruction::Code::wait:
      return {op.execution.blocked_on_peer(), op.execution.blocked_on_value()};
    case Instruction::Code::receive:
      return {op.execution.blocked_on_peer(), 0, /*from_afar=*/true};
    case Instruction::Code::agree:
      return {crossing_->leader(), op.first_sequence, /*from_afar=*/true};
    default:  // until what was sent has left
      return {config_.rank, 0, /*from_afar=*/true};
  }
}

std::string Group::waiting_for(const Op& op) const {
  const Awaited awaited = awaited_by(op);
  if (awaited.from_afar) return waiting_abroad_for(op, awaited);
  const bool running = op.phase == Op::Phase::running;
  std::string text;
  for (const int r : local_) {
    const uint64_t progress = control(r).line.reached();
    if (r == config_.rank || progress >= awaited.value || (running && r != awaited.peer)) continue;
    const uint64_t at = progress >> kRoundBits;
    if (op.call.name_first && !text.empty()) break;
    text += (text.empty() ? "" : ", ") + config_.labels[static_cast<size_t>(r)];
    text += at < op.sequence ? " (has not called it)" : " (is in it)";
  }
  return text.empty() ? "no rank" : text;
}

std::string Group::waiting_abroad_for(const Op& op, const Awaited& awaited) const {
  const auto label = [this](int rank) { return config_.labels[static_cast<size_t>(rank)]; };
  // At AGREE a leader awaits its own verdict.
  const bool sending = awaited.peer == config_.rank && awaited.value == 0;
  std::string text;
  for (const int r : crossing_->needed_by(op))
    text += (text.empty() ? "" : ", ") + label(r) +
            (sending                  ? " (which takes nothing)"
             : crossing_->is_alone(r) ? " (has not called it)"
                                      : " (it or a rank beside it has not called it)");
  if (!text.empty()) return text;
  if (sending) return "what it has sent to leave";
  if (crossing_->is_remote(awaited.peer)) return label(awaited.peer) + " (its message has not come)";
  return label(awaited.peer) + " (which has not heard of all other hosts)";
}

void Group::check_failures(Op& op, bool look_at_clock) {
  if (!kChecked) return;
  if (crossing_) crossing_->check_losses();
  if (!own().abort.is_set() && look_at_clock) {
    if (const int peer = left_by(op); peer >= 0)
      abort(AbortCause::peer_left, peer,
            config_.labels[static_cast<size_t>(peer)] + " has left the group (it destroyed it or ended)");
    else if (now_ns() > op.deadline_ns + (crossing_ && awaited_by(op).from_afar ? kWitnessNs : 0))
      abort(AbortCause::timeout, config_.rank,
            std::string(op_name(op.call.op)) + " #" + std::to_string(op.sequence) + " of " +
                config_.labels[static_cast<size_t>(config_.rank)] + " timed out after " +
                seconds(now_ns() - op.posted_ns) + " waiting for " + waiting_for(op));
  }
  if (own().abort.is_set()) throw *failure(&op);
}

// The rank that the operation still needs and that has left the group; -1: none.
int Group::left_by(const Op& op) {
  const Awaited awaited = awaited_by(op);
  // Membership before progress: a rank publishes all it owes before it leaves.
  const auto has_left = [this](int rank) { return !control(rank).line.is_member(config_.nonce); };
  if (!crossing_ || op.phase < Op::Phase::agreeing)
    return has_left(awaited.peer) && !control(awaited.peer).line.has_reached(awaited.value) ? awaited.peer : -1;

  // Until the hosts agree, the verdict is what it waits for: a rank that has raised MismatchError may have left since.
  std::vector<int> needed = crossing_->needed_by(op);
  needed.push_back(awaited.peer);
  needed.push_back(crossing_->leader());
  std::erase_if(needed, [&](int rank) { return !has_left(rank); });
  if (needed.empty()) return -1;
  endpoint_->pump_wire();
  crossing_->absorb();
  const Crossing::Verdict verdict = crossing_->verdict(op);
  if (verdict == Crossing::Verdict::differ) return -1;
  std::vector<int> still = crossing_->needed_by(op);
  if (verdict == Crossing::Verdict::pending) still.push_back(crossing_->leader());
  if (verdict == Crossing::Verdict::agreed && op.phase == Op::Phase::running) {
    const Instruction::Code at = op.execution.blocked_at();
    const bool in_vain = at == Instruction::Code::receive
                             ? crossing_->arrived(op.execution.blocked_on_message()) == nullptr
                             : at == Instruction::Code::wait && !control(awaited.peer).line.has_reached(awaited.value);
    if (in_vain) still.push_back(awaited.peer);
  }
  for (const int rank : needed)
    if (rank != config_.rank && std::find(still.begin(), still.end(), rank) != still.end()) return rank;
  return -1;
}

// Polls what the head waits for, with the driver lock held. True when it is worth advancing again.
bool Group::spin() {
  Awaited awaited;
  {
    std::lock_guard lock(queue_mutex_);
    if (queue_.empty()) return false;
    awaited = awaited_by(*queue_.front());
  }
  if (crossing_) return spin_abroad(awaited);
  const Line& line = control(awaited.peer).line;
  const AbortLine& abort_line = own().abort;
  for (int i = 0; i < spin_pauses_ + spin_yields_; ++i) {
    if (line.has_reached(awaited.value) || (kChecked && abort_line.is_set())) return true;
    if (i < spin_pauses_)
      _mm_pause();
    else
      sched_yield();
  }
  return false;
}

// A look at the wire is a system call, and what it waits for must be received by another thread of this process: so it
// yields instead of pausing.
bool Group::spin_abroad(const Awaited& awaited) {
  const Line& line = control(awaited.peer).line;
  for (int i = 0; i < kLooksAbroad; ++i) {
    if (endpoint_->pump_wire() || own().abort.is_set()) return true;
    if (awaited.from_afar ? line.has_verdict(awaited.value) && awaited.value > 0 : line.has_reached(awaited.value))
      return true;
    sched_yield();
  }
  return false;
}

// Moves messages, or frames of windows, for as long as a rank spins. True when the op has ended.
bool Group::drive(const Op& op) {
  for (int i = 0; i < spin_pauses_ / 8 + spin_yields_; ++i) {
    Finished finished;
    if (crossing_) endpoint_->pump_wire();
    const bool moved = is_one_sided(op.call.op) ? one_sided_.advance(&finished, /*look_at_clock=*/false)
                                                : point_to_point_.advance(&finished, /*look_at_clock=*/false);
    if (moved) i = 0;
    complete(finished);
    if (op.finished.load(std::memory_order_acquire)) return true;
    if (i >= spin_pauses_ / 8) sched_yield();
  }
  return false;
}

void Group::wait(const std::shared_ptr<Op>& op, int64_t timeout_ns) {
  refuse_after_fork();
  Progress::Waiter waiter(*progress_);
  const int64_t deadline = timeout_ns >= 0 ? now_ns() + timeout_ns : INT64_MAX;
  int64_t next_look = 0;
  bool stopped_by_signal = false;
  while (!op->finished.load(std::memory_order_acquire)) {
    if (op->call.op > OpCode::barrier) {
      if (drive(*op)) continue;
    } else if (driver_.try_lock()) {
      Finished finished;
      bool moved = advance(&finished, /*look_at_clock=*/false);
      if (finished.empty()) moved = spin() || moved;
      driver_.unlock();
      complete(finished);
      if (moved) continue;
    }
    const uint32_t doorbell = endpoint_->announce_sleep();
    bool signalled = false;
    if (!progress_->advance_all() && !op->finished.load(std::memory_order_acquire))
      signalled = !endpoint_->sleep(doorbell,
                                    std::clamp<int64_t>(std::min(deadline, op->deadline_ns) - now_ns(), 0, kLookUpNs));
    endpoint_->withdraw_sleep();

    const int64_t now = now_ns();
    if (signalled || now > next_look) {
      next_look = now + kLookUpNs;
      if (!stopped_by_signal && progress_->interrupted && progress_->interrupted()) {
        stopped_by_signal = true;
        abort(AbortCause::interrupted, config_.rank,
              config_.labels[static_cast<size_t>(config_.rank)] +
                  " was interrupted by a signal (Ctrl-C) while it waited");
      }
    }
    if (now > deadline && !op->finished.load(std::memory_order_acquire))
      abort(AbortCause::timeout, config_.rank,
            std::string("wait() for ") + op_name(op->call.op) + " on " +
                config_.labels[static_cast<size_t>(config_.rank)] + " ran out after " + seconds(timeout_ns));
  }
  if (stopped_by_signal) throw Error(ErrorKind::interrupted, "interrupted by a signal");
  if (op->error) throw *op->error;
}

// Where another thread holds the lock, that one may have looked just before what this one waits for came, and this one
// may sleep next: it says that it was here, and the other, if it does not look again itself, rings when it is through.
bool Group::try_lock(std::mutex& mutex) {
  if (mutex.try_lock()) return true;
  passed_by_.store(true);
  return mutex.try_lock();
}

bool Group::try_advance(bool look_at_clock) {
  Finished finished;
  bool moved = false;
  if (try_lock(driver_)) {
    moved = advance(&finished, look_at_clock);
    driver_.unlock();
  }
  moved = point_to_point_.advance(&finished, look_at_clock) || moved;
  moved = one_sided_.advance(&finished, look_at_clock) || moved;
  complete(finished);
  return moved;
}

void Group::advance_in_background() {
  try_advance(false);
  if (passed_by_.exchange(false)) endpoint_->ring_own_doorbell();
  if (has_posted()) progress_->wake_background();
}

}  // namespace hxcomm
