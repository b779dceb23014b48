#include "transport/endpoint.h"

#include <malloc.h>
#include <poll.h>
#include <pthread.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/random.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <csignal>
#include <cstring>

#include "core/errors.h"
#include "core/futex.h"
#include "transport/death.h"

namespace hxcomm {
namespace {

// What an epoll event is about: the descriptor, and above it which kind.
enum class Watched : uint64_t { stop = 0, listener = 1, visitor = 2, peer = 3 };
constexpr uint64_t tag(Watched kind, int fd) { return (static_cast<uint64_t>(kind) << 32) | static_cast<uint32_t>(fd); }

Nonce random_nonce() {
  Nonce nonce;
  if (getrandom(nonce.data(), nonce.size(), 0) != static_cast<ssize_t>(nonce.size()))
    throw Error(ErrorKind::init, std::string("getrandom: ") + std::strerror(errno));
  return nonce;
}

// The socket's name must not be the nonce: names are listed in /proc/net/unix, the nonce is what a visitor proves.
std::string random_address() {
  static constexpr char kHex[] = "0123456789abcdef";
  std::string name = "hxcomm-";
  for (const uint8_t byte : random_nonce()) {
    name += kHex[byte >> 4];
    name += kHex[byte & 15];
  }
  return name;
}

const uint8_t (&raw(const Nonce& nonce))[16] { return *reinterpret_cast<const uint8_t (*)[16]>(nonce.data()); }

void ring_bell(int bell) {
  const uint64_t one = 1;
  [[maybe_unused]] const ssize_t written = write(bell, &one, sizeof(one));  // full: it rings already
}

// libzmq allocates every message that it receives with malloc, which by default maps each large one anew and gives its
// pages back at once: a 16 MiB all_reduce of two ranks took 20 ms of page faults and 7.4 ms with this. At most 64 MiB
// that were in use stay with an arena of malloc.
void keep_large_blocks() {
#ifdef __GLIBC__
  mallopt(M_MMAP_THRESHOLD, 8 << 20);
  mallopt(M_TRIM_THRESHOLD, 64 << 20);
#endif
}

int make_bell() {
  const int bell = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
  if (bell < 0) throw Error(ErrorKind::init, std::string("eventfd: ") + std::strerror(errno));
  return bell;
}

}  // namespace

Peer::~Peer() {
  if (pidfd >= 0) close(pidfd);
  if (bell >= 0) close(bell);
}

void Peer::ring_if_asleep() const {
  SegmentHeader& header = mapping->header();
  if (!header.doorbell.has_sleepers()) return;
  header.doorbell.ring();
  if (header.sleeps_on_descriptors.load(std::memory_order_relaxed) != 0) ring_bell(bell);
}

void Peer::kill() const { syscall(SYS_pidfd_send_signal, pidfd, SIGKILL, nullptr, 0); }

Endpoint::Endpoint(size_t segment_bytes, int chips, size_t bytes_per_chip)
    : nonce_(random_nonce()),
      address_(random_address()),
      segment_(segment_bytes, raw(nonce_), static_cast<size_t>(chips) * bytes_per_chip),
      arenas_(segment_.fd(), segment_.control_bytes(), segment_.base() + segment_.control_bytes(), chips,
              bytes_per_chip),
      bell_(make_bell()),
      doorman_(address_, nonce_, segment_, bell_) {
  arenas_.on_shortage([this] { dig(); });
  epoll_ = epoll_create1(EPOLL_CLOEXEC);
  stop_event_ = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
  if (epoll_ < 0 || stop_event_ < 0)
    throw Error(ErrorKind::init, std::string("epoll/eventfd: ") + std::strerror(errno));
  epoll_event event{EPOLLIN, {.u64 = tag(Watched::stop, stop_event_)}};
  epoll_ctl(epoll_, EPOLL_CTL_ADD, stop_event_, &event);
  event.data.u64 = tag(Watched::listener, doorman_.listener());
  epoll_ctl(epoll_, EPOLL_CTL_ADD, doorman_.listener(), &event);

  // Signals are the program's: the watcher must not be the thread that a SIGINT or SIGTERM lands on.
  sigset_t all, before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  watcher_ = std::thread([this] { watch(); });
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
  pthread_setname_np(watcher_.native_handle(), "hxcomm-watch");
}

Endpoint::~Endpoint() {
  const uint64_t one = 1;
  [[maybe_unused]] const ssize_t written = write(stop_event_, &one, sizeof(one));
  watcher_.join();
  close(epoll_);
  close(stop_event_);
  close(bell_);
}

std::shared_ptr<Peer> Endpoint::connect(const std::string& address, const Nonce& nonce, int timeout_ms) {
  {
    std::lock_guard lock(peers_mutex_);
    for (const auto& peer : peers_)
      if (peer->nonce == nonce && !peer->dead.load()) return peer;
  }
  Introduction introduction = introduce(address, nonce, timeout_ms);
  auto peer = std::make_shared<Peer>();
  peer->nonce = nonce;
  peer->address = address;
  peer->mapping = std::move(introduction.mapping);
  peer->pid = introduction.pid;
  peer->pidfd = introduction.pidfd;
  peer->bell = introduction.bell;
  std::lock_guard lock(peers_mutex_);
  // Processes that are gone and that no group refers to any more.
  std::erase_if(peers_, [](const auto& p) { return p->dead.load() && p.use_count() == 1; });
  for (const auto& other : peers_)
    if (other->nonce == nonce) return other;  // two threads made two groups at once
  peers_.push_back(peer);
  epoll_event event{EPOLLIN, {.u64 = tag(Watched::peer, peer->pidfd)}};
  if (epoll_ctl(epoll_, EPOLL_CTL_ADD, peer->pidfd, &event) != 0)
    throw Error(ErrorKind::init, "cannot watch process " + std::to_string(peer->pid) + ": " + std::strerror(errno));
  return peer;
}

uint64_t Endpoint::subscribe(Listener listener) {
  std::lock_guard lock(listeners_mutex_);
  listeners_.emplace_back(next_token_, std::move(listener));
  return next_token_++;
}

void Endpoint::unsubscribe(uint64_t token) {
  std::lock_guard lock(listeners_mutex_);
  std::erase_if(listeners_, [&](const auto& entry) { return entry.first == token; });
}

void Endpoint::on_death(Peer& peer) {
  peer.death = describe_death(peer.pidfd, peer.pid);
  peer.dead.store(true, std::memory_order_release);
  tell(&peer);
}

void Endpoint::tell(const Peer* peer) {
  std::vector<std::pair<uint64_t, Listener>> listeners;
  {
    std::lock_guard lock(listeners_mutex_);
    listeners = listeners_;
  }
  // Without the lock: a listener may drop the last reference to a group, whose end unsubscribes.
  for (const auto& [token, listener] : listeners) listener(peer);
}

void Endpoint::watch() {
  epoll_event events[32];
  for (;;) {
    const int n = epoll_wait(epoll_, events, 32, 1000);
    for (int i = 0; i < n; ++i) {
      const int fd = static_cast<int>(static_cast<uint32_t>(events[i].data.u64));
      switch (static_cast<Watched>(events[i].data.u64 >> 32)) {
        case Watched::stop:
          return;
        case Watched::listener:
          if (const int visitor = doorman_.accept_visitor(); visitor >= 0) {
            epoll_event event{EPOLLIN, {.u64 = tag(Watched::visitor, visitor)}};
            epoll_ctl(epoll_, EPOLL_CTL_ADD, visitor, &event);
          }
          break;
        case Watched::visitor:
          // Closing it takes it out of the epoll set. Who hangs up without a word has knocked.
          if (!doorman_.answer(fd)) tell(nullptr);
          break;
        case Watched::peer: {
          std::shared_ptr<Peer> dead;
          {
            std::lock_guard lock(peers_mutex_);
            for (const auto& peer : peers_)
              if (peer->pidfd == fd) dead = peer;
          }
          epoll_ctl(epoll_, EPOLL_CTL_DEL, fd, nullptr);
          if (dead) on_death(*dead);
          break;
        }
      }
    }
    doorman_.dismiss_silent();
  }
}

void Endpoint::bury(std::vector<Range> ranges, std::function<bool()> unused, std::function<void()> released) {
  {
    std::lock_guard lock(graves_mutex_);
    graves_.push_back({std::move(ranges), std::move(unused), std::move(released)});
  }
  dig();
}

void Endpoint::dig() {
  std::vector<std::function<void()>> released;
  {
    std::lock_guard lock(graves_mutex_);
    std::erase_if(graves_, [&](Grave& grave) {
      if (!grave.unused()) return false;
      for (const Range& range : grave.ranges) segment_.release(range.offset, range.nbytes);
      if (grave.released) released.push_back(std::move(grave.released));
      return true;
    });
  }
  for (const auto& each : released) each();
}

uint32_t Endpoint::announce_sleep() { return segment_.header().doorbell.announce_sleep(); }

bool Endpoint::sleep(uint32_t doorbell, int64_t timeout_ns) {
  const Wire* wire = this->wire();
  if (wire == nullptr) return futex_wait(segment_.header().doorbell.rings, doorbell, timeout_ns);
  if (pump_wire()) return true;  // its descriptors say nothing of what is there already
  // Who rings after this look writes to the bell, too.
  if (segment_.header().doorbell.rings.load(std::memory_order_acquire) != doorbell) return true;
  std::vector<pollfd> descriptors{{bell_, POLLIN, 0}};
  wire->append_pollfds(&descriptors);
  const timespec timeout{timeout_ns / 1'000'000'000, timeout_ns % 1'000'000'000};
  return ppoll(descriptors.data(), descriptors.size(), &timeout, nullptr) >= 0 || errno != EINTR;
}

void Endpoint::withdraw_sleep() {
  Doorbell& doorbell = segment_.header().doorbell;
  doorbell.withdraw_sleep();
  // Silenced by the last who slept: another one may not have heard it yet. A ring that is lost to a thread that goes to
  // sleep in between costs it the time until it looks up again, 100 ms.
  uint64_t rings;
  if (wire() != nullptr && !doorbell.has_sleepers()) [[maybe_unused]]
    const ssize_t got = read(bell_, &rings, sizeof(rings));
}

void Endpoint::ring_own_doorbell() {
  segment_.header().doorbell.ring();
  if (wire() != nullptr) ring_bell(bell_);
}

Wire& Endpoint::open_wire(const std::string& bind_address, const WireSecurity& security) {
  const std::lock_guard lock(wire_mutex_);
  if (!wire_) {
    keep_large_blocks();
    wire_ = std::make_unique<Wire>(nonce_, bind_address, security);
    segment_.header().sleeps_on_descriptors.store(1, std::memory_order_relaxed);
    has_wire_.store(true, std::memory_order_release);
  }
  return *wire_;
}

void Endpoint::close_wire() {
  if (Wire* wire = this->wire()) wire->close();
}

bool Endpoint::pump_wire() {
  Wire* wire = this->wire();
  if (wire == nullptr || !wire->pump()) return false;
  // It may be for another thread, which sleeps and whose descriptors say nothing any more.
  if (segment_.header().doorbell.has_sleepers()) ring_own_doorbell();
  return true;
}

}  // namespace hxcomm
