// A process's end of the shared memory: its segment, the peers it has mapped, and the thread that watches them.
//
// Segments and sockets belong to pairs of processes; groups are views into them, so a new subgroup of known peers costs
// no handshake and no mapping. One per process (tests make several, to run ranks as threads). The watcher thread
// answers handshakes and waits on the peers' pidfds; it never takes the GIL, so it works while Python is stuck.
#pragma once

#include <array>
#include <atomic>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "core/arena.h"
#include "core/segment.h"
#include "transport/handshake.h"
#include "transport/wire.h"

namespace hxcomm {

// Another process (or this one, seen from another endpoint of it).
struct Peer {
  Nonce nonce{};
  std::string address;
  std::unique_ptr<Mapping> mapping;
  int pid = 0;
  int pidfd = -1;
  int bell = -1;
  std::atomic<bool> dead{false};
  std::string death;  // set before `dead`; "was killed by SIGKILL"
  ~Peer();
  // Wakes the peer's threads that sleep on its doorbell, if any do. Call after Doorbell::fence_after_publishing().
  void ring_if_asleep() const;
  // Sends SIGKILL to this very process, not to one that has its number since.
  void kill() const;
};

class Endpoint {
 public:
  // `segment_bytes` is address space, not memory, as are `chips` times `bytes_per_chip` behind it. Throws Error{init}.
  explicit Endpoint(size_t segment_bytes, int chips = 0, size_t bytes_per_chip = 0);
  ~Endpoint();
  Endpoint(const Endpoint&) = delete;
  Endpoint& operator=(const Endpoint&) = delete;

  const std::string& address() const { return address_; }
  const Nonce& nonce() const { return nonce_; }
  Segment& segment() { return segment_; }
  Arenas& arenas() { return arenas_; }

  // The peer that listens at `address`, mapped at most once per incarnation (nonce). Throws Error{init}.
  std::shared_ptr<Peer> connect(const std::string& address, const Nonce& nonce, int timeout_ms);

  // `listener(peer)` is called on the watcher thread when a peer has died, `listener(nullptr)` when somebody has
  // knocked, who wants this process to look at its groups. Returns a token for unsubscribe(); a call that is running
  // then may still end later, so a listener holds what it needs by weak pointers.
  using Listener = std::function<void(const Peer*)>;
  uint64_t subscribe(Listener listener);
  void unsubscribe(uint64_t token);

  // Memory of this segment that peers may still read: it is released once `unused` says so, looked at whenever a group
  // is made or buried, and when a chip's memory is short or trimmed.
  struct Range {
    size_t offset, nbytes;
  };
  void bury(std::vector<Range> ranges, std::function<bool()> unused, std::function<void()> released = {});
  void dig();

  // Opens this process's connections to other hosts, once. Throws Error{init}.
  Wire& open_wire(const std::string& bind_address, const WireSecurity& security);
  Wire* wire() const { return has_wire_.load(std::memory_order_acquire) ? wire_.get() : nullptr; }
  // At the end of the process: what has been sent leaves first, for at most a second.
  void close_wire();
  // Takes what has come from other hosts, if there are any. True where something had.
  bool pump_wire();

  // The doorbell of this process. A thread that is about to sleep: announce, check its conditions, sleep, withdraw.
  uint32_t announce_sleep();
  bool sleep(uint32_t doorbell, int64_t timeout_ns);  // false: a signal came; true also for messages of other hosts
  void withdraw_sleep();
  void ring_own_doorbell();  // as ring_if_asleep(), whether anybody sleeps or not

 private:
  void watch();
  void on_death(Peer& peer);
  void tell(const Peer* peer);

  Nonce nonce_;
  std::string address_;
  Segment segment_;
  Arenas arenas_;
  int bell_ = -1;
  Doorman doorman_;
  int epoll_ = -1;
  int stop_event_ = -1;
  std::mutex wire_mutex_;
  std::unique_ptr<Wire> wire_;
  std::atomic<bool> has_wire_{false};
  std::mutex peers_mutex_;
  std::vector<std::shared_ptr<Peer>> peers_;
  std::mutex listeners_mutex_;
  std::vector<std::pair<uint64_t, Listener>> listeners_;
  uint64_t next_token_ = 1;
  struct Grave {
    std::vector<Range> ranges;
    std::function<bool()> unused;
    std::function<void()> released;  // called afterwards, without locks
  };
  std::mutex graves_mutex_;
  std::vector<Grave> graves_;
  std::thread watcher_;
};

}  // namespace hxcomm
