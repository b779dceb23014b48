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

std::string seconds(int64_t ns) {
  char text[32];
  std::snprintf(text, sizeof(text), "%.3g s", static_cast<double>(ns) * 1e-9);
  return text;
}

}  // namespace

Group::Awaited Group::awaited_by(const Op& op) const {
  switch (op.phase) {
    case Op::Phase::begin:
      return {op.next_peer, progress_value(flush_before_, 1)};
    case Op::Phase::arriving:
      return {op.next_peer, progress_value(op.sequence, 1)};
    default:
      return {op.execution.blocked_on_peer(), op.execution.blocked_on_value()};
  }
}

std::string Group::waiting_for(const Op& op) const {
  const Awaited awaited = awaited_by(op);
  const bool running = op.phase == Op::Phase::running;
  std::string text;
  for (int r = 0; r < config_.world_size; ++r) {
    const uint64_t progress = control(r).line.reached();
    if (r == config_.rank || progress >= awaited.value || (running && r != awaited.peer)) continue;
    const uint64_t at = progress >> kRoundBits;
    if (op.call.name_first && !text.empty()) break;
    text += (text.empty() ? "" : ", ") + config_.labels[static_cast<size_t>(r)];
    text += at < op.sequence ? " (has not called it)" : " (is in it)";
  }
  return text.empty() ? "no rank" : text;
}

void Group::check_failures(Op& op, bool look_at_clock) {
  if (!kChecked) return;
  if (!own().abort.is_set() && look_at_clock) {
    const auto [peer, value] = awaited_by(op);
    // Membership before progress: a rank publishes all it owes before it leaves.
    const Line& line = control(peer).line;
    if (!line.is_member(config_.nonce) && !line.has_reached(value))
      abort(AbortCause::peer_left, peer,
            config_.labels[static_cast<size_t>(peer)] + " has left the group (it destroyed it or ended)");
    else if (now_ns() > op.deadline_ns)
      abort(AbortCause::timeout, config_.rank,
            std::string(op_name(op.call.op)) + " #" + std::to_string(op.sequence) + " of " +
                config_.labels[static_cast<size_t>(config_.rank)] + " timed out after " +
                seconds(now_ns() - op.posted_ns) + " waiting for " + waiting_for(op));
  }
  if (own().abort.is_set()) throw *failure(&op);
}

// Polls the head's flag with the driver lock held. True when it is worth advancing again.
bool Group::spin() {
  Awaited awaited;
  {
    std::lock_guard lock(queue_mutex_);
    if (queue_.empty()) return false;
    awaited = awaited_by(*queue_.front());
  }
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

// Moves messages for as long as a rank spins. True when the send or recv has ended.
bool Group::drive(const Op& op) {
  for (int i = 0; i < spin_pauses_ / 8 + spin_yields_; ++i) {
    Finished finished;
    if (point_to_point_.advance(&finished, /*look_at_clock=*/false)) i = 0;
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
    if (is_point_to_point(op->call.op)) {
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
  complete(finished);
  return moved;
}

void Group::advance_in_background() {
  try_advance(false);
  if (passed_by_.exchange(false)) endpoint_->ring_own_doorbell();
  if (has_posted()) progress_->wake_background();
}

}  // namespace hxcomm
