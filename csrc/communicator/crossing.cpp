#include "communicator/crossing.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "communicator/group.h"
#include "core/clock.h"

namespace hxcomm {
namespace {

// A tensor from here on is sent from where it lies, and then nothing may overwrite it until it has been sent; a smaller
// one is copied. The border is not measured.
constexpr size_t kLendBytes = 64 << 10;

// What a host has said of an operation, null if it has not; and where to note what it says of the next one.
template <class Slot>
const Slot* of_sequence(const Slot (&slots)[2], uint64_t sequence) {
  for (const Slot& slot : slots)
    if (slot.sequence == sequence) return &slot;
  return nullptr;
}

template <class Slot>
Slot& older_of(Slot (&slots)[2]) {
  return slots[0].sequence < slots[1].sequence ? slots[0] : slots[1];
}

// In the flags of a message: the verdict of the sender's host, whose leader it is, is the fingerprint of the message.
// So an operation of two leaders costs one frame each way, not two.
constexpr uint32_t kWithVerdict = 1;

// As the kernels' element types ask for; a small payload may lie anywhere in the buffer it was received in.
constexpr size_t kAlignment = 16;

}  // namespace

Crossing::Crossing(Group& group, std::shared_ptr<Endpoint> endpoint, std::vector<int> hosts,
                   std::vector<Nonce> processes)
    : group_(group),
      endpoint_(std::move(endpoint)),
      wire_(*endpoint_->wire()),
      hosts_(std::move(hosts)),
      me_(static_cast<size_t>(group.rank())) {
  const auto lowest_of = [this](int host) {
    return static_cast<int>(std::find(hosts_.begin(), hosts_.end(), host) - hosts_.begin());
  };
  leader_ = lowest_of(hosts_[me_]);
  remotes_.resize(hosts_.size());
  for (size_t r = 0; r < hosts_.size(); ++r) {
    if (hosts_[r] == hosts_[me_]) continue;
    auto remote = std::make_unique<Remote>();
    remote->process = processes[r];
    remote->host = hosts_[r];
    remote->leads = lowest_of(hosts_[r]) == static_cast<int>(r);
    remotes_[r] = std::move(remote);
    others_.push_back(static_cast<int>(r));
  }
  current_ = group.next_sequence();
}

bool Crossing::is_alone(int rank) const {
  return std::count(hosts_.begin(), hosts_.end(), hosts_[static_cast<size_t>(rank)]) == 1;
}

int Crossing::rank_of(const Nonce& process) const {
  for (const int r : others_)
    if (remote(r).process == process) return r;
  return -1;
}

FrameHeader Crossing::header(FrameType type, int peer, uint64_t sequence) const {
  FrameHeader header{};
  header.type = type;
  header.group = group_.config_.nonce;
  header.sequence = sequence;
  header.source = static_cast<int32_t>(me_);
  header.destination = peer;
  return header;
}

// What the pumping thread does: sorted by what must be seen at once and what the driver takes in its turn.
void Crossing::on_frame(const Nonce& from, const FrameHeader& header, Payload&& payload) {
  const int source = header.source;
  if (source < 0 || static_cast<size_t>(source) >= hosts_.size() || !is_remote(source) ||
      remote(source).process != from || header.destination != static_cast<int32_t>(me_))
    return;  // a process speaks for its own rank only
  Remote& peer = remote(source);
  switch (header.type) {
    case FrameType::packet: {
      const std::lock_guard lock(mutex_);
      peer.packets.push_back(std::move(payload));
      return;
    }
    case FrameType::abort:
      group_.end_by(
          source, header.aux,
          {reinterpret_cast<const char*>(payload.data()), std::min(payload.size(), Control::kReasonBytes - 1)});
      return;
    case FrameType::window:
      group_.one_sided_.on_frame(source, header, payload);
      return;
    case FrameType::left:
      group_.control(source).line.leave();
      return;
    case FrameType::credit:
      if (header.number == 1) {
        peer.acknowledged_packets.store(header.aux, std::memory_order_release);
        return;
      }
      break;
    default:
      break;
  }
  const std::lock_guard lock(mutex_);
  inbox_.push_back({source, header, std::move(payload)});
  has_frames_.store(true, std::memory_order_release);
}

void Crossing::on_lost(const Nonce& process, const std::string& why) {
  const int rank = rank_of(process);
  if (rank < 0) return;
  const std::lock_guard lock(mutex_);
  remote(rank).loss = why;
  remote(rank).lost_ns = now_ns();
  remote(rank).lost.store(true, std::memory_order_release);
  any_lost_.store(true, std::memory_order_release);
}

std::string Crossing::loss_of(int rank) const {
  if (!is_remote(rank) || !remote(rank).lost.load(std::memory_order_acquire)) return "";
  const std::lock_guard lock(mutex_);
  return remote(rank).loss;
}

void Crossing::check_losses() {
  if (!any_lost_.load(std::memory_order_acquire)) return;
  // Who was lost first: those that raised for it may have ended since.
  int first = -1;
  for (const int r : others_) {
    const Remote& peer = remote(r);
    if (!peer.lost.load(std::memory_order_acquire)) continue;
    if (!group_.control(r).line.is_member(group_.config_.nonce)) continue;  // nobody's loss
    if (first < 0 || peer.lost_ns < remote(first).lost_ns) first = r;
  }
  if (first < 0) return;
  const bool has_witness = std::any_of(others_.begin(), others_.end(), [&](int other) {
    return other != first && remote(other).host == remote(first).host &&
           !remote(other).lost.load(std::memory_order_acquire);
  });
  if (has_witness && now_ns() < remote(first).lost_ns + kWitnessNs) return;
  group_.abort(AbortCause::peer_died, first, group_.config_.labels[static_cast<size_t>(first)] + " " + loss_of(first));
}

void Crossing::absorb() {
  if (!has_frames_.load(std::memory_order_acquire)) return;
  std::deque<Frame> frames;
  {
    const std::lock_guard lock(mutex_);
    frames.swap(inbox_);
    has_frames_.store(false, std::memory_order_relaxed);
  }
  for (Frame& frame : frames) take(std::move(frame));
  give_credits_back();
  flush();
}

void Crossing::take(Frame&& frame) {
  Remote& peer = remote(frame.source);
  peer.acknowledged = std::max(peer.acknowledged, frame.header.aux);
  switch (frame.header.type) {
    case FrameType::message:
      if ((frame.header.flags & kWithVerdict) != 0)
        older_of(peer.said) = {frame.header.sequence, frame.header.fingerprint};
      take_message(std::move(frame));
      return;
    case FrameType::verdict:
      older_of(peer.said) = {frame.header.sequence, frame.header.fingerprint};
      return;
    case FrameType::descriptors:
      note_descriptors(frame);
      return;
    default:
      return;
  }
}

void Crossing::take_message(Frame&& frame) {
  Remote& peer = remote(frame.source);
  const FrameHeader& header = frame.header;
  if (header.sequence > current_ || (header.sequence == current_ && !running_)) {
    peer.early.push_back(std::move(frame));
    return;
  }
  ++peer.taken;
  // Of an operation that has failed, or of another call than this rank's: the verdict will say so.
  if (header.sequence < current_ || header.fingerprint != fingerprint_) return;
  if (header.number >= arrivals_.size() || arrivals_[header.number].has_value())
    throw Error(ErrorKind::aborted, group_.config_.labels[static_cast<size_t>(frame.source)] + " sent message " +
                                        std::to_string(header.number) + " of an operation that has " +
                                        std::to_string(arrivals_.size()) + ", or sent it twice");
  arrivals_[header.number] = std::move(frame.payload);
}

void Crossing::begin(const Op& op) {
  const bool first = op.sequence == op.first_sequence;
  first_ = op.first_sequence;
  if (first) {
    fingerprint_ = group_.own().line.fingerprint_of(op.sequence);
    described_ = false;
  }
  current_ = op.sequence;
  running_ = true;
  arrivals_.clear();
  if (op.choice.plan) arrivals_.resize(static_cast<size_t>(op.choice.plan->messages));
  for (const int r : others_) {
    std::deque<Frame> frames;
    frames.swap(remote(r).early);
    for (Frame& frame : frames) take_message(std::move(frame));
  }
  give_credits_back();
}

void Crossing::finish(const Op& op, bool failed) {
  running_ = false;
  current_ = op.sequence + 1;
  arrivals_.clear();
  outgoing_.reset();
  if (failed) drop_queued();
}

void Crossing::drop_queued() {
  for (const int r : others_) remote(r).queue.clear();
  queued_ = queued_lent_ = 0;
}

const std::byte* Crossing::arrived(uint32_t number) {
  std::optional<Payload>& payload = arrivals_[number];
  if (!payload) return nullptr;
  if (reinterpret_cast<uintptr_t>(payload->data()) % kAlignment != 0) {
    Payload aligned = wire_.make_payload(payload->size());
    std::memcpy(aligned.data(), payload->data(), payload->size());
    *payload = std::move(aligned);
  }
  return payload->data();
}

std::byte* Crossing::outgoing(size_t nbytes) {
  if (nbytes > kMaxMessageBytes)
    throw Error(ErrorKind::usage, "a message of " + std::to_string(nbytes) + " bytes to another host; at most " +
                                      std::to_string(kMaxMessageBytes) + " fit in one");
  outgoing_ = std::make_shared<Payload>(wire_.make_payload(nbytes));
  return outgoing_->data();
}

void Crossing::send(int peer, uint32_t number) {
  // A rank of this host that failed has set this rank's word before its user had its tensors back. What was computed
  // from them since goes nowhere: the frame would travel on another connection than that rank's word to the receiver.
  if (group_.own().abort.is_set()) throw *group_.failure(nullptr);
  FrameHeader header = this->header(FrameType::message, peer, current_);
  header.fingerprint = fingerprint_;
  header.number = number;
  hand_over(peer, {header, outgoing_, nullptr, outgoing_->size()});
}

bool Crossing::lend(int peer, uint32_t number, const std::byte* data, size_t nbytes) {
  // What fails in the middle of an operation is overwritten by its user, sent or not.
  if (nbytes < kLendBytes || !wire_.may_lend()) return false;
  FrameHeader header = this->header(FrameType::message, peer, current_);
  header.fingerprint = fingerprint_;
  header.number = number;
  hand_over(peer, {header, nullptr, data, nbytes});
  return true;
}

void Crossing::hand_over(int peer, Outgoing message) {
  Remote& to = remote(peer);
  if (!to.queue.empty() || to.sent - to.acknowledged >= kCredits) {
    queued_lent_ += message.lent != nullptr ? 1 : 0;
    ++queued_;
    to.queue.push_back(std::move(message));
    return;
  }
  transmit(to, message);
}

void Crossing::transmit(Remote& to, const Outgoing& message) {
  FrameHeader header = message.header;
  ++to.sent;
  header.aux = to.told = to.taken;
  if (to.verdict_due && header.sequence == first_) {
    header.flags = kWithVerdict;
    to.verdict_due = false;
  }
  // A rank that is lost gets nothing, and check_losses() ends the group.
  if (message.lent != nullptr)
    wire_.send_lent(to.process, header, message.lent, message.nbytes, lent_);
  else
    wire_.send(to.process, header, *message.payload);
}

void Crossing::flush() {
  if (queued_ == 0) return;
  for (const int r : others_) {
    Remote& to = remote(r);
    while (!to.queue.empty() && to.sent - to.acknowledged < kCredits) {
      transmit(to, to.queue.front());
      queued_lent_ -= to.queue.front().lent != nullptr ? 1 : 0;
      --queued_;
      to.queue.pop_front();
    }
  }
}

void Crossing::give_credits_back() {
  for (const int r : others_) {
    Remote& peer = remote(r);
    if (peer.taken - peer.told < std::max<uint64_t>(kCredits / 2, 1)) continue;
    FrameHeader header = this->header(FrameType::credit, r, current_);
    header.aux = peer.told = peer.taken;
    wire_.send(peer.process, header, nullptr, 0);
  }
}

bool Crossing::lends() { return queued_lent_ > 0 || lent_->load(std::memory_order_acquire) > 0; }

bool Crossing::all_sent() { return queued_ == 0 && !lends(); }

void Crossing::announce(const Op& op, uint64_t fingerprint) {
  // The counts of an uneven call differ by rank and are compared by all, so they go along.
  if (op.call.uneven || fingerprint == 0) describe(op);
  verdict_ = fingerprint;
  for (const int r : others_) remote(r).verdict_due = remote(r).leads;
  // Only a rank that goes on to run its plan will send messages.
  if (op.call.uneven || fingerprint == 0) send_due_verdicts();
}

void Crossing::send_due_verdicts() {
  for (const int r : others_) {
    Remote& to = remote(r);
    if (!to.verdict_due) continue;
    to.verdict_due = false;
    FrameHeader header = this->header(FrameType::verdict, r, first_);
    header.fingerprint = verdict_;
    header.aux = to.told = to.taken;
    wire_.send(to.process, header, nullptr, 0);
  }
}

void Crossing::describe(const Op& op) {
  if (described_) return;
  described_ = true;
  const int n = group_.world_size();
  std::vector<std::byte> bytes;
  for (int r = 0; r < n; ++r) {
    if (is_remote(r)) continue;
    const auto* first = reinterpret_cast<const std::byte*>(&descriptor_at(group_.control(r), n, op.first_sequence));
    bytes.insert(bytes.end(), first, first + descriptor_bytes(n));
  }
  for (const int r : others_) {
    if (!remote(r).leads) continue;
    wire_.send(remote(r).process, header(FrameType::descriptors, r, op.first_sequence), bytes.data(), bytes.size());
  }
}

void Crossing::note_descriptors(const Frame& frame) {
  Remote& peer = remote(frame.source);
  const auto ranks = std::count(hosts_.begin(), hosts_.end(), peer.host);
  if (frame.payload.size() != static_cast<size_t>(ranks) * descriptor_bytes(group_.world_size())) return;
  Remote::Described& described = older_of(peer.described);
  const std::byte* first = frame.payload.data();
  described.bytes.assign(first, first + frame.payload.size());
  described.sequence = frame.header.sequence;
}

// Puts them where the ranks of this host read them. False where some have not come yet.
bool Crossing::know_all_descriptors(uint64_t sequence) {
  const auto is_here = [&](int r) { return !remote(r).leads || of_sequence(remote(r).described, sequence) != nullptr; };
  if (!std::all_of(others_.begin(), others_.end(), is_here)) return false;
  const int n = group_.world_size();
  for (const int leader : others_) {
    if (!remote(leader).leads) continue;
    const std::byte* bytes = of_sequence(remote(leader).described, sequence)->bytes.data();
    size_t at = 0;
    for (int r = 0; r < n; ++r) {
      if (hosts_[static_cast<size_t>(r)] != remote(leader).host) continue;
      std::memcpy(static_cast<void*>(&foreign_descriptor_at(group_.own(), n, r)), bytes + at, descriptor_bytes(n));
      at += descriptor_bytes(n);
    }
  }
  return true;
}

Crossing::Verdict Crossing::verdict(const Op& op) {
  const uint64_t sequence = op.first_sequence;
  if (agreed_ == sequence) return Verdict::agreed;
  send_due_verdicts();  // whoever asks waits
  Line& line = group_.control(leader_).line;
  if (leads() && !line.has_verdict(sequence)) {
    const uint64_t mine = op.refusal.empty() ? fingerprint_ : 0;
    bool alike = mine != 0, all = true;
    for (int r = 0; r < group_.world_size(); ++r)
      alike = alike && (is_remote(r) || group_.control(r).line.fingerprint_of(sequence) == mine);
    for (const int r : others_) {
      if (!remote(r).leads) continue;
      const Remote::Said* said = of_sequence(remote(r).said, sequence);
      all = all && said != nullptr;
      if (said != nullptr && said->fingerprint != mine) alike = false;
    }
    if (!alike) describe(op);
    if (!all || ((!alike || op.call.uneven) && !know_all_descriptors(sequence))) return Verdict::pending;
    line.publish_verdict(sequence, alike);
    group_.ring_sleepers();
  }
  if (!line.has_verdict(sequence)) return Verdict::pending;
  if (!line.agreed()) return Verdict::differ;
  agreed_ = sequence;
  return Verdict::agreed;
}

std::vector<int> Crossing::needed_by(const Op& op) const {
  std::vector<int> needed;
  const bool waits = leads() && agreed_ != op.first_sequence && op.phase >= Op::Phase::agreeing;
  for (const int r : others_) {
    const Remote& peer = remote(r);
    const bool silent = waits && peer.leads &&
                        (of_sequence(peer.said, op.first_sequence) == nullptr ||
                         (described_ && of_sequence(peer.described, op.first_sequence) == nullptr));
    if (silent || !peer.queue.empty()) needed.push_back(r);
  }
  return needed;
}

bool Crossing::agreed() {
  if (agreed_ != first_) send_due_verdicts();
  return agreed_ == first_;
}

void Crossing::send_of_window(int peer, uint64_t window, uint32_t what, uint64_t aux, const void* data, size_t nbytes) {
  FrameHeader header = this->header(FrameType::window, peer, window);
  header.number = what;
  header.aux = aux;
  wire_.send(remote(peer).process, header, data, nbytes);
}

void Crossing::send_packet(int peer, const Packet& packet) {
  wire_.send(remote(peer).process, header(FrameType::packet, peer, 0), &packet,
             offsetof(Packet, payload) + packet.payload_bytes);
}

std::deque<Payload> Crossing::take_packets(int peer) {
  const std::lock_guard lock(mutex_);
  return std::exchange(remote(peer).packets, {});
}

bool Crossing::has_packets(int peer) const {
  const std::lock_guard lock(mutex_);
  return !remote(peer).packets.empty();
}

void Crossing::acknowledge_packets(int peer, uint64_t consumed) {
  FrameHeader header = this->header(FrameType::credit, peer, 0);
  header.number = 1;
  header.aux = consumed;
  wire_.send(remote(peer).process, header, nullptr, 0);
}

uint64_t Crossing::acknowledged_packets(int peer) const {
  return remote(peer).acknowledged_packets.load(std::memory_order_acquire);
}

void Crossing::tell_abort(uint64_t word, const std::string& reason) {
  for (const int r : others_) {
    FrameHeader header = this->header(FrameType::abort, r, 0);
    header.aux = word;
    if (group_.control(r).line.is_member(group_.config_.nonce))
      wire_.send(remote(r).process, header, reason.data(), reason.size());
  }
}

void Crossing::leave() {
  for (const int r : others_) wire_.send(remote(r).process, header(FrameType::left, r, 0), nullptr, 0);
}

}  // namespace hxcomm
