#include "transport/wire_watch.h"

#include <arpa/inet.h>
#include <fcntl.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <pthread.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <csignal>
#include <cstring>

#include "core/clock.h"
#include "core/errors.h"

namespace hxcomm {
namespace {

constexpr int kLookMs = 250;
constexpr int64_t kSilenceNs = 2'000'000'000;
constexpr int64_t kStarvedNs = 1'000'000'000;  // looks further apart than this prove nothing: we were stopped ourselves

bool ends_of(int fd, sockaddr_storage* own, sockaddr_storage* other) {
  std::memset(own, 0, sizeof *own);
  std::memset(other, 0, sizeof *other);
  socklen_t own_bytes = sizeof *own, other_bytes = sizeof *other;
  return getsockname(fd, reinterpret_cast<sockaddr*>(own), &own_bytes) == 0 &&
         getpeername(fd, reinterpret_cast<sockaddr*>(other), &other_bytes) == 0;
}

// The watches of the process, for its forked children: they inherit the connections (not libzmq's threads), and with
// one still open in a DataLoader's worker, no peer would notice the death of the process.
std::mutex watches_mutex;
std::vector<WireWatch*> watches;

}  // namespace

struct WireWatch::Fork {
  static void before() {
    watches_mutex.lock();
    for (WireWatch* watch : watches) watch->mutex_.lock();
  }
  static void in_parent() {
    for (WireWatch* watch : watches) watch->mutex_.unlock();
    watches_mutex.unlock();
  }
  static void in_child() {
    for (WireWatch* watch : watches)
      for (const Connection& connection : watch->connections_)
        if (is_still(connection, connection.fd)) close(connection.fd);
    in_parent();
  }
  static inline const int registered = pthread_atfork(before, in_parent, in_child);
};

std::string remote_address(int fd) {
  sockaddr_storage own, other;
  if (!ends_of(fd, &own, &other)) return "";
  char text[INET6_ADDRSTRLEN] = "";
  if (other.ss_family == AF_INET) {
    const auto& v4 = reinterpret_cast<const sockaddr_in&>(other);
    inet_ntop(AF_INET, &v4.sin_addr, text, sizeof text);
    return std::string(text) + ":" + std::to_string(ntohs(v4.sin_port));
  }
  if (other.ss_family != AF_INET6) return "";
  const auto& v6 = reinterpret_cast<const sockaddr_in6&>(other);
  inet_ntop(AF_INET6, &v6.sin6_addr, text, sizeof text);
  return "[" + std::string(text) + "]:" + std::to_string(ntohs(v6.sin6_port));
}

WireWatch::WireWatch(void* context, const WireSecurity& security)
    : zmq_(ZmqLibrary::load()), allowed_(security.client_public) {
  stop_event_ = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
  if (stop_event_ < 0) throw Error(ErrorKind::init, std::string("eventfd: ") + std::strerror(errno));
  if (security.mode == WireSecurity::Mode::curve) {
    zap_ = zmq_.socket(context, zmq::kRep);
    size_t nbytes = sizeof zap_fd_;
    if (zap_ == nullptr || zmq_.bind(zap_, "inproc://zeromq.zap.01") != 0 ||
        zmq_.getsockopt(zap_, zmq::kFd, &zap_fd_, &nbytes) != 0) {
      const std::string why = zmq_.strerror(errno);
      if (zap_ != nullptr) zmq_.close(zap_);
      close(stop_event_);
      throw Error(ErrorKind::init, "cannot decide who may connect (ZAP): " + why);
    }
  }
  {
    std::lock_guard lock(watches_mutex);
    watches.push_back(this);
  }
  sigset_t all, before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);  // signals are the program's
  thread_ = std::thread([this] { run(); });
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
  pthread_setname_np(thread_.native_handle(), "hxcomm-wire");
}

WireWatch::~WireWatch() {
  const uint64_t one = 1;
  [[maybe_unused]] const ssize_t written = write(stop_event_, &one, sizeof one);
  thread_.join();
  {
    std::lock_guard lock(watches_mutex);
    std::erase(watches, this);
  }
  if (zap_ != nullptr) {
    const int linger = 0;
    zmq_.setsockopt(zap_, zmq::kLinger, &linger, sizeof linger);
    zmq_.close(zap_);
  }
  close(stop_event_);
}

void WireWatch::run() {
  pollfd waiting[2] = {{stop_event_, POLLIN, 0}, {zap_fd_, POLLIN, 0}};
  int64_t next_look = now_ns();
  for (;;) {
    if (zap_ != nullptr) answer_zap();
    poll(waiting, zap_ != nullptr ? 2 : 1, kLookMs);
    if (waiting[0].revents != 0) return;
    if (now_ns() < next_look) continue;
    look_at_all();
    next_look = now_ns() + kLookMs * 1'000'000;
  }
}

// All requests that are there (RFC 27): version, request, domain, address, routing id, mechanism, key.
void WireWatch::answer_zap() {
  for (;;) {
    std::vector<std::string> parts;
    bool more = true;
    while (more) {
      Payload part;
      if (zmq_.msg_recv(part.message(), zap_, zmq::kDontWait) < 0) return;
      parts.emplace_back(reinterpret_cast<const char*>(part.data()), part.size());
      more = zmq_.msg_more(part.message()) != 0;
    }
    const bool known = parts.size() == 7 && parts[5] == "CURVE" && parts[6].size() == allowed_.size() &&
                       std::memcmp(parts[6].data(), allowed_.data(), allowed_.size()) == 0;
    parts.resize(std::max<size_t>(parts.size(), 2));
    const std::string reply[] = {"1.0", parts[1], known ? "200" : "400", known ? "OK" : "not of this job", "", ""};
    for (const std::string& word : reply)
      zmq_.send(zap_, word.data(), word.size(), zmq::kDontWait | (&word == std::end(reply) - 1 ? 0 : zmq::kSendMore));
  }
}

void WireWatch::add(int fd) {
  Connection connection;
  connection.fd = fd;
  if (!ends_of(fd, &connection.own, &connection.other)) return;  // closed again already
  std::lock_guard lock(mutex_);
  std::erase_if(connections_, [&](const Connection& other) { return other.fd == fd; });
  connections_.push_back(connection);
}

bool WireWatch::remove(int fd) {
  std::lock_guard lock(mutex_);
  bool silent = false;
  std::erase_if(connections_, [&](const Connection& connection) {
    if (connection.fd != fd) return false;
    silent = connection.silent;
    return true;
  });
  return silent;
}

void WireWatch::look_at_all() {
  std::lock_guard lock(mutex_);
  const int64_t now = now_ns();
  for (Connection& connection : connections_)
    if (!connection.silent) look(connection, now);
}

// The descriptor is libzmq's, which may have closed it, and then it may be something else.
bool WireWatch::is_still(const Connection& connection, int fd) {
  sockaddr_storage own, other;
  return ends_of(fd, &own, &other) && std::memcmp(&own, &connection.own, sizeof own) == 0 &&
         std::memcmp(&other, &connection.other, sizeof other) == 0;
}

void WireWatch::look(Connection& connection, int64_t now) {
  // A duplicate stays what it is whatever libzmq does meanwhile; closed at once, or the other side would miss the end.
  const int fd = fcntl(connection.fd, F_DUPFD_CLOEXEC, 0);
  if (fd < 0) return;
  tcp_info info{};
  socklen_t nbytes = sizeof info;
  if (is_still(connection, fd) && getsockopt(fd, IPPROTO_TCP, TCP_INFO, &info, &nbytes) == 0) {
    const int64_t since_look_ns = now - connection.looked_ns;
    const bool waits = info.tcpi_unacked > 0 || info.tcpi_probes > 0;
    const bool answered = int64_t{info.tcpi_last_ack_recv} * 1'000'000 <= since_look_ns;
    if (!waits || answered || since_look_ns > kStarvedNs) connection.silent_since_ns = now;
    connection.looked_ns = now;
    if (now - connection.silent_since_ns >= kSilenceNs) {
      connection.silent = true;
      shutdown(fd, SHUT_RDWR);  // libzmq sees the end of the stream, and tells it as it tells every other end
    }
  }
  close(fd);
}

}  // namespace hxcomm
