// The receiving side of the wire: events of connections, hellos, and the way of a frame to its group.
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <utility>

#include "core/clock.h"
#include "transport/wire.h"

namespace hxcomm {
namespace {

constexpr int kMostFrames = 256;  // of one pump, so that the caller's own work goes on
constexpr int64_t kDoubtNs = 2'000'000'000;
constexpr int64_t kAskNs = 100'000'000;
constexpr char kClosed[] = "closed its connection (process or host died, cause unknown)";
constexpr char kSilent[] = "has not acknowledged data for 2 s (its host or the network is down)";

std::string host_of(const std::string& address) { return address.substr(0, address.rfind(':')); }

}  // namespace

bool Wire::pump() {
  std::vector<std::shared_ptr<FrameHandler>> held;  // a handler's end may call the wire: after the lock
  const std::unique_lock lock(mutex_, std::try_to_lock);
  if (!lock || socket_ == nullptr) return false;
  ask_doubtful_links();
  if (!something_is_there()) return false;
  take_events();
  int frames = 0;
  for (; frames < kMostFrames; ++frames) {
    Arrival arrival;
    if (!receive(&arrival)) break;
    take(arrival);
  }
  if (frames == kMostFrames)
    must_look_.store(true, std::memory_order_relaxed);
  else if (any_closed_)
    bury_closed_links();  // all that they had sent has been handed out
  held.swap(held_);
  return true;
}

// One system call (0.3 us). libzmq's own way to see that nothing is there costs one a socket, and more.
bool Wire::something_is_there() {
  pollfd fds[] = {{fd_, POLLIN, 0}, {monitor_fd_, POLLIN, 0}, {wakeup_, POLLIN, 0}};
  const bool readable = poll(fds, 3, 0) > 0;
  uint64_t rings = 0;
  if (readable && fds[2].revents != 0) [[maybe_unused]]
    const ssize_t nbytes = read(wakeup_, &rings, sizeof rings);
  return must_look_.exchange(false, std::memory_order_acquire) || readable;
}

void Wire::take_events() {
  for (;;) {
    Payload head, address;
    if (zmq_.msg_recv(head.message(), monitor_, zmq::kDontWait) < 0) return;
    if (zmq_.msg_more(head.message()) == 0 || zmq_.msg_recv(address.message(), monitor_, zmq::kDontWait) < 0) continue;
    uint16_t event = 0;
    uint32_t value = 0;
    if (head.size() != sizeof event + sizeof value) continue;
    std::memcpy(&event, head.data(), sizeof event);
    std::memcpy(&value, head.data() + sizeof event, sizeof value);
    take_event(event, static_cast<int>(value),
               std::string(reinterpret_cast<const char*>(address.data()), address.size()));
  }
}

void Wire::take_event(uint16_t event, int value, const std::string& address) {
  const Handshake handshake = std::exchange(handshake_, Handshake::went_well);
  switch (event) {
    case zmq::kConnected:
      for (auto& [label, link] : links_)
        if (link.ours && !link.closed && link.address == address) link.fd = value;
      descriptors_[value] = {true, true, 0, address};
      watch_->add(value);
      break;
    case zmq::kAccepted: {
      Descriptor& descriptor = descriptors_[value];
      descriptor.open = true;
      descriptor.ours = false;
      ++descriptor.accepted;
      descriptor.address = remote_address(value);
      watch_->add(value);
      break;
    }
    case zmq::kDisconnected:
      on_disconnected(value, handshake);
      break;
    case zmq::kClosed:
      on_failure(address, "nothing answers at " + address + ": refused, or no way there");
      break;
    case zmq::kHandshakeFailedNoDetail:  // the other side hung up: it told its own host why
      on_failure(address, "the other side at " + address + " hung up in the handshake: has it another secret?");
      handshake_ = handshake == Handshake::failed ? handshake : Handshake::given_up;  // one end may have two events
      break;
    case zmq::kHandshakeFailedProtocol:
    case zmq::kHandshakeFailedAuth:
      on_failure(address, "the handshake with " + address + " failed: has it another secret, or is it no hxcomm?");
      handshake_ = Handshake::failed;
      break;
  }
}

void Wire::on_failure(const std::string& address, const std::string& why) {
  for (auto& [label, link] : links_)
    if (link.ours && !link.open && link.address == address) close_link(link, why);
}

void Wire::on_disconnected(int fd, Handshake handshake) {
  const bool silent = watch_->remove(fd);
  Descriptor& descriptor = descriptors_[fd];
  descriptor.open = false;
  bool known = false;
  for (auto& [label, link] : links_)
    if (link.fd == fd) {
      known = true;
      close_link(link, silent ? kSilent : kClosed);
      link.fd = -1;
    }
  if (known || descriptor.ours || handshake == Handshake::went_well) return;
  const std::string visitor = whom(fd);
  visitors_trouble_ = "the last to connect to us, from " + visitor;
  if (handshake == Handshake::given_up) {  // a port scan, too: nothing to complain of
    visitors_trouble_ += ", hung up in the handshake: has it another secret?";
    return;
  }
  visitors_trouble_ += ", has another secret, or is no hxcomm";
  complaints_.ignored("a connection with another secret than the job's, or not of hxcomm", host_of(visitor), visitor);
}

// One frame with all its parts; libzmq hands out whole ones only.
bool Wire::receive(Arrival* arrival) {
  if (zmq_.msg_recv(arrival->label_part.message(), socket_, zmq::kDontWait) < 0) return false;
  arrival->label = {reinterpret_cast<const char*>(arrival->label_part.data()), arrival->label_part.size()};
  bool more = zmq_.msg_more(arrival->label_part.message()) != 0;
  Payload surplus;
  while (more) {
    Payload& part = arrival->parts == 0 ? arrival->header_part : (arrival->parts == 1 ? arrival->payload : surplus);
    if (zmq_.msg_recv(part.message(), socket_, zmq::kDontWait) < 0) break;
    more = zmq_.msg_more(part.message()) != 0;
    if (arrival->parts == 0) arrival->fd = zmq_.msg_get(part.message(), zmq::kSourceFd);
    ++arrival->parts;
  }
  return true;
}

// What is wrong with a frame; null: nothing that its header tells. `header` is set where the frame has one of ours.
const char* Wire::problem_of(const Arrival& arrival, FrameHeader* header) const {
  const size_t tag_bytes = security_.mode == WireSecurity::Mode::mac ? sizeof(Tag) : 0;
  if (arrival.parts < 1 || arrival.header_part.size() < sizeof *header) return "a message that is no frame";
  std::memcpy(header, arrival.header_part.data(), sizeof *header);
  if (header->magic != kFrameMagic) return "a message that is no frame";
  if (header->version != kWireVersion) return "a frame of another version of hxcomm";
  if (arrival.parts != 2 || arrival.header_part.size() != sizeof *header + tag_bytes)
    return "a frame with too few or too many bytes";
  if (header->crc != crc_of(*header)) return "a frame with a wrong checksum";
  const auto type = static_cast<uint16_t>(header->type);
  if (type == 0 || type > kLastFrameType) return "a frame of an unknown type";
  if ((header->type == FrameType::hello) != (header->group == 0)) return "a frame of an unknown type";
  if (header->payload_bytes != arrival.payload.size()) return "a frame with too few or too many bytes";
  return nullptr;
}

void Wire::take(Arrival& arrival) {
  FrameHeader header;
  const auto found = links_.find(arrival.label);
  Link* link = found == links_.end() ? nullptr : &found->second;
  if (const char* problem = problem_of(arrival, &header)) {
    refuse(problem, arrival, link);
    if (header.magic == kFrameMagic && header.version != kWireVersion) take_other_version(arrival, header, link);
    return;
  }
  if (link == nullptr || !link->open) {
    if (header.type != FrameType::hello) return refuse("a frame that came before a hello", arrival, link);
    return take_hello(arrival, header, link);
  }
  if (link->tags_in) {
    if (!tag_is_right(*link->tags_in, header, arrival)) return ignore("a frame that is not authentic", arrival);
    link->tags_in->advance();
  }
  if (header.group != 0) dispatch(*link, header, std::move(arrival.payload));
}

bool Wire::tag_is_right(const FrameTags& tags, const FrameHeader& header, const Arrival& arrival) const {
  Tag tag;
  std::memcpy(tag.data(), arrival.header_part.data() + sizeof header, tag.size());
  return equal_in_constant_time(tag, tags.next(header, arrival.payload.data(), arrival.payload.size()));
}

void Wire::dispatch(const Link& link, const FrameHeader& header, Payload&& payload) {
  const auto found = handlers_.find(header.group);
  std::shared_ptr<FrameHandler> handler = found == handlers_.end() ? nullptr : found->second.lock();
  if (!handler) {
    ignored_.fetch_add(1, std::memory_order_relaxed);  // of a group that has ended: nothing to say
    return;
  }
  handler->on_frame(link.process, header, std::move(payload));
  if (held_.empty() || held_.back() != handler) held_.push_back(std::move(handler));
}

void Wire::take_hello(Arrival& arrival, const FrameHeader& header, Link* link) {
  Nonce from, to;
  if (arrival.payload.size() != 2 * sizeof(Nonce)) return refuse("a hello that is none", arrival, link);
  std::memcpy(from.data(), arrival.payload.data(), sizeof from);
  std::memcpy(to.data(), arrival.payload.data() + sizeof from, sizeof to);
  if (to != self_)
    return refuse("a hello for another process (one that was here before, or another job's)", arrival, link);
  Link candidate;
  if (link == nullptr) {
    candidate.label = arrival.label;
    candidate.process = from;
    prepare_tags(candidate);
  }
  Link& known = link == nullptr ? candidate : *link;
  if (known.tags_in) {
    if (!tag_is_right(*known.tags_in, header, arrival))
      return refuse("a hello that is not authentic (another secret?)", arrival, link);
    known.tags_in->advance();
  }
  if (from != known.process || (link == nullptr && !(from < self_)))
    return refuse("a hello of another process than expected", arrival, link);
  Process& process = processes_[from];
  if (link != nullptr) {
    link->open = true;
    return;
  }
  if (process.lost || !process.label.empty()) return refuse("a second hello of a process", arrival, link);
  take_events();  // the connection's own have come before its hello
  Descriptor& descriptor = descriptors_[arrival.fd];
  candidate.fd = arrival.fd;
  candidate.open = true;
  if (std::exchange(descriptor.accepted, 0) > 1) candidate.doubtful_until_ns = now_ns() + kDoubtNs;
  process.label = candidate.label;
  process.trouble.clear();
  Link& entered = links_.emplace(candidate.label, std::move(candidate)).first->second;
  if (!descriptor.open) close_link(entered, kClosed);
  send_hello(entered);
}

void Wire::take_other_version(const Arrival& arrival, const FrameHeader& header, Link* link) {
  const std::string versions = "version " + std::to_string(header.version) + " of the wire protocol, this process " +
                               std::to_string(kWireVersion) + ": install the same hxcomm on all hosts";
  if (link != nullptr && !link->open) return close_link(*link, "it speaks " + versions);
  if (link != nullptr || header.type != FrameType::hello) return;
  visitors_trouble_ = "the last to connect to us, from " + whom(arrival.fd) + ", speaks " + versions;
  Link visitor;  // so that it learns the same
  visitor.label = arrival.label;
  if (security_.mode == WireSecurity::Mode::mac) visitor.tags_out.emplace(security_.mac_key, self_, Nonce{});
  send_hello(visitor);
}

// The other end of a descriptor, which may be closed by the time that we hear of it.
std::string Wire::whom(int fd) const {
  const auto found = descriptors_.find(fd);
  const bool known = found != descriptors_.end() && !found->second.address.empty();
  return known ? found->second.address : "an address no longer known";
}

void Wire::ignore(const char* what, const Arrival& arrival) {
  ignored_.fetch_add(1, std::memory_order_relaxed);
  const std::string sender = whom(arrival.fd);
  complaints_.ignored(what, host_of(sender), sender);
}

// As ignore(), of somebody who is not connected: what those who wait for a connection may want to know.
void Wire::refuse(const char* what, const Arrival& arrival, const Link* link) {
  ignore(what, arrival);
  if (link == nullptr) visitors_trouble_ = "the last to connect to us, from " + whom(arrival.fd) + ", sent " + what;
}

// A link whose hello was read after its descriptor had been used again may have ended unseen: libzmq knows.
void Wire::ask_doubtful_links() {
  const int64_t now = now_ns();
  for (auto& [label, link] : links_) {
    if (link.doubtful_until_ns == 0 || link.closed || now < link.ask_ns) continue;
    send_hello(link);
    link.ask_ns = now + kAskNs;
    if (now >= link.doubtful_until_ns) link.doubtful_until_ns = 0;
  }
}

void Wire::bury_closed_links() {
  any_closed_ = false;
  for (auto each = links_.begin(); each != links_.end();) {
    if (!each->second.closed) {
      ++each;
      continue;
    }
    const Link link = std::move(each->second);
    each = links_.erase(each);
    if (link.ours) zmq_.disconnect(socket_, link.address.c_str());  // and what it still owed is given back
    Process& process = processes_[link.process];
    process.label.clear();
    process.trouble = link.why_closed;
    if (!link.open) continue;  // never was connected: connect() may try again
    process.lost = true;
    for (const auto& [group, handler] : handlers_)
      if (std::shared_ptr<FrameHandler> alive = handler.lock()) {
        alive->on_lost(link.process, link.why_closed);
        held_.push_back(std::move(alive));
      }
  }
}

}  // namespace hxcomm
