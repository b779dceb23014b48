#include "communicator/one_sided.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "communicator/group.h"
#include "core/clock.h"

namespace hxcomm {
namespace {

// In a frame of a window: its sequence is the window's id.
enum FrameOfWindow : uint32_t {
  kPut = 0,     // aux: where in the window, in bytes
  kSignal = 1,  // after the puts before it
  kCredit = 2,  // aux: frames of the receiver that have been carried out, of all windows
};

uint64_t bytes_of(const Op& op) { return op.call.count * item_size(op.call.dtype); }

}  // namespace

OneSided::OneSided(Group& group) : group_(group) {}

bool OneSided::is_remote(int rank) const { return group_.crossing_ && group_.crossing_->is_remote(rank); }

OneSided::Channel& OneSided::channel(int rank) const { return *channels_[static_cast<size_t>(rank)]; }

void OneSided::cross(const std::vector<int>& hosts) {
  channels_.resize(hosts.size());
  for (size_t r = 0; r < hosts.size(); ++r)
    if (hosts[r] != hosts[static_cast<size_t>(group_.rank())]) channels_[r] = std::make_unique<Channel>();
}

OneSided::WindowPointer OneSided::find(uint64_t id) const {
  const std::lock_guard lock(table_mutex_);
  const auto found = table_.find(id);
  return found == table_.end() ? nullptr : found->second;
}

void OneSided::count(int pending) {
  n_pending_ += pending;
  busy_.fetch_add(pending, std::memory_order_relaxed);
  group_.posted_.fetch_add(pending, std::memory_order_relaxed);
  pending > 0 ? group_.progress_->operation_posted() : group_.progress_->operation_finished();
}

void OneSided::count_open_window(int change) {
  busy_.fetch_add(change, std::memory_order_relaxed);
  group_.posted_.fetch_add(change, std::memory_order_relaxed);
  change > 0 ? group_.progress_->operation_posted() : group_.progress_->operation_finished();
}

void OneSided::check(const Call& call, const Window* window) const {
  const std::string name = op_name(call.op);
  const auto fail = [&name](const std::string& text) { throw Error(ErrorKind::usage, name + ": " + text); };
  if (call.root < 0 || call.root >= group_.world_size())
    fail("there is no rank " + std::to_string(call.root) + " in a group of " + std::to_string(group_.world_size()));
  if (window == nullptr || window->closing)
    fail("window " + std::to_string(call.window) + " is not registered on this rank any more");
  if (call.op != OpCode::put) return;
  if (call.input.size() != 1 || call.input[0].count != call.count) fail("takes one tensor");
  if (call.dtype != window->dtype || call.device != window->device)
    fail(elements(call.count, call.dtype, call.device) + " into a window of " +
         elements(window->parts[static_cast<size_t>(call.root)].count, window->dtype, window->device));
  const uint64_t room = window->parts[static_cast<size_t>(call.root)].count;
  if (call.offset > room || call.count > room - call.offset)
    fail(std::to_string(call.count) + " elements at element " + std::to_string(call.offset) + " of a window of " +
         std::to_string(room) + " elements on " + group_.config_.labels[static_cast<size_t>(call.root)] +
         "; nothing was written");
}

std::shared_ptr<Op> OneSided::post(OpPointer op) {
  const WindowPointer window = find(op->call.window);
  const bool copies = op->call.op == OpCode::put && !is_remote(op->call.root);
  op->posted_ns = now_ns();
  op->deadline_ns = op->call.timeout_ns > 0 ? op->posted_ns + op->call.timeout_ns : INT64_MAX;
  Finished finished;
  {
    const std::lock_guard lock(mutex_);
    check(op->call, window.get());
    // Under the lock, so that nothing is left pending after fail_all().
    if (op->call.op != OpCode::wait_signal && !group_.control(op->call.root).line.is_member(group_.config_.nonce))
      miss(*op);
    if (group_.own().abort.is_set()) throw *group_.failure(nullptr);
    op->record = static_cast<int64_t>(group_.own().flight.open(*op));
    if (copies) {
      window->copying.fetch_add(1, std::memory_order_relaxed);
      copying_.fetch_add(1, std::memory_order_relaxed);
    } else {
      begin(op, window, &finished);
    }
  }
  if (copies) {
    // Without the lock: 16 MiB take milliseconds. close() waits for it.
    if (op->call.count > 0)
      std::memmove(
          window->parts[static_cast<size_t>(op->call.root)].memory + op->call.offset * item_size(op->call.dtype),
          op->call.input[0].data, bytes_of(*op));
    window->copying.fetch_sub(1, std::memory_order_release);
    copying_.fetch_sub(1, std::memory_order_release);
    end(op, nullptr, &finished);
  }
  group_.complete(finished);
  return op;
}

bool OneSided::is_copying() const {
  const std::lock_guard lock(mutex_);  // a put either is counted by now, or finds the group ended
  return copying_.load(std::memory_order_acquire) > 0;
}

void OneSided::begin(const OpPointer& op, const WindowPointer& window, Finished* finished) {
  const int peer = op->call.root;
  Window::Part& part = window->parts[static_cast<size_t>(peer)];
  if (op->call.op == OpCode::wait_signal) {
    const Wait wait{op, window, ++part.awaited, Awaits::signals};
    if (has_come(wait)) return end(op, nullptr, finished);
    waits_.push_back(wait);
    count(+1);
  } else if (is_remote(peer)) {
    channel(peer).queue.push_back({op, window});
    count(+1);
    pump(peer, finished);
  } else {
    window->own_signals[peer].signal();
    if (peer != group_.rank()) {
      Doorbell::fence_after_publishing();
      group_.peers_[static_cast<size_t>(peer)]->ring_if_asleep();
    }
    end(op, nullptr, finished);
  }
}

bool OneSided::has_come(const Wait& wait) const {
  const Window::Part& part = wait.window->parts[static_cast<size_t>(wait.op->call.root)];
  return (wait.what == Awaits::signals ? part.signals->signalled() : part.taken.load(std::memory_order_acquire)) >=
         wait.value;
}

bool OneSided::advance(Finished* finished, bool look_at_clock) {
  if (busy_.load(std::memory_order_relaxed) == 0 || !group_.try_lock(mutex_)) return false;
  const std::lock_guard lock(mutex_, std::adopt_lock);
  const size_t before = finished->size();
  bool moved = false;
  try {
    for (int peer = 0; peer < static_cast<int>(channels_.size()); ++peer) {
      if (!channels_[static_cast<size_t>(peer)]) continue;
      moved = pump(peer, finished) || moved;
      give_credits_back(peer);
    }
    end_waits(finished);
    if (group_.crossing_) raise_fault();
    if (n_pending_ > 0 && group_.crossing_) group_.crossing_->check_losses();
    if (n_pending_ > 0 && look_at_clock) check_failures();
  } catch (const std::exception& error) {  // out of memory, too: this may be the background thread
    group_.abort(AbortCause::called, group_.rank(), error.what());
  }
  // After what could be moved: what came before the end of the group counts.
  if (n_pending_ > 0 && group_.own().abort.is_set()) drop_all(finished);
  return moved || finished->size() > before;
}

void OneSided::end_waits(Finished* finished) {
  std::erase_if(waits_, [&](const Wait& wait) {
    if (!has_come(wait)) return false;
    count(-1);
    end(wait.op, nullptr, finished);
    return true;
  });
}

bool OneSided::pump(int peer, Finished* finished) {
  Channel& to = channel(peer);
  bool moved = false;
  while (!to.queue.empty() &&
         to.sent - std::min(to.sent, to.acknowledged.load(std::memory_order_acquire)) < kWindowCredits) {
    moved = true;
    if (!send_next(peer, to.queue.front())) continue;
    const OpPointer op = std::move(to.queue.front().op);
    to.queue.pop_front();
    count(-1);
    end(op, nullptr, finished);
  }
  return moved;
}

// One frame. True where it was the last one of that call.
bool OneSided::send_next(int peer, Send& send) {
  const Op& op = *send.op;
  const uint64_t nbytes = op.call.op == OpCode::put ? bytes_of(op) : 0;
  const bool empty_put = op.call.op == OpCode::put && nbytes == 0;
  if (empty_put) return true;
  const size_t piece = std::min<uint64_t>(nbytes - send.sent_bytes, kPieceBytes);
  group_.crossing_->send_of_window(peer, send.window->id, nbytes > 0 ? kPut : kSignal,
                                   op.call.offset * item_size(op.call.dtype) + send.sent_bytes,
                                   nbytes > 0 ? op.call.input[0].data + send.sent_bytes : nullptr, piece);
  ++channel(peer).sent;
  ++send.window->parts[static_cast<size_t>(peer)].framed;
  send.sent_bytes += piece;
  return send.sent_bytes == nbytes;
}

void OneSided::give_credits_back(int peer) {
  Channel& from = channel(peer);
  const uint64_t taken = from.taken.load(std::memory_order_acquire);
  if (taken - from.told < kWindowCredits / 2) return;
  from.told = taken;
  group_.crossing_->send_of_window(peer, 0, kCredit, taken, nullptr, 0);
}

void OneSided::on_frame(int source, const FrameHeader& header, const Payload& payload) {
  Channel& from = channel(source);
  if (header.number == kCredit) return from.acknowledged.store(header.aux, std::memory_order_release);
  from.taken.fetch_add(1, std::memory_order_acq_rel);
  const WindowPointer window = find(header.sequence);
  // One that has been closed, or a group that has ended, takes nothing.
  if (!window || group_.own().abort.is_set()) return;
  std::string fault;
  if (header.number == kPut)
    fault = window->memory.store(header.aux, payload.data(), payload.size());
  else if (header.number == kSignal && payload.size() == 0)
    window->mirrored[source].signal();
  else
    fault = "something else than puts and signals";
  window->parts[static_cast<size_t>(source)].taken.fetch_add(1, std::memory_order_release);
  if (fault.empty()) return;
  const std::lock_guard lock(table_mutex_);
  fault_ = group_.config_.labels[static_cast<size_t>(source)] + " put " + fault + " into window " +
           std::to_string(window->id) + " of this rank: its memory is corrupt, or another version of hxcomm runs there";
  has_fault_.store(true, std::memory_order_release);
}

// Not on_frame(): it is called under the wire's lock, and an abort is told over the wire.
void OneSided::raise_fault() {
  if (!has_fault_.exchange(false, std::memory_order_acquire)) return;
  const std::lock_guard lock(table_mutex_);
  throw Error(ErrorKind::aborted, fault_);
}

std::string OneSided::state_of(const Op& op) const {
  const auto label = [this](int rank) { return group_.config_.labels[static_cast<size_t>(rank)]; };
  return std::string(op_name(op.call.op)) + " of window " + std::to_string(op.call.window) + " on " +
         label(group_.rank()) + (op.call.op == OpCode::wait_signal ? " from " : " to ") + label(op.call.root);
}

// A rank that this one needs has left.
void OneSided::miss(const Op& op) {
  group_.abort(AbortCause::peer_left, op.call.root,
               group_.config_.labels[static_cast<size_t>(op.call.root)] +
                   " has left the group (it destroyed it or ended), and " + state_of(op) + " needs it");
}

void OneSided::check_failures() {
  const int64_t now = now_ns();
  const auto look = [&](const Op& op, const char* why, auto&& ended) {
    // Membership before the signals: a rank has made all it owes visible before it leaves.
    const bool left = !group_.control(op.call.root).line.is_member(group_.config_.nonce);
    if (ended()) return;
    if (left)
      miss(op);
    else if (now > op.deadline_ns)
      group_.abort(
          AbortCause::timeout, group_.rank(),
          state_of(op) + " timed out after " + std::to_string((now - op.posted_ns) / 1'000'000) + " ms: " + why);
  };
  for (const Wait& wait : waits_)
    look(*wait.op, wait.what == Awaits::signals ? "no signal came" : "not all that it put has come",
         [&] { return has_come(wait); });
  for (const auto& to : channels_)
    if (to)
      for (const Send& send : to->queue) look(*send.op, "nothing is taken there", [] { return false; });
}

void OneSided::end(const OpPointer& op, std::unique_ptr<Error> error, Finished* finished) {
  op->error = std::move(error);
  group_.count_message(*op);
  group_.own().flight.close(static_cast<uint64_t>(op->record), op->error == nullptr, now_ns());
  op->finished.store(true, std::memory_order_release);
  finished->push_back(op);
}

void OneSided::fail_all(Finished* finished) {
  const std::lock_guard lock(mutex_);
  drop_all(finished);
}

void OneSided::drop_all(Finished* finished) {
  const auto fail = [&](const OpPointer& op) {
    count(-1);
    end(op, group_.failure(op.get()), finished);
  };
  for (const Wait& wait : waits_) fail(wait.op);
  waits_.clear();
  for (const auto& to : channels_) {
    if (!to) continue;
    for (const Send& send : to->queue) fail(send.op);
    to->queue.clear();
  }
}

void OneSided::drop(const OpPointer& op, Finished* finished) {
  count(-1);
  end(op,
      std::make_unique<Error>(ErrorKind::usage,
                              state_of(*op) + " was pending when this rank deregistered the window; it has not ended"),
      finished);
}

void OneSided::drop_waits(const Window& window, Finished* finished) {
  std::erase_if(waits_, [&](const Wait& wait) {
    if (wait.window.get() != &window) return false;
    drop(wait.op, finished);
    return true;
  });
}

void OneSided::drop_sends(const Window& window, Finished* finished) {
  for (const auto& to : channels_)
    if (to)
      std::erase_if(to->queue, [&](const Send& send) {
        if (send.window.get() != &window) return false;
        drop(send.op, finished);
        return true;
      });
}

}  // namespace hxcomm
