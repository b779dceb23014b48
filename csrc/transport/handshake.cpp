#include "transport/handshake.h"

#include <fcntl.h>
#include <poll.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstddef>
#include <cstring>
#include <utility>

#include "core/clock.h"
#include "core/errors.h"

#ifndef SO_PEERPIDFD
#define SO_PEERPIDFD 77  // Linux 6.5
#endif

namespace hxcomm {
namespace {

constexpr uint64_t kMagic = 0x31454D4F434C4548ull;  // "HELCOME1"
constexpr size_t kMaxVisitors = 256;
constexpr int64_t kVisitorPatienceNs = 2'000'000'000;

struct Request {
  uint64_t magic;
  uint32_t version;
  uint32_t reserved;
  uint8_t nonce[16];
};

struct Reply {
  uint64_t magic;
  uint32_t version;
  int32_t status;  // 0: the segment follows; 1: wrong nonce; 2: wrong version
  uint64_t segment_bytes;
};

class Descriptor {
 public:
  explicit Descriptor(int fd) : fd_(fd) {}
  ~Descriptor() {
    if (fd_ >= 0) close(fd_);
  }
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(const Descriptor&) = delete;
  int get() const { return fd_; }
  int release() { return std::exchange(fd_, -1); }

 private:
  int fd_;
};

socklen_t abstract_address(const std::string& name, sockaddr_un* address) {
  *address = {};
  address->sun_family = AF_UNIX;
  if (name.empty() || name.size() > sizeof(address->sun_path) - 1)
    throw Error(ErrorKind::init, "the socket name '" + name + "' is empty or longer than the kernel allows");
  std::memcpy(address->sun_path + 1, name.data(), name.size());  // a leading NUL makes it abstract
  return static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + 1 + name.size());
}

// What a process hands over: its segment, and the bell that wakes it.
constexpr size_t kHandedOver = 2;
using Descriptors = std::array<int, kHandedOver>;

void send_reply(int fd, const Reply& reply, const Descriptors* handed_over) {
  iovec iov{const_cast<Reply*>(&reply), sizeof(reply)};
  alignas(cmsghdr) char control[CMSG_SPACE(sizeof(Descriptors))] = {};
  msghdr message{};
  message.msg_iov = &iov;
  message.msg_iovlen = 1;
  if (handed_over != nullptr) {
    message.msg_control = control;
    message.msg_controllen = sizeof(control);
    cmsghdr* header = CMSG_FIRSTHDR(&message);
    header->cmsg_level = SOL_SOCKET;
    header->cmsg_type = SCM_RIGHTS;
    header->cmsg_len = CMSG_LEN(sizeof(Descriptors));
    std::memcpy(CMSG_DATA(header), handed_over->data(), sizeof(Descriptors));
  }
  sendmsg(fd, &message, MSG_NOSIGNAL | MSG_DONTWAIT);  // a visitor that hung up is its own problem
}

ssize_t receive_reply(int fd, Reply* reply, Descriptors* handed_over) {
  iovec iov{reply, sizeof(*reply)};
  alignas(cmsghdr) char control[CMSG_SPACE(sizeof(Descriptors))];
  msghdr message{};
  message.msg_iov = &iov;
  message.msg_iovlen = 1;
  message.msg_control = control;
  message.msg_controllen = sizeof(control);
  const ssize_t got = recvmsg(fd, &message, MSG_CMSG_CLOEXEC);
  if (got >= 0)
    for (cmsghdr* h = CMSG_FIRSTHDR(&message); h != nullptr; h = CMSG_NXTHDR(&message, h))
      if (h->cmsg_level == SOL_SOCKET && h->cmsg_type == SCM_RIGHTS && h->cmsg_len == CMSG_LEN(sizeof(Descriptors)))
        std::memcpy(handed_over->data(), CMSG_DATA(h), sizeof(Descriptors));
  return got;
}

ucred credentials(int fd) {
  ucred who{};
  socklen_t length = sizeof(who);
  if (getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &who, &length) != 0) who.uid = static_cast<uid_t>(-1);
  return who;
}

int open_pidfd(int socket, pid_t pid) {
  int pidfd = -1;
  socklen_t length = sizeof(pidfd);
  if (getsockopt(socket, SOL_SOCKET, SO_PEERPIDFD, &pidfd, &length) == 0) return pidfd;
  return static_cast<int>(syscall(SYS_pidfd_open, pid, 0));  // older kernels: pid may in theory be recycled already
}

std::string seal_problem(int fd, uint64_t claimed) {
  struct stat info{};
  if (fstat(fd, &info) != 0 || static_cast<uint64_t>(info.st_size) != claimed) return "its size is not what it says";
  const int seals = fcntl(fd, F_GET_SEALS);
  if (seals < 0 || (seals & (F_SEAL_SHRINK | F_SEAL_GROW)) != (F_SEAL_SHRINK | F_SEAL_GROW)) return "it is not sealed";
  return "";
}

}  // namespace

Introduction introduce(const std::string& address, const Nonce& nonce, int timeout_ms) {
  const auto fail = [&](const std::string& what) -> Error {
    return {ErrorKind::init, "no shared memory with the process that listens at '@" + address + "': " + what};
  };
  const Descriptor fd(socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0));
  if (fd.get() < 0) throw fail(std::string("socket: ") + std::strerror(errno));
  timeval patience{timeout_ms / 1000, timeout_ms % 1000 * 1000};
  setsockopt(fd.get(), SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof(patience));
  setsockopt(fd.get(), SOL_SOCKET, SO_SNDTIMEO, &patience, sizeof(patience));
  sockaddr_un name;
  const socklen_t length = abstract_address(address, &name);
  if (connect(fd.get(), reinterpret_cast<sockaddr*>(&name), length) != 0) {
    const std::string why = std::string("connect: ") + std::strerror(errno);
    if (errno != ECONNREFUSED) throw fail(why);
    throw NobodyThere(
        ErrorKind::init,
        fail(why + " (the process has ended, or it runs in another network namespace or on another host)").message());
  }
  const ucred who = credentials(fd.get());
  if (who.uid != geteuid())
    throw fail("it runs as user " + std::to_string(who.uid) + ", this process as " + std::to_string(geteuid()));

  Request request{kMagic, kProtocolVersion, 0, {}};
  std::memcpy(request.nonce, nonce.data(), nonce.size());
  if (send(fd.get(), &request, sizeof(request), MSG_NOSIGNAL) != sizeof(request))
    throw fail(std::string("send: ") + std::strerror(errno));
  Reply reply{};
  Descriptors received{-1, -1};
  const ssize_t got = receive_reply(fd.get(), &reply, &received);
  const Descriptor segment(received[0]);
  Descriptor bell(received[1]);
  if (got < 0 && errno == ECONNRESET) throw NobodyThere(ErrorKind::init, fail("it has ended just now").message());
  if (got < 0)
    throw fail(errno == EAGAIN ? "it did not answer within " + std::to_string(timeout_ms) + " ms (is it stopped?)"
                               : std::string("receive: ") + std::strerror(errno));
  if (got != sizeof(reply) || reply.magic != kMagic) throw fail("it is not an hxcomm process");
  if (reply.status == 2 || reply.version != kProtocolVersion)
    throw fail("it speaks protocol version " + std::to_string(reply.version) + ", this process " +
               std::to_string(kProtocolVersion) + "; install the same hxcomm on every rank");
  if (reply.status != 0 || segment.get() < 0 || bell.get() < 0) throw fail("it refused the nonce (stale store?)");
  if (const std::string problem = seal_problem(segment.get(), reply.segment_bytes); !problem.empty())
    throw fail("its segment is refused: " + problem);

  Introduction result;
  result.mapping = std::make_unique<Mapping>(segment.get(), reply.segment_bytes);
  const SegmentHeader& header = result.mapping->header();
  if (header.magic != kSegmentMagic || std::memcmp(header.nonce, nonce.data(), nonce.size()) != 0)
    throw fail("its segment's header is not the one the nonce belongs to");
  result.pid = who.pid;
  result.pidfd = open_pidfd(fd.get(), who.pid);
  if (result.pidfd < 0) throw fail(std::string("pidfd_open: ") + std::strerror(errno));
  fcntl(result.pidfd, F_SETFD, FD_CLOEXEC);
  result.bell = bell.release();
  return result;
}

void knock(const std::string& address) {
  // Not blocking: the listener of a stopped process takes in a thousand visitors, then connect() would wait.
  const Descriptor fd(socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  sockaddr_un name;
  const socklen_t length = abstract_address(address, &name);
  if (fd.get() >= 0) [[maybe_unused]]
    const int connected = connect(fd.get(), reinterpret_cast<sockaddr*>(&name), length);
}

Doorman::Doorman(std::string address, const Nonce& nonce, const Segment& segment, int bell)
    : nonce_(nonce), segment_(segment), bell_(bell) {
  listener_ = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
  sockaddr_un name;
  const socklen_t length = abstract_address(address, &name);
  if (listener_ < 0 || bind(listener_, reinterpret_cast<sockaddr*>(&name), length) != 0 ||
      listen(listener_, 1024) != 0) {
    const int error = errno;
    if (listener_ >= 0) close(listener_);
    throw Error(ErrorKind::init, "cannot listen at '@" + address + "': " + std::strerror(error));
  }
}

Doorman::~Doorman() {
  for (const Visitor& visitor : visitors_) close(visitor.fd);
  close(listener_);
}

int Doorman::accept_visitor() {
  const int fd = accept4(listener_, nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK);
  if (fd < 0) return -1;
  if (credentials(fd).uid != geteuid() || visitors_.size() >= kMaxVisitors) {
    close(fd);
    return -1;
  }
  visitors_.push_back({fd, now_ns()});
  return fd;
}

bool Doorman::answer(int visitor) {
  const auto it = std::find_if(visitors_.begin(), visitors_.end(), [&](const Visitor& v) { return v.fd == visitor; });
  if (it == visitors_.end()) return true;
  visitors_.erase(it);
  const Descriptor fd(visitor);
  Request request{};
  const ssize_t got = recv(visitor, &request, sizeof(request), MSG_DONTWAIT);
  if (got != sizeof(request) || request.magic != kMagic) return got != 0;
  Reply reply{kMagic, kProtocolVersion, 0, segment_.nbytes()};
  if (request.version != kProtocolVersion)
    reply.status = 2;
  else if (std::memcmp(request.nonce, nonce_.data(), nonce_.size()) != 0)
    reply.status = 1;
  const Descriptors handed_over{segment_.fd(), bell_};
  send_reply(visitor, reply, reply.status == 0 ? &handed_over : nullptr);
  return true;
}

std::vector<int> Doorman::dismiss_silent() {
  std::vector<int> closed;
  const int64_t oldest = now_ns() - kVisitorPatienceNs;
  std::erase_if(visitors_, [&](const Visitor& visitor) {
    if (visitor.since_ns > oldest) return false;
    closed.push_back(visitor.fd);
    close(visitor.fd);
    return true;
  });
  return closed;
}

}  // namespace hxcomm
