// Unit test of windows across hosts: what a rank does with frames that no rank of ours would send, and how many it
// sends to one that takes none. Two ends of a group in one process, joined by their wires; one of them forges.
// Arguments: libraries to load first.
#include <cstring>
#include <exception>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "communicator/group.h"
#include "tests/wire_host.h"

using namespace hxcomm;
using namespace hxcomm::test;

namespace {

constexpr uint32_t kPut = 0, kSignal = 1, kCredit = 2;  // as in one_sided.cpp
constexpr size_t kElements = 4 << 20, kGuard = 1 << 16;
constexpr int8_t kUntouched = 0x5A;

// all_gather of two ranks on two hosts: `hxcomm schedule`'s words for "direct".
std::vector<int32_t> all_gather_words(int32_t rank) {
  std::vector<int32_t> words{0x48585031, 2, 2, rank, 3, 1, 1, 2, 1, 0, 18, 67, 16, -1, 3, 1};
  const std::vector<int32_t> steps =
      rank == 0 ? std::vector<int32_t>{2, 1, 0, 0, 0, 0, 1, 1, 0, 0, 0, 0, 1, 3, 0, 0, 6, 1, 0, 0, 1, 0, 1, 1, 0, 0,
                                       0, 0, 0, 1, 0, 0, 5, 1, 0, 1, 0, 0, 1, 1, 1, 1, 0, 3, 0, 0, 0, 1, 1, 0, 0}
                : std::vector<int32_t>{2, 1, 0, 0, 0, 0, 1, 1, 1, 0, 0, 0, 0, 3, 0, 0, 5, 0, 0, 6, 1, 0, 0, 1, 0, 1,
                                       1, 1, 3, 0, 0, 1, 1, 0, 0, 1, 0, 0, 1, 1, 1, 1, 1, 0, 0, 0, 1, 1, 1, 0, 0};
  words.insert(words.end(), steps.begin(), steps.end());
  return words;
}

// Two ranks on two hosts with a window of kElements bytes each, in the middle of memory that is not part of it.
struct Pair {
  Pair() {
    static uint64_t nonce = 100;
    ++nonce;
    for (int r = 0; r < 2; ++r) {
      endpoints.push_back(std::make_shared<Endpoint>(64 << 20));
      endpoints.back()->open_wire("127.0.0.1", security_of(WireSecurity::Mode::none, 1));
    }
    for (int r = 0; r < 2; ++r) wire(r).connect(endpoints[at(1 - r)]->nonce(), wire(1 - r).address());
    expect(until([&] { return wire(0).is_connected(nonce_of(1)) && wire(1).is_connected(nonce_of(0)); }),
           "a connection");
    for (int r = 0; r < 2; ++r) {
      GroupConfig config;
      config.name = "windows";
      config.rank = r;
      config.world_size = 2;
      config.labels = {"rank 0", "rank 1"};
      config.nonce = nonce;
      progress.push_back(std::make_shared<Progress>(endpoints[at(r)]));
      groups.push_back(std::make_shared<Group>(endpoints[at(r)], progress.back(), config));
      groups.back()->cross({0, 1}, {nonce_of(0), nonce_of(1)});
      auto plan = std::make_shared<Plan>(Plan::decode(all_gather_words(r), 11, "direct"));
      groups.back()->start([plan](const ChoiceKey&) { return Choice{plan, 1 << 20}; }, nullptr);
    }
    both([this](int r) {
      Segment& segment = endpoints[at(r)]->segment();
      const uint64_t offset = segment.allocate(kGuard + kElements + kGuard);
      memory[r] = reinterpret_cast<int8_t*>(segment.base() + offset);
      std::memset(memory[r], kUntouched, kGuard + kElements + kGuard);
      WindowRequest request;
      request.dtype = DType::int8;
      request.data = reinterpret_cast<std::byte*>(memory[r] + kGuard);
      request.count = kElements;
      request.timeout_ns = kDeadlineNs;
      windows[r] = groups[at(r)]->one_sided().open(request);
    });
  }
  ~Pair() {
    for (const auto& group : groups) group->leave();
    for (const auto& each : progress) each->stop_background();  // or its thread may be the last to hold its group
  }
  static size_t at(int rank) { return static_cast<size_t>(rank); }
  Wire& wire(int rank) { return *endpoints[at(rank)]->wire(); }
  const Nonce& nonce_of(int rank) { return endpoints[at(rank)]->nonce(); }

  bool until(const std::function<bool()>& done) {
    const int64_t deadline = now_ns() + kDeadlineNs;
    while (!done()) {
      if (now_ns() > deadline) return false;
      for (int r = 0; r < 2; ++r) {
        wire(r).pump();
        if (groups.size() == 2) groups[at(r)]->try_advance(/*look_at_clock=*/true);
      }
    }
    return true;
  }
  // On both ranks at once.
  void both(const std::function<void(int)>& act) {
    std::exception_ptr errors[2];
    const auto guarded = [&](int r) {
      try {
        act(r);
      } catch (...) {
        errors[r] = std::current_exception();
      }
    };
    std::thread other(guarded, 1);
    guarded(0);
    other.join();
    for (const auto& error : errors)
      if (error) std::rethrow_exception(error);
  }
  std::shared_ptr<Op> post(int rank, OpCode op, std::vector<int8_t>* data = nullptr, uint64_t offset = 0) {
    Call call;
    call.op = op;
    call.root = 1 - rank;
    call.window = windows[rank]->id;
    call.offset = offset;
    call.dtype = DType::int8;
    call.timeout_ns = kDeadlineNs;
    if (data != nullptr) {
      call.count = data->size();
      call.input.push_back({reinterpret_cast<std::byte*>(data->data()), data->size()});
    }
    return groups[at(rank)]->post(std::move(call));
  }
  // Rank 1 says something of a window to rank 0.
  void forge(uint32_t what, uint64_t window, uint64_t aux, size_t nbytes, int32_t source = 1) {
    FrameHeader header;
    header.type = FrameType::window;
    header.group = nonce_of_group();
    header.sequence = window;
    header.number = what;
    header.aux = aux;
    header.source = source;
    header.destination = 0;
    const std::vector<int8_t> payload(nbytes, 0x11);
    expect(wire(1).send(nonce_of(0), header, payload.data(), payload.size()), "the frame to be sent");
  }
  uint64_t nonce_of_group() {
    auto& control = *reinterpret_cast<Control*>(endpoints[0]->segment().base() + groups[0]->control_offset());
    return control.line.membership.load();
  }
  bool is_untouched(int rank, size_t from, size_t to) const {
    for (size_t i = from; i < to; ++i)
      if (memory[rank][i] != kUntouched) return false;
    return true;
  }

  std::vector<std::shared_ptr<Endpoint>> endpoints;
  std::vector<std::shared_ptr<Progress>> progress;
  std::vector<std::shared_ptr<Group>> groups;
  std::shared_ptr<Window> windows[2];
  int8_t* memory[2] = {};
};

void puts_and_signals_arrive_in_order() {
  Pair pair;
  std::vector<int8_t> first(kElements, 1), second(kPieceBytes + 1, 2);
  const auto waiting = pair.post(0, OpCode::wait_signal);
  pair.post(1, OpCode::put, &first);
  pair.post(1, OpCode::put, &second, 7);
  pair.post(1, OpCode::signal);
  expect(pair.until([&] { return waiting->finished.load(); }) && !waiting->error, "the wait to end well");
  const int8_t* window = pair.memory[0] + kGuard;
  expect(window[6] == 1 && window[7] == 2 && window[7 + kPieceBytes] == 2 && window[8 + kPieceBytes] == 1,
         "the second put over the first");
  expect(pair.is_untouched(0, 0, kGuard) && pair.is_untouched(0, kGuard + kElements, 2 * kGuard + kElements),
         "nothing outside to be written");
  pair.both([&](int r) { pair.groups[Pair::at(r)]->one_sided().close(pair.windows[r], kDeadlineNs); });
}

void a_rank_that_takes_nothing_is_sent_no_more_than_its_credits() {
  Pair pair;
  std::vector<int8_t> data(kElements, 1);
  // 8 frames a put, so three puts are more than there are credits.
  static_assert(kElements / kPieceBytes * 3 > kWindowCredits && kElements / kPieceBytes * 2 <= kWindowCredits);
  pair.progress[0]->stop_background();
  std::vector<std::shared_ptr<Op>> puts;
  for (int i = 0; i < 3; ++i) puts.push_back(pair.post(1, OpCode::put, &data));
  expect(puts[1]->finished.load() && !puts[2]->finished.load(), "what goes beyond the credits to wait");
  expect(pair.windows[1]->parts[0].framed == kWindowCredits, "as many frames as credits");
  expect(pair.until([&] { return puts[2]->finished.load(); }) && !puts[2]->error, "the rest to follow");
}

// A frame may be slower than the ranks' agreement to close, which goes another way where hosts have several ranks.
void closing_waits_for_what_was_put() {
  Pair pair;
  ++pair.windows[1]->parts[0].framed;  // one that is still on its way
  std::thread here([&] { pair.groups[0]->one_sided().close(pair.windows[0], kDeadlineNs); });
  pair.groups[1]->one_sided().close(pair.windows[1], kDeadlineNs);
  pair.forge(kPut, pair.windows[0]->id, 5, 1);
  here.join();
  expect(pair.memory[0][kGuard + 5] == 0x11, "it to be there when the window is closed");
}

// What ends the group says who, what and where; nothing is written.
void a_wrong_frame_ends_the_group(uint32_t what, uint64_t aux, size_t nbytes, const std::string& says) {
  Pair pair;
  const auto waiting = pair.post(0, OpCode::wait_signal);
  pair.forge(what, pair.windows[0]->id, aux, nbytes);
  expect(pair.until([&] { return waiting->finished.load(); }), "the wait to end");
  expect(waiting->error && waiting->error->kind() == ErrorKind::aborted &&
             waiting->error->message().find("rank 1 put " + says) != std::string::npos,
         "an error that says '" + says + "', not '" + (waiting->error ? waiting->error->message() : "none") + "'");
  expect(pair.is_untouched(0, 0, 2 * kGuard + kElements), "nothing to be written");
}

void what_belongs_to_no_window_here_is_ignored() {
  Pair pair;
  const auto waiting = pair.post(0, OpCode::wait_signal);
  for (const uint64_t window : {uint64_t{0}, pair.windows[0]->id + 1, UINT64_MAX}) {
    pair.forge(kPut, window, 0, 100);
    pair.forge(kSignal, window, 0, 0);
  }
  pair.forge(kPut, pair.windows[0]->id, 0, 100, /*source=*/0);  // in another rank's name
  pair.forge(kPut, pair.windows[0]->id, 0, 100, /*source=*/7);
  pair.forge(kCredit, 0, UINT64_MAX, 0);
  pair.forge(kCredit, 0, 0, 0);
  pair.post(1, OpCode::signal);
  expect(pair.until([&] { return waiting->finished.load(); }) && !waiting->error, "the group to go on");
  expect(pair.is_untouched(0, 0, 2 * kGuard + kElements), "nothing to be written");
}

}  // namespace

int main(int argc, char** argv) {
  load_libraries(argc, argv);
  constexpr uint64_t kEnd = kElements;
  static const auto wrong = [](uint32_t what, uint64_t aux, size_t nbytes, const std::string& says) {
    a_wrong_frame_ends_the_group(what, aux, nbytes, says);
  };
  return run({
      {"puts and signals arrive in order", puts_and_signals_arrive_in_order},
      {"a rank that takes nothing is sent no more than its credits",
       a_rank_that_takes_nothing_is_sent_no_more_than_its_credits},
      {"closing waits for what was put", closing_waits_for_what_was_put},
      {"a put one byte beyond the window", [] { wrong(kPut, kEnd - 7, 8, "8 bytes at byte 4194297 of 4194304"); }},
      {"a put far beyond it", [] { wrong(kPut, UINT64_MAX - 3, 4, "4 bytes at byte 18446744073709551612"); }},
      {"a put before it", [] { wrong(kPut, uint64_t{0} - kGuard, kGuard, "65536 bytes at byte"); }},
      {"a put as long as a frame", [] { wrong(kPut, 1, kMaxPayloadBytes, "4194304 bytes at byte 1 of"); }},
      {"a signal with a payload", [] { wrong(kSignal, 0, 8, "something else than puts and signals"); }},
      {"something that is neither", [] { wrong(77, 0, 8, "something else than puts and signals"); }},
      {"what belongs to no window here is ignored", what_belongs_to_no_window_here_is_ignored},
  });
}
