// The ranks of a group that are on other hosts: messages of collectives, the verdict of all hosts, packets of
// point-to-point messages, aborts and losses.
//
// Frames of one rank arrive in the order sent, as early as they like. A message of the operation that runs here is
// taken at once, one of a later operation stays where it is and holds a credit, one of an earlier operation, or of
// another call than this host's, is dropped. A rank out of credits queues what it sends and goes on; no sender ever
// waits for a receiver in the middle of an operation.
#pragma once

#include <atomic>
#include <deque>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "communicator/call.h"
#include "communicator/descriptor.h"
#include "core/executor.h"
#include "core/packet_ring.h"
#include "transport/endpoint.h"

namespace hxcomm {

class Group;

// Messages of one rank that another one has not taken yet, at most: memory that one peer can hold here, together with
// the messages of one window of the operation that runs.
constexpr uint64_t kCredits = 8;
constexpr size_t kMaxMessageBytes = 4 << 20;

// The ranks beside one that dies know how, and those beside one that does not call know which: they may tell within
// this time, before another host gives out what little it knows.
constexpr int64_t kWitnessNs = 150'000'000;

class Crossing final : public FrameHandler, public Messages {
 public:
  // By rank: its host, numbered from 0, and its process. `wire` is connected to those of the other hosts.
  Crossing(Group& group, std::shared_ptr<Endpoint> endpoint, std::vector<int> hosts, std::vector<Nonce> processes);

  bool is_alone(int rank) const;  // on its host
  bool is_remote(int rank) const { return hosts_[static_cast<size_t>(rank)] != hosts_[me_]; }
  const std::vector<int>& hosts() const { return hosts_; }
  int leader() const { return leader_; }  // of this host
  bool leads() const { return leader_ == static_cast<int>(me_); }

  // The group's driver calls these.
  enum class Verdict { pending, agreed, differ };
  void begin(const Op& op);  // the next window of it runs from now on
  void finish(const Op& op, bool failed);
  // By the leader, once all ranks of this host have arrived at the operation: what they call, 0 where they differ.
  void announce(const Op& op, uint64_t fingerprint);
  Verdict verdict(const Op& op);
  void drop_queued();  // nobody wants what a failed operation has not sent yet
  bool all_sent();     // nothing waits for credits, and nothing is lent
  void absorb();       // takes what has arrived

  // Messages, for the executor.
  const std::byte* arrived(uint32_t number) override;
  std::byte* outgoing(size_t nbytes) override;
  void send(int peer, uint32_t number) override;
  bool lend(int peer, uint32_t number, const std::byte* data, size_t nbytes) override;
  bool lends() override;
  bool agreed() override;

  // Thread-safe. `what` and `aux` as on_frame() of OneSided takes them.
  void send_of_window(int peer, uint64_t window, uint32_t what, uint64_t aux, const void* data, size_t nbytes);

  // Point to point. Thread-safe.
  void send_packet(int peer, const Packet& packet);
  std::deque<Payload> take_packets(int peer);
  bool has_packets(int peer) const;
  void acknowledge_packets(int peer, uint64_t consumed);
  uint64_t acknowledged_packets(int peer) const;

  // Thread-safe.
  void tell_abort(uint64_t word, const std::string& reason);
  void leave();
  // "" of a rank whose connection stands.
  std::string loss_of(int rank) const;
  // Ends the group where a rank is lost that had not left it.
  void check_losses();
  // Whom this rank waits for: where it leads, other hosts' leaders that have given no verdict; who takes nothing.
  std::vector<int> needed_by(const Op& op) const;

  // On the thread that pumps the wire.
  void on_frame(const Nonce& from, const FrameHeader& header, Payload&& payload) override;
  void on_lost(const Nonce& process, const std::string& why) override;

 private:
  struct Frame {
    int source = 0;
    FrameHeader header{};
    Payload payload;
  };
  struct Outgoing {  // a message, made or lent
    FrameHeader header{};
    std::shared_ptr<Payload> payload;
    const std::byte* lent = nullptr;
    size_t nbytes = 0;
  };
  struct Remote {
    Nonce process{};
    int host = 0;
    bool leads = false;
    // The driver's.
    uint64_t sent = 0, acknowledged = 0, taken = 0, told = 0;
    bool verdict_due = false;    // to this leader: with the first message to it, or by itself where there is none
    std::deque<Outgoing> queue;  // for want of credits
    std::deque<Frame> early;
    // Of leaders only: of the operation that runs here and of the next one, in any order. Not by parity as in lines:
    // an operation takes as many sequences as it has windows, and a host may be one operation ahead.
    struct Said {
      uint64_t sequence = 0, fingerprint = 0;
    } said[2];
    struct Described {
      uint64_t sequence = 0;
      std::vector<std::byte> bytes;
    } described[2];
    // Under mutex_.
    std::deque<Payload> packets;
    std::string loss;
    int64_t lost_ns = 0;
    std::atomic<bool> lost{false};
    std::atomic<uint64_t> acknowledged_packets{0};
  };

  Remote& remote(int rank) const { return *remotes_[static_cast<size_t>(rank)]; }
  int rank_of(const Nonce& process) const;
  FrameHeader header(FrameType type, int peer, uint64_t sequence) const;
  void hand_over(int peer, Outgoing message);
  void transmit(Remote& to, const Outgoing& message);
  void flush();
  void take(Frame&& frame);
  void take_message(Frame&& frame);
  void send_due_verdicts();
  void describe(const Op& op);
  void note_descriptors(const Frame& frame);
  bool know_all_descriptors(uint64_t sequence);
  void give_credits_back();

  Group& group_;
  std::shared_ptr<Endpoint> endpoint_;
  Wire& wire_;
  std::vector<int> hosts_;
  size_t me_;
  int leader_ = 0;
  std::vector<std::unique_ptr<Remote>> remotes_;  // by rank; null on this host
  std::vector<int> others_;                       // the ranks of other hosts

  // The driver's: the window that runs, or the sequence that comes next.
  uint64_t current_ = 0, first_ = 0, fingerprint_ = 0;
  bool running_ = false;
  bool described_ = false;  // this host's descriptors of `first_` have been sent
  uint64_t verdict_ = 0;    // of this host on it, where this rank leads
  uint64_t agreed_ = 0;     // the sequence of the last operation that all hosts agreed on
  std::vector<std::optional<Payload>> arrivals_;
  std::shared_ptr<Payload> outgoing_;
  std::shared_ptr<std::atomic<int>> lent_ = std::make_shared<std::atomic<int>>(0);
  size_t queued_ = 0, queued_lent_ = 0;

  mutable std::mutex mutex_;
  std::deque<Frame> inbox_;
  std::atomic<bool> has_frames_{false};
  std::atomic<bool> any_lost_{false};
};

}  // namespace hxcomm
