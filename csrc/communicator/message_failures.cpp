// How messages between two ranks end where they do not arrive: what is pending, what is owed, who has left, how long.
#include <algorithm>

#include "communicator/group.h"
#include "core/clock.h"

namespace hxcomm {

std::vector<PointToPoint::OpPointer> PointToPoint::pending() const {
  std::vector<OpPointer> ops{receives_.begin(), receives_.end()};
  for (const Channel& channel : channels_) {
    ops.insert(ops.end(), channel.sends.begin(), channel.sends.end());
    for (const auto& [number, send] : channel.announced) ops.push_back(send);
    for (const Stream& stream : channel.streams) ops.push_back(stream.send);
    for (const auto& [number, incoming] : channel.incoming) ops.push_back(incoming.recv);
    for (const Message& message : channel.arrived)
      if (message.send) ops.push_back(message.send);
    for (const Outgoing& reply : channel.replies)
      if (reply.recv) ops.push_back(reply.recv);
  }
  return ops;
}

bool PointToPoint::owes() const {
  const std::lock_guard lock(mutex_);
  for (size_t peer = 0; peer < channels_.size(); ++peer)
    if (!channels_[peer].replies.empty() && group_.controls_[peer] != nullptr &&
        group_.control(static_cast<int>(peer)).line.is_member(group_.config_.nonce))
      return true;
  return false;
}

void PointToPoint::fail_all(Finished* finished) {
  const std::lock_guard lock(mutex_);
  drop_all(finished);
}

void PointToPoint::drop_all(Finished* finished) {
  const std::vector<OpPointer> failed = pending();
  // Peers may be copying out of announced tensors of device hx, which go back to their user here.
  const auto lends = [](const Channel& channel) {
    return std::any_of(channel.announced.begin(), channel.announced.end(),
                       [](const auto& each) { return each.second->call.device == DeviceKind::hx; });
  };
  if (std::any_of(channels_.begin(), channels_.end(), lends)) group_.pass_on_abort();
  for (const OpPointer& op : failed) end(op, group_.failure(op.get()), finished);
  receives_.clear();
  for (Channel& channel : channels_) {
    channel.sends.clear();
    channel.announced.clear();
    channel.streams.clear();
    channel.incoming.clear();
    channel.arrived.clear();
    for (; !channel.replies.empty(); channel.replies.pop_front()) count(-1);
  }
}

bool PointToPoint::waits_in_vain(const Op& op) const {
  const auto gone = [this](int peer) {
    // Membership before the ring: a rank has put all it sent into its ring before it leaves.
    const bool left = !group_.control(peer).line.is_member(group_.config_.nonce);
    if (is_remote(peer)) return left && !group_.crossing_->has_packets(peer);
    const uint64_t produced = group_.pair_line(peer, group_.rank()).packets_produced();
    return left && produced == channels_[static_cast<size_t>(peer)].consumed;
  };
  const int source = op.source != kAnySource ? op.source : op.call.root;  // of a recv whose message has been met
  if (source == group_.rank()) return false;
  if (source != kAnySource) return gone(source);
  // This rank could still send to itself, but who has seen all others leave waits for one of them.
  bool all = group_.world_size() > 1;
  for (int peer = 0; all && peer < group_.world_size(); ++peer) all = peer == group_.rank() || gone(peer);
  return all;
}

std::string PointToPoint::state_of(const Op& op) const {
  const std::string tag =
      " (tag " + std::to_string(op.call.tag) + ", " + elements(op.call.count, op.call.dtype, op.call.device) + ")";
  const auto label = [this](int rank) { return group_.config_.labels[static_cast<size_t>(rank)]; };
  const std::string me = label(group_.rank());
  if (op.call.op == OpCode::send) return "send on " + me + " to " + label(op.call.root) + tag;
  return "recv on " + me + " from " + (op.call.root == kAnySource ? "any rank" : label(op.call.root)) + tag;
}

void PointToPoint::check_failures() {
  const int64_t now = now_ns();
  for (const OpPointer& op : pending()) {
    if (waits_in_vain(*op)) {
      const int source = op->source != kAnySource ? op->source : op->call.root;
      const int peer = source == kAnySource ? group_.rank() : source;
      const std::string who =
          source == kAnySource ? "every other rank" : group_.config_.labels[static_cast<size_t>(peer)];
      group_.abort(AbortCause::peer_left, peer,
                   who + " has left the group (it destroyed it or ended), and " + state_of(*op) + " waits for it");
      return;
    }
    if (now > op->deadline_ns) {
      group_.abort(AbortCause::timeout, group_.rank(),
                   state_of(*op) + " timed out after " + std::to_string((now - op->posted_ns) / 1'000'000) +
                       " ms: " + (op->call.op == OpCode::send ? "nobody received it" : "no message of that tag came"));
      return;
    }
  }
}

}  // namespace hxcomm
