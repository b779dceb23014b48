// Unit test of the transport: how endpoints find and map each other, whom they refuse, and how a death is announced.
// Two endpoints of one process stand for two processes, but where one must die: that is a forked child.
#include <poll.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <csignal>
#include <cstddef>
#include <cstring>
#include <functional>
#include <future>
#include <string>
#include <thread>
#include <vector>

#include "tests/expect.h"
#include "transport/endpoint.h"

using namespace hxcomm;
using namespace hxcomm::test;

namespace {

constexpr size_t kSegmentBytes = 1 << 20;
constexpr int kTimeoutMs = 20'000;     // far more than is ever needed: a deadline, not an expectation
constexpr size_t kAddressLength = 39;  // "hxcomm-" and 32 hexadecimal digits

// A socket bound or connected by hand to an abstract name, for visitors and hosts that break the rules.
class RawSocket {
 public:
  explicit RawSocket(const std::string& name) : fd_(socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0)) {
    address_.sun_family = AF_UNIX;
    std::memcpy(address_.sun_path + 1, name.data(), name.size());
    length_ = static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + 1 + name.size());
  }
  ~RawSocket() { close(fd_); }
  RawSocket(const RawSocket&) = delete;
  RawSocket& operator=(const RawSocket&) = delete;
  bool connect() const { return ::connect(fd_, name(), length_) == 0; }
  bool listen() const { return bind(fd_, name(), length_) == 0 && ::listen(fd_, 8) == 0; }
  bool send(const std::string& words) const {
    return ::send(fd_, words.data(), words.size(), MSG_NOSIGNAL) == static_cast<ssize_t>(words.size());
  }
  int accept() const { return ::accept(fd_, nullptr, nullptr); }
  // The other side hangs up without having said anything.
  bool is_hung_up_on() const {
    pollfd waiting{fd_, POLLIN, 0};
    char byte = 0;
    return poll(&waiting, 1, kTimeoutMs) == 1 && recv(fd_, &byte, 1, 0) <= 0;
  }

 private:
  const sockaddr* name() const { return reinterpret_cast<const sockaddr*>(&address_); }
  int fd_;
  sockaddr_un address_{};
  socklen_t length_ = 0;
};

void connecting_maps_the_peers_segment() {
  Endpoint a(kSegmentBytes), b(kSegmentBytes);
  const std::shared_ptr<Peer> peer = a.connect(b.address(), b.nonce(), kTimeoutMs);
  expect(peer->pid == getpid() && peer->nonce == b.nonce() && !peer->dead.load(), "who the peer is");
  expect(peer->mapping->nbytes() == kSegmentBytes && peer->mapping->base() != b.segment().base(),
         "a mapping of its own");
  const size_t offset = b.segment().allocate(100);
  std::memcpy(b.segment().base() + offset, "written by b", 13);
  const auto* seen = reinterpret_cast<const char*>(peer->mapping->base() + offset);
  expect(std::strcmp(seen, "written by b") == 0, "what the peer wrote after it was mapped");
  std::memcpy(peer->mapping->base() + offset, "written by a", 13);
  expect(std::memcmp(b.segment().base() + offset, "written by a", 13) == 0, "what a wrote, in b's own memory");
}

void a_peer_is_mapped_once_however_often_it_is_asked_for() {
  Endpoint a(kSegmentBytes), b(kSegmentBytes), c(kSegmentBytes);
  std::vector<std::shared_ptr<Peer>> peers(8);
  std::vector<std::thread> threads;
  for (std::shared_ptr<Peer>& peer : peers)
    threads.emplace_back([&] { peer = a.connect(b.address(), b.nonce(), kTimeoutMs); });
  for (std::thread& thread : threads) thread.join();
  for (const std::shared_ptr<Peer>& peer : peers) expect(peer == peers[0], "the same peer in every thread");
  expect(a.connect(b.address(), b.nonce(), kTimeoutMs) == peers[0], "the same peer later");
  expect(a.connect(c.address(), c.nonce(), kTimeoutMs) != peers[0], "another peer at another address");
}

void a_ring_wakes_a_peer_that_sleeps() {
  Endpoint a(kSegmentBytes), b(kSegmentBytes);
  const std::shared_ptr<Peer> peer = a.connect(b.address(), b.nonce(), kTimeoutMs);
  peer->ring_if_asleep();
  expect(b.segment().header().doorbell.rings.load() == 0, "no ring while nobody sleeps");
  const uint32_t before = b.announce_sleep();
  peer->ring_if_asleep();
  expect(b.sleep(before, int64_t{kTimeoutMs} * 1'000'000), "the ring between announcing and sleeping not to be lost");
  b.withdraw_sleep();
  const Doorbell& doorbell = b.segment().header().doorbell;
  expect(doorbell.rings.load() == before + 1 && !doorbell.has_sleepers(), "one ring");
}

void a_wrong_nonce_is_refused() {
  Endpoint a(kSegmentBytes), b(kSegmentBytes);
  Nonce wrong = b.nonce();
  wrong[15] ^= 1;
  const auto connect = [&](const Nonce& nonce) { return a.connect(b.address(), nonce, kTimeoutMs); };
  expect_error(ErrorKind::init, {"'@" + b.address() + "'", "refused the nonce"}, [&] { connect(wrong); });
  expect(connect(b.nonce())->pid == getpid(), "the right one to be let in afterwards");
}

void a_wrong_address_is_an_error_that_names_it() {
  Endpoint a(kSegmentBytes);
  const auto connect = [&](const std::string& address) { a.connect(address, a.nonce(), kTimeoutMs); };
  expect_error(ErrorKind::init, {"'@hxcomm-nobody'", std::strerror(ECONNREFUSED), "the process has ended"},
               [&] { connect("hxcomm-nobody"); });
  expect_error(ErrorKind::init, {"empty or longer"}, [&] { connect(""); });
  expect_error(ErrorKind::init, {"empty or longer"}, [&] { connect(std::string(108, 'x')); });
}

void a_garbage_request_is_ignored() {
  Endpoint a(kSegmentBytes), b(kSegmentBytes);
  for (const std::string& garbage : {std::string("x"), std::string(32, '\0'), std::string(5000, 'y')}) {
    const RawSocket visitor(b.address());
    expect(visitor.connect() && visitor.send(garbage), "a visitor who says something else");
    expect(visitor.is_hung_up_on(), "nothing said to it");
  }
  {
    expect(RawSocket(b.address()).connect(), "a visitor who leaves at once");
  }
  expect(a.connect(b.address(), b.nonce(), kTimeoutMs)->pid == getpid(), "the next one to be served");
}

void silent_visitors_block_nobody_and_are_shown_out() {
  Endpoint a(kSegmentBytes), b(kSegmentBytes);
  const RawSocket first(b.address()), second(b.address());
  expect(first.connect() && second.connect(), "two visitors who say nothing");
  expect(a.connect(b.address(), b.nonce(), kTimeoutMs)->pid == getpid(), "the third to be served before they leave");
  expect(first.is_hung_up_on() && second.is_hung_up_on(), "their connections to be closed in the end");
}

void a_host_that_never_answers_costs_the_timeout_and_no_more() {
  Endpoint a(kSegmentBytes);
  const std::string name = "hxcomm-silent-" + a.address();
  const RawSocket host(name);
  expect(host.listen(), "a listener that never answers");
  expect_error(ErrorKind::init, {"'@" + name + "'", "within 30 ms", "is it stopped?"},
               [&] { a.connect(name, a.nonce(), 30); });
}

void a_host_that_is_not_hxcomm_is_refused() {
  Endpoint a(kSegmentBytes);
  const std::string name = "hxcomm-stranger-" + a.address();
  const RawSocket host(name);
  expect(host.listen(), "a listener of another kind");
  std::thread stranger([&] {
    const int visitor = host.accept();
    char request[64];
    expect(recv(visitor, request, sizeof request, 0) > 0, "a request");  // unread, it would reset the connection
    [[maybe_unused]] const ssize_t sent = send(visitor, "220 mail.example.org", 20, MSG_NOSIGNAL);
    close(visitor);
  });
  expect_error(ErrorKind::init, {"'@" + name + "'", "not an hxcomm process"},
               [&] { a.connect(name, a.nonce(), kTimeoutMs); });
  stranger.join();
}

// A child with an endpoint, which lives until a byte comes through `life`, or it is killed.
struct Child {
  pid_t pid;
  int life;
  std::string address;
  Nonce nonce;
};

// Called while this process has no other thread: the child makes threads of its own.
Child fork_child(int exit_status) {
  int card[2], life[2];
  if (pipe(card) != 0 || pipe(life) != 0) throw Error(ErrorKind::init, "pipe");
  const pid_t pid = fork();
  if (pid == 0) {
    close(life[1]);
    const Endpoint endpoint(kSegmentBytes);
    char byte = 0;
    const bool told = write(card[1], endpoint.address().data(), kAddressLength) == kAddressLength &&
                      write(card[1], endpoint.nonce().data(), endpoint.nonce().size()) == 16;
    if (told && read(life[0], &byte, 1) == 1) _exit(exit_status);
    _exit(99);
  }
  close(card[1]);
  close(life[0]);
  Child child{pid, life[1], std::string(kAddressLength, ' '), {}};
  const bool told = read(card[0], child.address.data(), kAddressLength) == kAddressLength &&
                    read(card[0], child.nonce.data(), child.nonce.size()) == 16;
  close(card[0]);
  if (!told) throw Error(ErrorKind::init, "the child did not start");
  return child;
}

// What the listeners are told when the child ends by `end`.
std::string announced_death(int exit_status, const std::function<bool(const Child&)>& end) {
  const Child child = fork_child(exit_status);
  Endpoint a(kSegmentBytes);
  const std::shared_ptr<Peer> peer = a.connect(child.address, child.nonce, kTimeoutMs);
  expect(peer->pid == child.pid && !peer->dead.load(), "the child, alive");
  std::promise<const Peer*> announced;
  bool told_the_unsubscribed = false;
  const uint64_t gone = a.subscribe([&](const Peer*) { told_the_unsubscribed = true; });
  a.subscribe([&](const Peer* who) { announced.set_value(who); });
  a.unsubscribe(gone);
  expect(end(child), "the child's end brought about");
  std::future<const Peer*> who = announced.get_future();
  const bool came = who.wait_for(std::chrono::milliseconds(kTimeoutMs)) == std::future_status::ready;
  waitpid(child.pid, nullptr, 0);
  close(child.life);
  expect(came && who.get() == peer.get() && peer->dead.load(), "the death of that peer announced");
  expect(!told_the_unsubscribed, "nothing told to who has unsubscribed");
  expect(peer->mapping->header().pid == child.pid, "its memory still readable");
  expect_error(ErrorKind::init, {std::strerror(ECONNREFUSED)}, [&] { a.connect(child.address, child.nonce, 1000); });
  return came ? peer->death : "no death was announced";
}

void a_knock_is_told_to_the_listeners_of_the_process_and_only_there() {
  Endpoint a(kSegmentBytes), b(kSegmentBytes);
  std::promise<const Peer*> heard;
  bool heard_by_b = false;
  a.subscribe([&](const Peer* who) { heard.set_value(who); });
  b.subscribe([&](const Peer*) { heard_by_b = true; });
  knock("hxcomm-where-nobody-lives");
  knock(a.address());
  std::future<const Peer*> who = heard.get_future();
  const bool came = who.wait_for(std::chrono::milliseconds(kTimeoutMs)) == std::future_status::ready;
  expect(came && who.get() == nullptr, "a knock, which is nobody's death");
  expect(!heard_by_b, "nothing told elsewhere");
}

void a_killed_peers_death_is_announced_with_the_signals_name() {
  for (int signal : {SIGKILL, SIGTERM}) {
    const std::string death = announced_death(0, [&](const Child& child) { return kill(child.pid, signal) == 0; });
    expect(death == std::string("was killed by SIG") + sigabbrev_np(signal), "the signal's name, not: " + death);
  }
}

void a_peer_that_exits_is_announced_with_its_status() {
  for (int status : {0, 3}) {
    const std::string death = announced_death(status, [](const Child& child) { return write(child.life, "", 1) == 1; });
    expect(death == "exited with status " + std::to_string(status), "its status, not: " + death);
  }
}

}  // namespace

int main() {
  return run({
      {"connecting maps the peer's segment", connecting_maps_the_peers_segment},
      {"a peer is mapped once, however often it is asked for", a_peer_is_mapped_once_however_often_it_is_asked_for},
      {"a ring wakes a peer that sleeps", a_ring_wakes_a_peer_that_sleeps},
      {"a wrong nonce is refused", a_wrong_nonce_is_refused},
      {"a wrong address is an error that names it", a_wrong_address_is_an_error_that_names_it},
      {"a garbage request is ignored", a_garbage_request_is_ignored},
      {"silent visitors block nobody and are shown out", silent_visitors_block_nobody_and_are_shown_out},
      {"a host that never answers costs the timeout and no more",
       a_host_that_never_answers_costs_the_timeout_and_no_more},
      {"a host that is not hxcomm is refused", a_host_that_is_not_hxcomm_is_refused},
      {"a knock is told to the listeners of the process and only there",
       a_knock_is_told_to_the_listeners_of_the_process_and_only_there},
      {"a killed peer's death is announced with the signal's name",
       a_killed_peers_death_is_announced_with_the_signals_name},
      {"a peer that exits is announced with its status", a_peer_that_exits_is_announced_with_its_status},
  });
}
