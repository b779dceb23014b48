#include "transport/wire.h"

#include <pthread.h>
#include <sys/eventfd.h>
#include <sys/random.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <csignal>
#include <cstring>

#include "core/clock.h"
#include "core/errors.h"

namespace hxcomm {
namespace {

constexpr int kNeverMs = 86'400'000;
constexpr int kConnectMs = 10'000;
constexpr int kHandshakeMs = 10'000;
constexpr int kHeartbeatMs = 500;  // something to acknowledge for the watch's two seconds of silence
constexpr int kLingerMs = 1000;
constexpr int kFramesInQueue = 1024;  // a connection's frames that we have not taken; TCP holds back the rest
constexpr int64_t kSlack = 4096;      // of a part's size: headers, CURVE's envelope

Nonce random_bytes() {
  Nonce bytes;
  if (getrandom(bytes.data(), bytes.size(), 0) != static_cast<ssize_t>(bytes.size()))
    throw Error(ErrorKind::init, std::string("getrandom: ") + std::strerror(errno));
  return bytes;
}

// What came from the Store is a hint of somebody: a number and a port, nothing that is resolved or opened.
bool is_numeric_tcp(const std::string& address) {
  return address.starts_with("tcp://") && address.size() < 80 &&
         address.find_first_not_of("0123456789abcdefABCDEF.:[]", 6) == std::string::npos;
}

struct Loan {
  std::shared_ptr<std::atomic<int>> lent;
  // libzmq's queue orders all before against give_back(); said here, because no race detector looks into libzmq.
  std::atomic<bool> made{false};
};

void give_back(void*, void* hint) {
  const std::unique_ptr<Loan> loan(static_cast<Loan*>(hint));
  loan->made.load(std::memory_order_acquire);
  loan->lent->fetch_sub(1, std::memory_order_release);
}

}  // namespace

Wire::Wire(const Nonce& self, const std::string& bind_address, const WireSecurity& security)
    : zmq_(ZmqLibrary::load()), self_(self), security_(security) {
  if (security.mode == WireSecurity::Mode::mac) SodiumLibrary::load();
  sigset_t all, before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);  // libzmq makes its threads at the first socket
  try {
    open_socket(bind_address);
  } catch (...) {
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    close_all();
    throw;
  }
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
}

Wire::~Wire() { close_all(); }

void Wire::set(int option, const void* value, size_t nbytes) const {
  if (zmq_.setsockopt(socket_, option, value, nbytes) != 0)
    throw Error(
        ErrorKind::init,
        "libzmq refuses option " + std::to_string(option) + ": " + zmq_.strerror(errno) +
            (option >= zmq::kCurveServer && option <= zmq::kCurveServerKey ? " (is it built with CURVE?)" : ""));
}

void Wire::set(int option, int value) const { set(option, &value, sizeof value); }

void Wire::open_socket(const std::string& bind_address) {
  const auto check = [&](bool good, const char* what) {
    if (!good)
      throw Error(ErrorKind::init, std::string(what) + " for connections to other hosts: " + zmq_.strerror(errno));
  };
  wakeup_ = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
  check(wakeup_ >= 0, "no eventfd");
  check((context_ = zmq_.ctx_new()) != nullptr, "no ZeroMQ context");
  watch_ = std::make_unique<WireWatch>(context_, security_);
  check((socket_ = zmq_.socket(context_, zmq::kRouter)) != nullptr, "no ZeroMQ socket");
  set(zmq::kRouterMandatory, 1);  // an unknown label is an error, not a frame lost
  // Never made again. With -1, libzmq throws away what has arrived and was not read when a connection ends; a time that
  // never comes keeps it, and bury_closed_links() ends the attempt.
  set(zmq::kReconnectIvl, kNeverMs);
  set(zmq::kConnectTimeout, kConnectMs);
  set(zmq::kHandshakeIvl, kHandshakeMs);
  set(zmq::kBacklog, 1024);
  set(zmq::kLinger, 0);   // a connection that ends gives back at once what it still owed; close_all() gives it time
  set(zmq::kSendHwm, 0);  // never blocks: credits bound what is sent
  set(zmq::kReceiveHwm, kFramesInQueue);
  const int64_t most = static_cast<int64_t>(kMaxPayloadBytes) + kSlack;
  set(zmq::kMaxMsgSize, &most, sizeof most);
  set(zmq::kHeartbeatIvl, kHeartbeatMs);
  set(zmq::kHeartbeatTimeout, kNeverMs);  // a stopped process is slow, not dead
  const bool v6 = bind_address.find(':') != std::string::npos;
  set(zmq::kIpv6, v6);
  const bool curve = security_.mode == WireSecurity::Mode::curve;
  if (curve) {
    set(zmq::kCurveServer, 1);
    set(zmq::kCurveSecretKey, security_.server_secret.data(), security_.server_secret.size());
  }
  // Before the first connection: every one's end is to be seen.
  check(zmq_.socket_monitor(socket_, "inproc://hxcomm-wire-events",
                            zmq::kConnected | zmq::kAccepted | zmq::kClosed | zmq::kDisconnected |
                                zmq::kHandshakeFailedNoDetail | zmq::kHandshakeFailedProtocol |
                                zmq::kHandshakeFailedAuth) == 0 &&
            (monitor_ = zmq_.socket(context_, zmq::kPair)) != nullptr,
        "no ZeroMQ monitor");
  const int unbounded = 0;  // or libzmq's thread would stand still once nobody pumps
  check(zmq_.setsockopt(monitor_, zmq::kReceiveHwm, &unbounded, sizeof unbounded) == 0 &&
            zmq_.connect(monitor_, "inproc://hxcomm-wire-events") == 0,
        "no ZeroMQ monitor");
  const std::string endpoint = "tcp://" + (v6 ? "[" + bind_address + "]" : bind_address) + ":*";
  if (zmq_.bind(socket_, endpoint.c_str()) != 0)
    throw Error(ErrorKind::init, "cannot listen at " + endpoint + ": " + zmq_.strerror(errno));
  char bound[256];
  size_t nbytes = sizeof bound;
  check(zmq_.getsockopt(socket_, zmq::kLastEndpoint, bound, &nbytes) == 0, "no address");
  address_ = bound;
  nbytes = sizeof fd_;
  check(zmq_.getsockopt(socket_, zmq::kFd, &fd_, &nbytes) == 0 &&
            zmq_.getsockopt(monitor_, zmq::kFd, &monitor_fd_, &nbytes) == 0,
        "no descriptor");
  if (curve) {  // options are copied by bind and connect: what listens is a server, what connects is a client
    set(zmq::kCurveServer, 0);
    set(zmq::kCurveServerKey, security_.server_public.data(), security_.server_public.size());
    set(zmq::kCurvePublicKey, security_.client_public.data(), security_.client_public.size());
    set(zmq::kCurveSecretKey, security_.client_secret.data(), security_.client_secret.size());
  }
}

void Wire::close() {
  const std::lock_guard lock(mutex_);
  for (auto& [label, link] : links_) link.closed = true;
  close_all();
}

void Wire::close_all() {
  if (socket_ != nullptr) {
    for (const auto& [label, link] : links_)  // nobody waits for what these have to say
      if (link.ours && (!link.open || link.closed)) zmq_.disconnect(socket_, link.address.c_str());
    zmq_.setsockopt(socket_, zmq::kLinger, &kLingerMs, sizeof kLingerMs);
    // The writing end first: libzmq's thread blocks for ever where it writes an event that nobody will read.
    zmq_.socket_monitor(socket_, nullptr, 0);
    if (monitor_ != nullptr) zmq_.close(monitor_);
    zmq_.close(socket_);
  }
  watch_.reset();
  if (context_ != nullptr)
    while (zmq_.ctx_term(context_) != 0 && errno == EINTR) {
    }
  socket_ = monitor_ = context_ = nullptr;
  if (wakeup_ >= 0) ::close(wakeup_);
  wakeup_ = fd_ = monitor_fd_ = -1;
}

void Wire::ring() {
  must_look_.store(true, std::memory_order_release);
  const uint64_t one = 1;
  [[maybe_unused]] const ssize_t written = write(wakeup_, &one, sizeof one);
}

Wire::Link* Wire::link_to(const Nonce& process) const {
  const auto found = processes_.find(process);
  if (found == processes_.end() || found->second.label.empty()) return nullptr;
  const auto link = links_.find(found->second.label);
  return link == links_.end() ? nullptr : const_cast<Link*>(&link->second);
}

void Wire::connect(const Nonce& peer, const std::string& address) {
  std::lock_guard lock(mutex_);
  Process& process = processes_[peer];
  if (process.lost || !process.label.empty() || !(self_ < peer)) return;
  if (!is_numeric_tcp(address)) {
    process.trouble = "'" + address.substr(0, 80) + "' is not the numeric address of a TCP port";
    return;
  }
  for (auto& [label, other] : links_)
    if (other.ours && other.address == address) {
      // One process listens at an address: the one before it is gone. Both links would end with
      // zmq_disconnect(address).
      close_link(other, "is gone: another process listens at " + address);
      zmq_.disconnect(socket_, address.c_str());
      other.ours = false;
    }
  const Nonce random = random_bytes();
  Link link;
  // No routing id that the peer chooses: libzmq aborts where two connections have the same.
  link.label = "\x02" + std::string(reinterpret_cast<const char*>(random.data()), random.size());
  link.address = address;
  link.ours = true;
  link.process = peer;
  set(zmq::kConnectRoutingId, link.label.data(), link.label.size());
  set(zmq::kIpv6, address.find('[') != std::string::npos);
  if (zmq_.connect(socket_, address.c_str()) != 0) {
    process.trouble = "cannot connect to " + address + ": " + zmq_.strerror(errno);
    return;
  }
  char written[256];  // as libzmq writes it, in its events, too
  size_t nbytes = sizeof written;
  if (zmq_.getsockopt(socket_, zmq::kLastEndpoint, written, &nbytes) == 0) link.address = written;
  process.trouble.clear();
  process.label = link.label;
  prepare_tags(link);
  send_hello(links_.emplace(link.label, std::move(link)).first->second);
}

void Wire::prepare_tags(Link& link) const {
  if (security_.mode != WireSecurity::Mode::mac) return;
  link.tags_out.emplace(security_.mac_key, self_, link.process);
  link.tags_in.emplace(security_.mac_key, link.process, self_);
}

bool Wire::send_hello(Link& link) {
  Payload payload(2 * sizeof(Nonce));
  std::memcpy(payload.data(), self_.data(), sizeof(Nonce));
  std::memcpy(payload.data() + sizeof(Nonce), link.process.data(), sizeof(Nonce));
  FrameHeader header;
  header.type = FrameType::hello;
  return transmit(link, header, payload);
}

bool Wire::is_connected(const Nonce& peer) const {
  std::lock_guard lock(mutex_);
  const Link* link = link_to(peer);
  return link != nullptr && link->open && !link->closed;
}

std::string Wire::trouble_of(const Nonce& peer) const {
  std::lock_guard lock(mutex_);
  const auto found = processes_.find(peer);
  if (found != processes_.end() && !found->second.trouble.empty()) return found->second.trouble;
  const Link* link = link_to(peer);
  if (link == nullptr) return self_ < peer ? "" : visitors_trouble_;
  if (link->open) return "";
  return link->fd < 0 ? "nothing has answered at " + link->address + " yet"
                      : "no hello has come back from " + link->address + ": has it another secret, or is it stopped?";
}

void Wire::subscribe(uint64_t group, std::weak_ptr<FrameHandler> handler) {
  std::lock_guard lock(mutex_);
  handlers_[group] = std::move(handler);
}

void Wire::unsubscribe(uint64_t group) {
  std::lock_guard lock(mutex_);
  handlers_.erase(group);
}

bool Wire::transmit(Link& link, FrameHeader header, Payload& payload) {
  if (payload.size() > kMaxPayloadBytes) throw Error(ErrorKind::usage, "a frame's payload is at most 4 MiB");
  struct Framed {
    FrameHeader header;
    Tag tag;
  } framed{header, {}};
  framed.header.magic = kFrameMagic;
  framed.header.version = kWireVersion;
  framed.header.payload_bytes = static_cast<uint32_t>(payload.size());
  framed.header.crc = crc_of(framed.header);
  if (link.tags_out) framed.tag = link.tags_out->next(framed.header, payload.data(), payload.size());
  const size_t nbytes = link.tags_out ? sizeof framed : sizeof header;
  const bool sent = zmq_.send(socket_, link.label.data(), link.label.size(), zmq::kDontWait | zmq::kSendMore) >= 0 &&
                    zmq_.send(socket_, &framed, nbytes, zmq::kDontWait | zmq::kSendMore) >= 0 &&
                    zmq_.msg_send(payload.message(), socket_, zmq::kDontWait) >= 0;
  if (sent && link.tags_out) link.tags_out->advance();
  if (!sent) close_link(link, "closed its connection (process or host died, cause unknown)");
  // Sending may have taken note of arrivals, and then libzmq's descriptor says nothing of them.
  int events = 0;
  size_t events_bytes = sizeof events;
  if (!must_look_.load(std::memory_order_relaxed) &&
      zmq_.getsockopt(socket_, zmq::kEvents, &events, &events_bytes) == 0 && (events & zmq::kPollIn) != 0)
    ring();
  return sent;
}

bool Wire::send(const Nonce& to, const FrameHeader& header, const void* payload, size_t nbytes) {
  Payload copy(nbytes);
  if (nbytes > 0) std::memcpy(copy.data(), payload, nbytes);
  std::lock_guard lock(mutex_);
  Link* link = link_to(to);
  return link != nullptr && link->open && !link->closed && transmit(*link, header, copy);
}

bool Wire::send(const Nonce& to, const FrameHeader& header, const Payload& payload) {
  Payload shared = payload.share();
  std::lock_guard lock(mutex_);
  Link* link = link_to(to);
  return link != nullptr && link->open && !link->closed && transmit(*link, header, shared);
}

bool Wire::send_lent(const Nonce& to, const FrameHeader& header, const void* data, size_t nbytes,
                     std::shared_ptr<std::atomic<int>> lent) {
  Payload borrowed;
  lent->fetch_add(1, std::memory_order_relaxed);
  auto* loan = new Loan{std::move(lent)};
  loan->made.store(true, std::memory_order_release);
  if (zmq_.msg_init_data(borrowed.message(), const_cast<void*>(data), nbytes, give_back, loan) != 0) {
    give_back(nullptr, loan);
    throw Error(ErrorKind::init, "no memory for a frame");
  }
  std::lock_guard lock(mutex_);
  Link* link = link_to(to);
  return link != nullptr && link->open && !link->closed && transmit(*link, header, borrowed);
}

void Wire::close_link(Link& link, const std::string& why) {
  if (link.closed) return;
  link.closed = true;
  link.why_closed = why;
  any_closed_ = true;
  ring();
}

void Wire::append_pollfds(std::vector<pollfd>* fds) const {
  for (const int fd : {fd_, monitor_fd_, wakeup_}) fds->push_back({fd, POLLIN, 0});
}

}  // namespace hxcomm
