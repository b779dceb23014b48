#include "communicator/point_to_point.h"

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <utility>

#include "communicator/group.h"
#include "core/clock.h"

namespace hxcomm {
namespace {

uint64_t bytes_of(const Op& op) { return op.call.count * item_size(op.call.dtype); }
std::byte* memory_of(const Op& op) { return (op.call.op == OpCode::send ? op.call.input : op.call.output)[0].data; }

bool fits(const Op& recv, int source, int32_t tag) {
  return recv.call.tag == tag && (recv.call.root == kAnySource || recv.call.root == source);
}

Error corrupt(const std::string& sender, const char* what) {
  return Error(ErrorKind::aborted,
               sender + " sent " + what + ": its memory is corrupt, or another version of hxcomm runs there");
}

}  // namespace

std::string elements(uint64_t count, DType dtype, DeviceKind device) {
  return std::to_string(count) + " elements of " + dtype_name(dtype) +
         (device == DeviceKind::hx ? " on device hx" : "");
}

PointToPoint::PointToPoint(Group& group) : group_(group), channels_(static_cast<size_t>(group.world_size())) {}

void PointToPoint::post(std::shared_ptr<Op> op, Finished* finished) {
  const std::lock_guard lock(mutex_);
  // Under the lock, so that nothing is left pending after fail_all().
  if (group_.own().abort.is_set()) throw *group_.failure(nullptr);
  const int peer = op->call.root;
  if (peer != kAnySource) report_refused(peer, *op, finished);
  count(+1);
  if (op->call.op == OpCode::send)
    channels_[static_cast<size_t>(peer)].sends.push_back(std::move(op));
  else if (!match_posted(op, finished))  // at once: no later message may come between
    receives_.push_back(std::move(op));
}

// Throws where the peer, or this rank itself, has refused an eager send that had already ended well here.
void PointToPoint::report_refused(int peer, const Op& op, Finished* finished) {
  Channel& channel = channels_[static_cast<size_t>(peer)];
  // It may have told us so while nothing was pending here.
  if (peer != group_.rank() && drain(peer, finished)) ring(peer);
  if (channel.refused.empty()) return;
  throw Error(ErrorKind::mismatch, "an earlier send to this rank was not taken: " + std::exchange(channel.refused, {}) +
                                       " This call (" + state_of(op) +
                                       ") only reports that: it was not begun and may be made again.");
}

bool PointToPoint::is_remote(int peer) const { return group_.crossing_ && group_.crossing_->is_remote(peer); }

void PointToPoint::ring(int peer) {
  if (is_remote(peer)) return;
  Doorbell::fence_after_publishing();
  group_.peers_[static_cast<size_t>(peer)]->ring_if_asleep();
}

void PointToPoint::count(int pending) {
  n_pending_ += pending;
  group_.posted_.fetch_add(pending, std::memory_order_relaxed);
  pending > 0 ? group_.progress_->operation_posted() : group_.progress_->operation_finished();
}

void PointToPoint::reply(Channel& channel, Outgoing packet) {
  channel.replies.push_back(std::move(packet));
  count(+1);
}

std::vector<Endpoint::Range> PointToPoint::ranges() const {
  const std::lock_guard lock(mutex_);
  std::vector<Endpoint::Range> ranges;
  for (const Channel& channel : channels_)
    if (channel.ring_offset != 0) ranges.push_back({channel.ring_offset, kRingBytes});
  return ranges;
}

Packet& PointToPoint::slot(std::byte* segment, uint64_t ring_offset, uint64_t number) const {
  return reinterpret_cast<Packet*>(segment + ring_offset)[number % kRingPackets];
}

bool PointToPoint::advance(Finished* finished, bool look_at_clock) {
  if (!group_.try_lock(mutex_)) return false;
  const std::lock_guard lock(mutex_, std::adopt_lock);
  if (n_pending_ == 0) return false;
  const size_t before = finished->size();
  bool moved = false;
  try {
    send_to_self(finished);
    for (int peer = 0; peer < group_.world_size(); ++peer) {
      if (peer == group_.rank()) continue;
      const bool drained = drain(peer, finished);
      const bool pumped = pump(peer, finished);
      if (!drained && !pumped) continue;
      moved = true;
      ring(peer);
    }
    if (n_pending_ > 0 && group_.crossing_) group_.crossing_->check_losses();
    if (n_pending_ > 0 && look_at_clock) check_failures();
  } catch (const std::exception& error) {  // out of memory, too: this may be the background thread
    group_.abort(AbortCause::called, group_.rank(), error.what());
  }
  // After what could be moved: what arrived before the end of the group counts.
  if (n_pending_ > 0 && group_.own().abort.is_set()) drop_all(finished);
  return moved || finished->size() > before;
}

bool PointToPoint::drain_from_afar(int peer, Finished* finished) {
  Channel& channel = channels_[static_cast<size_t>(peer)];
  const std::string& sender = group_.config_.labels[static_cast<size_t>(peer)];
  std::deque<Payload> frames = group_.crossing_->take_packets(peer);
  if (frames.empty()) return false;
  if (!afar_) afar_ = std::make_unique<Packet>();
  for (const Payload& frame : frames) {
    constexpr size_t kHeaderBytes = offsetof(Packet, payload);
    if (frame.size() < kHeaderBytes || frame.size() > sizeof(Packet)) throw corrupt(sender, "a packet of a wrong size");
    std::memcpy(afar_.get(), frame.data(), frame.size());  // it may lie anywhere in the buffer it was received in
    if (afar_->payload_bytes != frame.size() - kHeaderBytes) throw corrupt(sender, "a packet of a wrong size");
    ++channel.consumed;
    take(peer, *afar_, afar_->payload_bytes, finished);
  }
  group_.crossing_->acknowledge_packets(peer, channel.consumed);
  return true;
}

bool PointToPoint::drain(int peer, Finished* finished) {
  if (is_remote(peer)) return drain_from_afar(peer, finished);
  Channel& channel = channels_[static_cast<size_t>(peer)];
  const auto p = static_cast<size_t>(peer);
  PairLine& theirs = group_.pair_line(peer, group_.rank());
  const uint64_t produced = theirs.packets_produced();
  if (produced == channel.consumed) return false;
  // It is another process's memory: every number in it is read once and checked.
  const uint64_t offset = theirs.offset_of_ring();
  if (offset == 0 || offset % 64 != 0 || offset > group_.segment_bytes_[p] ||
      group_.segment_bytes_[p] - offset < kRingBytes || produced - channel.consumed > kRingPackets)
    throw Error(ErrorKind::aborted,
                group_.config_.labels[p] + " published a ring of messages at byte " + std::to_string(offset) +
                    " with " + std::to_string(produced - channel.consumed) + " packets: its memory is corrupt");
  while (channel.consumed != produced) {
    const Packet& packet = slot(group_.segments_[p], offset, channel.consumed);
    take(peer, packet, packet.payload_bytes, finished);
    ++channel.consumed;
    group_.pair_line(group_.rank(), peer).publish_consumed(channel.consumed);
  }
  return true;
}

void PointToPoint::take(int peer, const Packet& packet, uint32_t payload_bytes, Finished* finished) {
  Channel& channel = channels_[static_cast<size_t>(peer)];
  const std::string& sender = group_.config_.labels[static_cast<size_t>(peer)];
  if (payload_bytes > Packet::kPayloadBytes) throw corrupt(sender, "a packet that is too long");
  const uint64_t number = packet.message;
  switch (packet.kind) {
    case PacketKind::eager:
    case PacketKind::announce:
      return take_message(peer, packet, payload_bytes, finished);
    case PacketKind::request: {
      const auto it = channel.announced.find(number);
      if (it == channel.announced.end()) throw corrupt(sender, "a request for a message that was not announced");
      channel.streams.push_back({std::move(it->second), number, 0});
      channel.announced.erase(it);
      return;
    }
    case PacketKind::data: {
      const auto it = channel.incoming.find(number);
      const uint64_t offset = packet.offset;
      if (it == channel.incoming.end() || offset != it->second.received_bytes ||
          bytes_of(*it->second.recv) - offset < payload_bytes)
        throw corrupt(sender, "data that was not requested");
      std::memcpy(memory_of(*it->second.recv) + offset, packet.payload, payload_bytes);
      it->second.received_bytes += payload_bytes;
      if (it->second.received_bytes < bytes_of(*it->second.recv)) return;
      end(it->second.recv, nullptr, finished);
      channel.incoming.erase(it);
      return;
    }
    case PacketKind::taken: {
      const auto it = channel.announced.find(number);
      if (it == channel.announced.end()) throw corrupt(sender, "that it took a message that was not announced");
      end(it->second, nullptr, finished);
      channel.announced.erase(it);
      return;
    }
    case PacketKind::refuse: {
      std::string text(reinterpret_cast<const char*>(packet.payload), payload_bytes);
      const auto it = channel.announced.find(number);
      if (it == channel.announced.end()) {
        refuse_sent(channel, number, std::move(text));
        return;
      }
      end(it->second, std::make_unique<Error>(ErrorKind::mismatch, std::move(text)), finished);
      channel.announced.erase(it);
      return;
    }
  }
  throw corrupt(sender, "a packet of an unknown kind");
}

void PointToPoint::take_message(int peer, const Packet& packet, uint32_t payload_bytes, Finished* finished) {
  const auto p = static_cast<size_t>(peer);
  const std::string& sender = group_.config_.labels[p];
  const bool announced = packet.kind == PacketKind::announce;
  const uint8_t dtype = packet.dtype, device = packet.device;
  const uint64_t offset = packet.offset;
  Message message;
  message.number = packet.message;
  message.tag = packet.tag;
  message.dtype = static_cast<DType>(dtype);
  message.count = packet.count;
  message.announced = announced;
  message.device = static_cast<DeviceKind>(device);
  if (dtype >= kDTypes || device >= kDeviceKinds ||
      (!announced && message.count * item_size(message.dtype) != payload_bytes))
    throw corrupt(sender, "a message whose size is not its count times its dtype");
  if (!announced) message.payload.assign(packet.payload, packet.payload + payload_bytes);
  if (announced && message.device == DeviceKind::hx && !is_remote(peer)) {
    const size_t segment = group_.segment_bytes_[p];
    if (offset > segment || message.count > (segment - offset) / item_size(message.dtype))
      throw corrupt(sender, "a tensor that lies outside its segment");
    message.tensor = group_.segments_[p] + offset;
  }
  arrive(peer, std::move(message), finished);
}

// The send had been eager and is over: its record says so at once, its user hears of it at the next call with that
// rank.
void PointToPoint::refuse_sent(Channel& channel, uint64_t message, std::string text) {
  for (const auto& [number, record] : channel.sent_eagerly)
    if (number == message) group_.own().flight.close(record, /*well=*/false, now_ns());
  channel.refused = std::move(text);
}

void PointToPoint::end_eager(Channel& channel, const OpPointer& send, uint64_t message, Finished* finished) {
  channel.sent_eagerly.emplace_back(message, static_cast<uint64_t>(send->record));
  if (channel.sent_eagerly.size() > Flight::kRecords) channel.sent_eagerly.pop_front();
  end(send, nullptr, finished);
}

void PointToPoint::arrive(int source, Message message, Finished* finished) {
  for (auto it = receives_.begin(); it != receives_.end(); ++it)
    if (fits(**it, source, message.tag)) {
      const OpPointer recv = *it;
      receives_.erase(it);
      deliver(source, message, recv, finished);
      return;
    }
  channels_[static_cast<size_t>(source)].arrived.push_back(std::move(message));
}

bool PointToPoint::match_posted(const OpPointer& recv, Finished* finished) {
  const int n = group_.world_size();
  const bool any = recv->call.root == kAnySource;
  for (int i = 0; i < (any ? n : 1); ++i) {
    const int source = any ? (next_source_ + i) % n : recv->call.root;
    auto& arrived = channels_[static_cast<size_t>(source)].arrived;
    const auto it =
        std::find_if(arrived.begin(), arrived.end(), [&](const Message& m) { return fits(*recv, source, m.tag); });
    if (it == arrived.end()) continue;
    if (any) next_source_ = (source + 1) % n;  // fair: no source can starve the others
    Message message = std::move(*it);
    arrived.erase(it);
    deliver(source, message, recv, finished);
    return true;
  }
  return false;
}

void PointToPoint::deliver(int source, Message& message, const OpPointer& recv, Finished* finished) {
  Channel& channel = channels_[static_cast<size_t>(source)];
  recv->source = source;
  if (message.dtype != recv->call.dtype || message.count != recv->call.count || message.device != recv->call.device) {
    const std::string text =
        "a message and the receive that it met do not fit: " + group_.config_.labels[static_cast<size_t>(source)] +
        " sent " + elements(message.count, message.dtype, message.device) + " with tag " + std::to_string(message.tag) +
        ", " + group_.config_.labels[static_cast<size_t>(group_.rank())] + " receives " +
        elements(recv->call.count, recv->call.dtype, recv->call.device) +
        "; nothing was stored, both are used up and the group stays usable. Send and receive the same dtype and count "
        "on the same device.";
    if (message.send)
      end(message.send, std::make_unique<Error>(ErrorKind::mismatch, text), finished);
    else if (source == group_.rank())
      refuse_sent(channel, message.number, text);
    else
      reply(channel, {PacketKind::refuse, message.number, text.substr(0, Packet::kPayloadBytes)});
    end(recv, std::make_unique<Error>(ErrorKind::mismatch, text), finished);
  } else if (message.send) {
    std::memcpy(memory_of(*recv), memory_of(*message.send), bytes_of(*recv));
    end(message.send, nullptr, finished);
    end(recv, nullptr, finished);
  } else if (message.tensor != nullptr) {
    std::memcpy(memory_of(*recv), message.tensor, bytes_of(*recv));
    reply(channel, {PacketKind::taken, message.number, {}, recv});
  } else if (message.announced) {
    channel.incoming.emplace(message.number, Incoming{recv, 0});
    reply(channel, {PacketKind::request, message.number});
  } else {
    if (!message.payload.empty()) std::memcpy(memory_of(*recv), message.payload.data(), message.payload.size());
    end(recv, nullptr, finished);
  }
}

void PointToPoint::send_to_self(Finished* finished) {
  Channel& channel = channels_[static_cast<size_t>(group_.rank())];
  while (!channel.sends.empty()) {
    const OpPointer send = std::move(channel.sends.front());
    channel.sends.pop_front();
    Message message;
    message.number = channel.next_message++;
    message.tag = send->call.tag;
    message.dtype = send->call.dtype;
    message.count = send->call.count;
    message.device = send->call.device;
    // As to a peer: a small send ends at once, a large one when it has been received.
    if (bytes_of(*send) <= Packet::kPayloadBytes) {
      message.payload.assign(memory_of(*send), memory_of(*send) + bytes_of(*send));
      end_eager(channel, send, message.number, finished);
    } else {
      message.send = send;
    }
    arrive(group_.rank(), std::move(message), finished);
  }
}

bool PointToPoint::pump(int peer, Finished* finished) {
  Channel& channel = channels_[static_cast<size_t>(peer)];
  if (channel.replies.empty() && channel.sends.empty() && channel.streams.empty()) return false;
  if (is_remote(peer)) return pump_afar(peer, finished);
  PairLine& mine = group_.pair_line(group_.rank(), peer);
  if (channel.ring_offset == 0) {
    channel.ring_offset = group_.endpoint_->segment().allocate(kRingBytes);
    mine.set_ring_offset(channel.ring_offset);
  }
  bool moved = false;
  for (;;) {
    const uint64_t consumed = group_.pair_line(peer, group_.rank()).packets_consumed();
    if (channel.produced - consumed >= kRingPackets) return moved;
    Packet& packet = slot(group_.segments_[static_cast<size_t>(group_.rank())], channel.ring_offset, channel.produced);
    if (!put_next(peer, packet, finished)) return moved;
    mine.publish_produced(++channel.produced);
    moved = true;
  }
}

bool PointToPoint::pump_afar(int peer, Finished* finished) {
  Channel& channel = channels_[static_cast<size_t>(peer)];
  if (!afar_) afar_ = std::make_unique<Packet>();
  bool moved = false;
  while (channel.produced - group_.crossing_->acknowledged_packets(peer) < kRingPackets) {
    if (!put_next(peer, *afar_, finished)) return moved;
    group_.crossing_->send_packet(peer, *afar_);
    ++channel.produced;
    moved = true;
  }
  return moved;
}

bool PointToPoint::put_next(int peer, Packet& packet, Finished* finished) {
  Channel& channel = channels_[static_cast<size_t>(peer)];
  // Replies first: the peer waits for them. Messages before data, so that a long one does not hold up the short ones.
  if (!channel.replies.empty()) {
    put_reply(channel, packet, finished);
    return true;
  }
  if (!channel.sends.empty()) {
    const OpPointer send = std::move(channel.sends.front());
    channel.sends.pop_front();
    const uint64_t nbytes = bytes_of(*send);
    const bool eager = nbytes <= Packet::kPayloadBytes;
    packet.kind = eager ? PacketKind::eager : PacketKind::announce;
    packet.dtype = static_cast<uint8_t>(send->call.dtype);
    packet.device = static_cast<uint8_t>(send->call.device);
    if (!eager && send->call.device == DeviceKind::hx)
      packet.offset = static_cast<uint64_t>(memory_of(*send) - group_.segments_[static_cast<size_t>(group_.rank())]);
    packet.tag = send->call.tag;
    packet.count = send->call.count;
    packet.message = channel.next_message++;
    packet.payload_bytes = eager ? static_cast<uint32_t>(nbytes) : 0;
    if (packet.payload_bytes > 0) std::memcpy(packet.payload, memory_of(*send), nbytes);
    if (eager)
      end_eager(channel, send, packet.message, finished);
    else
      channel.announced.emplace(packet.message, send);
    return true;
  }
  if (channel.streams.empty()) return false;
  Stream& stream = channel.streams.front();
  const uint64_t nbytes = std::min<uint64_t>(bytes_of(*stream.send) - stream.sent_bytes, Packet::kPayloadBytes);
  packet.kind = PacketKind::data;
  packet.message = stream.message;
  packet.offset = stream.sent_bytes;
  packet.payload_bytes = static_cast<uint32_t>(nbytes);
  std::memcpy(packet.payload, memory_of(*stream.send) + stream.sent_bytes, nbytes);
  stream.sent_bytes += nbytes;
  if (stream.sent_bytes == bytes_of(*stream.send)) {
    end(stream.send, nullptr, finished);
    channel.streams.pop_front();
  }
  return true;
}

void PointToPoint::put_reply(Channel& channel, Packet& packet, Finished* finished) {
  const Outgoing reply = std::move(channel.replies.front());
  channel.replies.pop_front();
  packet.kind = reply.kind;
  packet.message = reply.message;
  packet.payload_bytes = static_cast<uint32_t>(reply.text.size());
  std::memcpy(packet.payload, reply.text.data(), reply.text.size());
  count(-1);
  // Looked at after the copy: a sender that failed has set this rank's word before its user had the tensor back.
  if (reply.recv) end(reply.recv, group_.own().abort.is_set() ? group_.failure(reply.recv.get()) : nullptr, finished);
}

void PointToPoint::end(const OpPointer& op, std::unique_ptr<Error> error, Finished* finished) {
  op->error = std::move(error);
  group_.count_message(*op);
  group_.own().flight.close(static_cast<uint64_t>(op->record), op->error == nullptr, now_ns());
  op->finished.store(true, std::memory_order_release);
  count(-1);
  finished->push_back(op);
}

}  // namespace hxcomm
