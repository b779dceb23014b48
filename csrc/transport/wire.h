// The wire: a process's connections to processes on other hosts, over ZeroMQ.
//
// One socket for everything: it listens, and it connects out. Of two processes the one with the smaller nonce connects.
// A connection begins with a hello in both directions that names both processes; only members of the job know these
// nonces. It is never made again: a lost process stays lost, and one that starts anew has another nonce. Nothing that
// arrives is trusted: a bad frame is counted, said once, and dropped, and the job goes on. Sending never blocks, and
// nothing is received but by pump().
#pragma once

#include <poll.h>

#include <atomic>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "transport/complaints.h"
#include "transport/frame.h"
#include "transport/wire_security.h"
#include "transport/wire_watch.h"

namespace hxcomm {

class Wire {
 public:
  // Listens at a free port of `bind_address` ("10.0.0.1", "::1"). Throws Error{init}.
  Wire(const Nonce& self, const std::string& bind_address, const WireSecurity& security);
  ~Wire();  // what was sent leaves if the peers take it within a second
  Wire(const Wire&) = delete;
  Wire& operator=(const Wire&) = delete;

  const std::string& address() const { return address_; }  // "tcp://10.0.0.1:40001"

  // Expects the process, and connects where that is our part. Repeated, it tries again if the first attempt failed.
  void connect(const Nonce& peer, const std::string& address);
  bool is_connected(const Nonce& peer) const;  // both hellos have passed, and it is not lost
  // Why it is not connected (refused, another secret, another version, lost); "" if that is not known.
  std::string trouble_of(const Nonce& peer) const;

  // Frames of the group go to the handler, and losses of all processes. Frames of other groups are dropped.
  void subscribe(uint64_t group, std::weak_ptr<FrameHandler> handler);
  void unsubscribe(uint64_t group);

  // Magic, version, payload_bytes and crc of the header are filled in here. False where `to` is not connected.
  bool send(const Nonce& to, const FrameHeader& header, const void* payload, size_t nbytes);  // copies
  // Shares the memory with whatever else it is sent to: it may not be changed any more.
  Payload make_payload(size_t nbytes) const { return Payload(nbytes); }
  bool send(const Nonce& to, const FrameHeader& header, const Payload& payload);
  // Whether memory may change between send_lent() and its end: not where the frame carries a code made of it.
  bool may_lend() const { return security_.mode != WireSecurity::Mode::mac; }
  // Copies nothing: counts `*lent` up, and down again (on any thread) when the memory may be changed, sent or not.
  bool send_lent(const Nonce& to, const FrameHeader& header, const void* data, size_t nbytes,
                 std::shared_ptr<std::atomic<int>> lent);
  // As the destructor, for a process that ends while others still hold this: from then on nothing is sent or received.
  void close();

  // Hands out what has arrived: events, then frames. True if there was anything. False at once where another thread
  // is at it, or is sending.
  bool pump();
  // Readable when pump() has something to do. pump() until it returns false before every poll().
  void append_pollfds(std::vector<pollfd>* fds) const;

  uint64_t ignored_frames() const { return ignored_.load(std::memory_order_relaxed); }

 private:
  // A connection, by the routing id that our socket has for it (its label).
  struct Link {
    std::string label;
    std::string address;  // ours: where we connected to
    bool ours = false;
    int fd = -1;
    Nonce process{};    // known from the beginning where it is ours, from its hello where it is not
    bool open = false;  // its hello has come
    bool closed = false;
    std::string why_closed;
    int64_t doubtful_until_ns = 0;  // whether `fd` is this link's is not certain: ask until then
    int64_t ask_ns = 0;
    std::optional<FrameTags> tags_out, tags_in;
  };
  struct Process {
    std::string label;  // of its link; "": none
    bool lost = false;
    std::string trouble;
  };
  // A TCP socket of libzmq's, as its events tell of it.
  struct Descriptor {
    bool open = false;
    bool ours = false;    // we have connected
    int accepted = 0;     // connections that had this number since the last hello that came through it
    std::string address;  // the other end
  };
  enum class Handshake { went_well, given_up, failed };
  struct Arrival {
    std::string_view label;
    Payload label_part, header_part, payload;
    int parts = 0;
    int fd = -1;
  };

  // wire.cpp
  void open_socket(const std::string& bind_address);
  void close_all();
  void set(int option, int value) const;
  void set(int option, const void* value, size_t nbytes) const;
  Link* link_to(const Nonce& process) const;
  bool transmit(Link& link, FrameHeader header, Payload& payload);
  bool send_hello(Link& link);
  void prepare_tags(Link& link) const;
  void close_link(Link& link, const std::string& why);
  void ring();

  // wire_pump.cpp
  bool something_is_there();
  void take_events();
  void take_event(uint16_t event, int value, const std::string& address);
  void on_disconnected(int fd, Handshake handshake);
  void on_failure(const std::string& address, const std::string& why);
  bool receive(Arrival* arrival);
  void take(Arrival& arrival);
  const char* problem_of(const Arrival& arrival, FrameHeader* header) const;
  void take_hello(Arrival& arrival, const FrameHeader& header, Link* link);
  void take_other_version(const Arrival& arrival, const FrameHeader& header, Link* link);
  bool tag_is_right(const FrameTags& tags, const FrameHeader& header, const Arrival& arrival) const;
  void dispatch(const Link& link, const FrameHeader& header, Payload&& payload);
  void ignore(const char* what, const Arrival& arrival);
  void refuse(const char* what, const Arrival& arrival, const Link* link);
  std::string whom(int fd) const;
  void ask_doubtful_links();
  void bury_closed_links();

  const ZmqLibrary& zmq_;
  const Nonce self_;
  const WireSecurity security_;
  void* context_ = nullptr;
  void* socket_ = nullptr;
  void* monitor_ = nullptr;
  int fd_ = -1, monitor_fd_ = -1;
  int wakeup_ = -1;  // rung where a send found arrivals: libzmq's own descriptor then says nothing any more
  std::string address_;
  std::unique_ptr<WireWatch> watch_;
  Complaints complaints_;
  std::atomic<uint64_t> ignored_{0};
  std::atomic<bool> must_look_{true};

  mutable std::mutex mutex_;  // all below, and the sockets
  std::map<std::string, Link, std::less<>> links_;
  std::map<Nonce, Process> processes_;
  std::map<int, Descriptor> descriptors_;
  std::unordered_map<uint64_t, std::weak_ptr<FrameHandler>> handlers_;
  std::vector<std::shared_ptr<FrameHandler>> held_;  // during a pump: a handler does not end under the lock
  std::string visitors_trouble_;                     // why the last one who came to us was not let in
  Handshake handshake_ = Handshake::went_well;       // the event before; the next one has its descriptor
  bool any_closed_ = false;
};

}  // namespace hxcomm
