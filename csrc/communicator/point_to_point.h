// Messages between two ranks of a group: send, recv, tags, any source. They never touch the collective sequence.
// Packets of ranks of one host travel in rings in shared memory, those of other hosts as frames, as many at a time.
//
// A small message is sent eagerly: it is copied into the ring to its receiver, and the send is done. A larger one is
// announced; the receiver requests it once it has a buffer, and it follows in pieces. One of device hx is not sent at
// all: the receiver copies it out of the sender's tensor, which is lent until it says so. A receiver takes whatever
// arrives out of the rings while it has anything pending, matching it with the posted receives in the order sent, so a
// ring that is full of messages nobody wants yet blocks none behind them. Terms as in MPI: eager, rendezvous, matching
// by (source, tag) in order.
#pragma once

#include <cstdint>
#include <deque>
#include <list>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "communicator/call.h"
#include "core/packet_ring.h"
#include "transport/endpoint.h"

namespace hxcomm {

class Group;

constexpr int kAnySource = -1;

// "3 elements of float32", for messages.
std::string elements(uint64_t count, DType dtype, DeviceKind device = DeviceKind::cpu);

class PointToPoint {
 public:
  explicit PointToPoint(Group& group);

  // Takes a send or a recv. Thread-safe. Throws the error that ended the group, or Error{mismatch} where an earlier
  // eager send to the same rank, which had already ended well here, met a receive that it did not fit; the op is then
  // not taken. Ops that have ended are added to `finished`, also where it throws.
  void post(std::shared_ptr<Op> op, std::vector<std::shared_ptr<Op>>* finished);
  // Moves packets both ways unless another thread is doing so. True when anything moved; ops that have ended are added
  // to `finished`.
  bool advance(std::vector<std::shared_ptr<Op>>* finished, bool look_at_clock);
  // Ends all that is pending with the error that ended the group.
  void fail_all(std::vector<std::shared_ptr<Op>>* finished);
  // Whether a member waits for a reply that is not in a ring yet.
  bool owes() const;
  // The rings of this rank, for the group to give back when it ends.
  std::vector<Endpoint::Range> ranges() const;

 private:
  using OpPointer = std::shared_ptr<Op>;
  using Finished = std::vector<OpPointer>;
  struct Message {  // arrived, and no receive fits yet
    uint64_t number = 0;
    int32_t tag = 0;
    DType dtype{};
    uint64_t count = 0;
    bool announced = false;
    std::vector<std::byte> payload;  // of an eager one
    OpPointer send;                  // where this rank sent it to itself
    DeviceKind device{};
    const std::byte* tensor = nullptr;  // of an announced one of device hx: where it lies
  };
  struct Incoming {  // requested; its data is on the way
    OpPointer recv;
    uint64_t received_bytes = 0;
  };
  struct Outgoing {
    PacketKind kind{};
    uint64_t message = 0;
    std::string text{};
    OpPointer recv{};  // ends when this is in the ring: who has left sends nothing any more
  };
  struct Stream {
    OpPointer send;
    uint64_t message = 0;
    uint64_t sent_bytes = 0;
  };
  struct Channel {  // to and from one peer
    uint64_t ring_offset = 0;
    uint64_t produced = 0;
    uint64_t consumed = 0;
    uint64_t next_message = 1;
    std::deque<Outgoing> replies;
    std::deque<OpPointer> sends;
    std::map<uint64_t, OpPointer> announced;
    std::deque<Stream> streams;
    std::list<Message> arrived;
    std::map<uint64_t, Incoming> incoming;
    std::string refused;                                     // why an eager send that had ended was not taken
    std::deque<std::pair<uint64_t, uint64_t>> sent_eagerly;  // the latest messages and their flight records
  };

  void report_refused(int peer, const Op& op, Finished* finished);
  void refuse_sent(Channel& channel, uint64_t message, std::string text);
  void end_eager(Channel& channel, const OpPointer& send, uint64_t message, Finished* finished);
  void ring(int peer);
  bool drain(int peer, Finished* finished);
  bool drain_from_afar(int peer, Finished* finished);
  bool is_remote(int peer) const;
  void take(int peer, const Packet& packet, uint32_t payload_bytes, Finished* finished);
  void take_message(int peer, const Packet& packet, uint32_t payload_bytes, Finished* finished);
  void put_reply(Channel& channel, Packet& packet, Finished* finished);
  bool pump(int peer, Finished* finished);
  bool pump_afar(int peer, Finished* finished);
  bool put_next(int peer, Packet& packet, Finished* finished);
  void send_to_self(Finished* finished);
  void arrive(int source, Message message, Finished* finished);
  void deliver(int source, Message& message, const OpPointer& recv, Finished* finished);
  bool match_posted(const OpPointer& recv, Finished* finished);
  void end(const OpPointer& op, std::unique_ptr<Error> error, Finished* finished);
  void drop_all(Finished* finished);
  void reply(Channel& channel, Outgoing packet);
  void count(int pending);
  void check_failures();
  bool waits_in_vain(const Op& op) const;
  std::vector<OpPointer> pending() const;
  std::string state_of(const Op& op) const;
  Packet& slot(std::byte* segment, uint64_t ring_offset, uint64_t number) const;

  Group& group_;
  mutable std::mutex mutex_;  // guards all below
  std::vector<Channel> channels_;
  std::unique_ptr<Packet> afar_;   // on its way to or from another host
  std::list<OpPointer> receives_;  // posted and not matched, in order
  int next_source_ = 0;            // where the search for any source begins
  int64_t n_pending_ = 0;          // ops that have not ended, and replies that are not in a ring yet
};

}  // namespace hxcomm
