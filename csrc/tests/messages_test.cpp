// Unit test of point to point: what depends on who looks at the rings when. Two ends of a group in one process, moved
// by hand: Group::post() alone moves nothing but what it must, and try_advance() is one look of one rank.
#include <algorithm>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "communicator/group.h"
#include "tests/expect.h"

using namespace hxcomm;
using namespace hxcomm::test;

namespace {

constexpr size_t kSegmentBytes = 16 << 20;
constexpr int kTimeoutMs = 20'000;  // far more than is ever needed: a deadline, not an expectation

using Numbers = std::vector<int32_t>;

struct Pair {
  explicit Pair(int world_size = 2) {
    static uint64_t nonce = 0;
    ++nonce;
    const auto n = static_cast<size_t>(world_size);
    for (size_t r = 0; r < n; ++r) {
      endpoints.push_back(std::make_shared<Endpoint>(kSegmentBytes));
      GroupConfig config;
      config.name = "messages";
      config.rank = static_cast<int>(r);
      config.world_size = world_size;
      for (int other = 0; other < world_size; ++other) config.labels.push_back("rank " + std::to_string(other));
      config.nonce = nonce;
      groups.push_back(std::make_shared<Group>(endpoints[r], std::make_shared<Progress>(endpoints[r]), config));
    }
    for (size_t r = 0; r < n; ++r) {
      for (size_t other = 0; other < n; ++other)
        if (other != r)
          groups[r]->attach(static_cast<int>(other),
                            endpoints[r]->connect(endpoints[other]->address(), endpoints[other]->nonce(), kTimeoutMs),
                            groups[other]->control_offset());
      groups[r]->start(nullptr, nullptr);
    }
  }
  ~Pair() {
    for (const auto& group : groups)
      if (group) group->leave();
  }
  std::shared_ptr<Op> post(size_t rank, OpCode op, int peer, Numbers& memory, int* ended = nullptr, int32_t tag = 0) {
    return post(rank, op, peer, memory.data(), memory.size(), DeviceKind::cpu, ended, tag);
  }
  std::shared_ptr<Op> post(size_t rank, OpCode op, int peer, int32_t* memory, size_t count, DeviceKind device,
                           int* ended = nullptr, int32_t tag = 0) {
    Call call;
    call.op = op;
    call.root = peer;
    call.tag = tag;
    call.count = count;
    call.dtype = DType::int32;
    call.device = device;
    (op == OpCode::send ? call.input : call.output).push_back({reinterpret_cast<std::byte*>(memory), count});
    return groups[rank]->post(std::move(call), [ended](const Error*) {
      if (ended != nullptr) ++*ended;
    });
  }
  int32_t* on_hx(size_t rank, size_t count, int32_t value) {
    Segment& segment = endpoints[rank]->segment();
    auto* memory = reinterpret_cast<int32_t*>(segment.base() + segment.allocate(count * sizeof(int32_t)));
    std::fill_n(memory, count, value);
    return memory;
  }
  void look(size_t rank) { groups[rank]->try_advance(/*look_at_clock=*/true); }

  std::vector<std::shared_ptr<Endpoint>> endpoints;
  std::vector<std::shared_ptr<Group>> groups;
};

FlightState state_of(const Pair& pair, size_t rank, size_t number) {
  auto& control =
      *reinterpret_cast<Control*>(pair.endpoints[rank]->segment().base() + pair.groups[rank]->control_offset());
  return control.flight.records[number].state.load();
}

void a_receive_takes_the_first_message() {
  Pair pair;
  Numbers first{1}, second{2}, none{0}, got{0}, other{0, 0};
  pair.post(0, OpCode::send, 1, first);
  pair.look(0);
  pair.post(1, OpCode::recv, 0, other, nullptr, 5);  // something is pending, so rank 1 takes what comes
  pair.look(1);
  pair.post(0, OpCode::send, 1, second);
  pair.look(0);
  pair.post(1, OpCode::recv, 0, got);
  pair.post(1, OpCode::send, 0, none);  // looks for a refusal, and so finds the second message
  pair.look(1);
  expect(got[0] == 1, "the message that was sent first, not " + std::to_string(got[0]));
}

void a_refused_send_is_told_at_the_next_call(OpCode next) {
  Pair pair;
  Numbers sent{1, 2}, got{0, 0, 0}, again{7}, fits{0};
  int ended = 0;
  pair.post(0, OpCode::send, 1, sent);
  pair.look(0);
  expect(state_of(pair, 0, 0) == FlightState::finished, "a small send to end at once");
  pair.post(0, OpCode::recv, 1, fits, &ended);
  const auto recv = pair.post(1, OpCode::recv, 0, got);
  pair.post(1, OpCode::send, 0, again);
  pair.look(1);
  expect(recv->error && recv->error->kind() == ErrorKind::mismatch, "a mismatch at the receiver");
  pair.look(0);  // takes the refusal and the message
  expect(ended == 1 && fits[0] == 7, "a message that fits to arrive beside a refusal");
  expect(state_of(pair, 0, 0) == FlightState::failed, "the record of the refused send to say failed");
  expect_error(ErrorKind::mismatch,
               {"an earlier send to this rank was not taken", "rank 0 sent 2 elements", "rank 1 receives 3",
                "was not begun and may be made again", op_name(next)},
               [&] { pair.post(0, next, 1, again); });
  expect(pair.post(0, next, 1, again) != nullptr, "the same call to be taken when it is made again");
}

void what_a_raising_post_has_ended_is_called_back() {
  Pair pair;
  Numbers sent{1, 2}, got{0, 0, 0}, again{7}, fits{0};
  int ended = 0;
  pair.post(0, OpCode::send, 1, sent);
  pair.look(0);
  pair.post(0, OpCode::recv, 1, fits, &ended);
  pair.post(1, OpCode::recv, 0, got);
  pair.post(1, OpCode::send, 0, again);
  pair.look(1);
  expect_error(ErrorKind::mismatch, {"was not begun"}, [&] { pair.post(0, OpCode::send, 1, again); });
  expect(ended == 1 && fits[0] == 7, "the receive that ended meanwhile to be called back once");
}

void a_receive_from_any_source_ends_when_its_sender_leaves(size_t count, size_t others) {
  Pair pair(3);
  Numbers sent(count, 1), got(count, 0);
  if (count > 0) pair.post(0, OpCode::send, 1, sent);
  pair.look(0);
  const auto recv = pair.post(1, OpCode::recv, kAnySource, got);
  pair.look(1);
  pair.groups[0]->leave();
  if (others > 1) pair.groups[2]->leave();
  pair.look(1);
  expect(recv->finished.load() && recv->error && recv->error->kind() == ErrorKind::peer_failed,
         "the receive to end: nobody is left who could bring its message");
}

constexpr size_t kLarge = 100'000;

void a_large_message_of_hx_is_taken_where_it_lies() {
  Pair pair;
  int32_t *sent = pair.on_hx(0, kLarge, 7), *got = pair.on_hx(1, kLarge, 0);
  const auto send = pair.post(0, OpCode::send, 1, sent, kLarge, DeviceKind::hx);
  pair.look(0);
  const auto recv = pair.post(1, OpCode::recv, 0, got, kLarge, DeviceKind::hx);
  pair.look(1);
  expect(recv->finished.load() && !recv->error && got[0] == 7 && got[kLarge - 1] == 7, "one look to receive it");
  expect(!send->finished.load(), "the tensor to be lent until the sender has seen that it was taken");
  pair.groups[1]->leave();
  pair.look(0);
  expect(send->finished.load() && !send->error, "the send to end well, though the receiver has left");
}

void a_receive_fails_where_the_sender_had_ended() {
  Pair pair;
  int32_t *sent = pair.on_hx(0, kLarge, 7), *got = pair.on_hx(1, kLarge, 0);
  const auto send = pair.post(0, OpCode::send, 1, sent, kLarge, DeviceKind::hx);
  pair.look(0);
  pair.groups[0]->leave();
  expect(send->finished.load() && send->error, "the send to end with the group");
  std::fill_n(sent, kLarge, 9);  // the user has it back
  bool ended_well = false;
  try {
    const auto recv = pair.post(1, OpCode::recv, 0, got, kLarge, DeviceKind::hx);
    pair.look(1);
    ended_well = !recv->finished.load() || !recv->error;
  } catch (const Error& error) {
    expect(error.kind() == ErrorKind::peer_failed, "a sender that left to be named");
  }
  expect(!ended_well, "no receive to end well with what the sender wrote after the end");
}

void a_timeout_is_named_though_that_rank_has_left() {
  Pair pair;
  Numbers sent{1}, got{0};
  const auto recv = pair.post(0, OpCode::recv, 1, got);
  recv->deadline_ns = 0;
  pair.look(0);
  expect(recv->error && recv->error->kind() == ErrorKind::timeout, "the receive to time out");
  pair.groups[0].reset();
  pair.endpoints[0].reset();
  expect_error(ErrorKind::timeout, {"recv on rank 0 from rank 1", "timed out"},
               [&] { pair.post(1, OpCode::send, 0, sent); });
}

}  // namespace

int main() {
  return run({
      {"a receive takes the message that was sent first", a_receive_takes_the_first_message},
      {"a refused small send is told at the next send", [] { a_refused_send_is_told_at_the_next_call(OpCode::send); }},
      {"a refused small send is told at the next recv", [] { a_refused_send_is_told_at_the_next_call(OpCode::recv); }},
      {"what a post that raises has ended is called back", what_a_raising_post_has_ended_is_called_back},
      {"a receive from any source ends when the sender of what it met leaves",
       [] { a_receive_from_any_source_ends_when_its_sender_leaves(100'000, 1); }},
      {"a receive from any source ends when all others leave",
       [] { a_receive_from_any_source_ends_when_its_sender_leaves(0, 2); }},
      {"a large message of hx is taken where it lies", a_large_message_of_hx_is_taken_where_it_lies},
      {"a receive fails where the sender of a lent tensor had ended", a_receive_fails_where_the_sender_had_ended},
      {"a timeout is named though that rank has left", a_timeout_is_named_though_that_rank_has_left},
  });
}
