// Unit test of windows on one host: what a rank may be taken to have finished while another of its threads puts. Two
// ends of a group in one process.
#include <atomic>
#include <cstring>
#include <exception>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

#include "communicator/group.h"
#include "core/clock.h"
#include "tests/expect.h"

using namespace hxcomm;
using namespace hxcomm::test;

namespace {

constexpr int64_t kDeadlineNs = 20'000'000'000;  // far more than is ever needed: a deadline, not an expectation
constexpr size_t kElements = 64 << 20;           // a put takes milliseconds

// all_gather of two ranks on one host: `hxcomm schedule`'s words for "direct".
std::vector<int32_t> all_gather_words(int32_t rank) {
  if (rank == 0)
    return {0x48585031, 2, 2, 0, 2, 1, 1, 2, 1, 1, 2, 63, 31, -1, 3, 0, 1, 0, 0, 0, 0, 1, 1, 0, 0, 0, 0, 0, 2, 0, 0, 2,
            1,          0, 0, 1, 0, 1, 1, 0, 0, 0, 0, 0,  1,  0,  0, 1, 0, 0, 1, 1, 1, 1, 1, 2, 0, 0, 0, 1, 1, 0, 0};
  return {0x48585031, 2, 2, 1, 2, 1, 1, 2, 1, 1, 2, 63, 31, -1, 3, 0, 1, 0, 0, 0, 0, 1, 1, 1, 0, 0, 0, 1, 2, 0, 0, 2,
          1,          0, 0, 1, 0, 1, 1, 0, 2, 0, 0, 1,  1,  0,  0, 1, 0, 0, 1, 1, 1, 1, 1, 0, 0, 0, 1, 1, 1, 0, 0};
}

// Two ranks on one host, each with a window of kElements bytes.
struct Pair {
  Pair() {
    static uint64_t nonce = 0;
    ++nonce;
    for (size_t r = 0; r < 2; ++r) {
      endpoints.push_back(std::make_shared<Endpoint>(size_t{160} << 20));
      GroupConfig config;
      config.name = "windows";
      config.rank = static_cast<int>(r);
      config.world_size = 2;
      config.labels = {"rank 0", "rank 1"};
      config.nonce = nonce;
      groups.push_back(std::make_shared<Group>(endpoints[r], std::make_shared<Progress>(endpoints[r]), config));
    }
    for (size_t r = 0; r < 2; ++r) {
      const size_t other = 1 - r;
      groups[r]->attach(static_cast<int>(other),
                        endpoints[r]->connect(endpoints[other]->address(), endpoints[other]->nonce(), 20'000),
                        groups[other]->control_offset());
      auto plan = std::make_shared<Plan>(Plan::decode(all_gather_words(static_cast<int32_t>(r)), 11, "direct"));
      groups[r]->start([plan](const ChoiceKey&) { return Choice{plan, 1 << 20}; }, nullptr);
    }
    std::thread other([this] { open(1); });
    open(0);
    other.join();
  }
  ~Pair() {
    for (const auto& group : groups) group->leave();
  }
  void open(size_t rank) {
    Segment& segment = endpoints[rank]->segment();
    memory[rank] = segment.base() + segment.allocate(kElements);
    WindowRequest request;
    request.dtype = DType::int8;
    request.data = memory[rank];
    request.count = kElements;
    request.timeout_ns = kDeadlineNs;
    windows[rank] = groups[rank]->one_sided().open(request);
  }
  void put(const std::vector<std::byte>& data) {  // by rank 0
    Call call;
    call.op = OpCode::put;
    call.root = 1;
    call.window = windows[0]->id;
    call.dtype = DType::int8;
    call.count = data.size();
    call.input.push_back({const_cast<std::byte*>(data.data()), data.size()});
    groups[0]->post(std::move(call));
  }

  std::vector<std::shared_ptr<Endpoint>> endpoints;
  std::vector<std::shared_ptr<Group>> groups;
  std::shared_ptr<Window> windows[2];
  std::byte* memory[2] = {};
};

// A thread of rank 0 puts again and again until that raises. Another one ends the group there, or takes rank 0 out of
// it; once rank 1 has heard that rank 0 stores no more, it uses its memory for something else.
void nothing_is_stored_after(const std::function<void(Group&)>& end) {
  Pair pair;
  const std::vector<std::byte> data(kElements, std::byte{1});
  std::atomic<int> puts{0};
  std::thread putter([&] {
    try {
      for (;;) {
        puts.fetch_add(1);
        pair.put(data);
      }
    } catch (const Error&) {
    }
  });
  while (puts.load() < 2) std::this_thread::yield();
  std::thread ender([&] { end(*pair.groups[0]); });
  const auto is_over = [&] { return pair.groups[1]->not_fenced({0}, /*tell=*/false).empty(); };
  const int64_t deadline = now_ns() + kDeadlineNs;
  while (!is_over() && now_ns() < deadline) pair.groups[0]->try_advance(/*look_at_clock=*/true);
  expect(is_over(), "rank 1 to hear that rank 0 stores no more");
  std::memset(pair.memory[1], 0, kElements);
  putter.join();
  ender.join();
  size_t stored = 0;
  for (size_t i = 0; i < kElements; ++i) stored += pair.memory[1][i] != std::byte{0} ? 1 : 0;
  expect(stored == 0, "no byte to be stored afterwards, but " + std::to_string(stored) + " were");
}

void an_acknowledged_abort_means_that_no_put_goes_on() {
  nothing_is_stored_after([](Group& rank0) { rank0.abort(AbortCause::called, 0, "the test"); });
}

void a_rank_that_has_left_puts_no_more() {
  nothing_is_stored_after([](Group& rank0) { rank0.leave(); });
}

}  // namespace

int main() {
  return run({
      {"an acknowledged abort means that no put goes on", an_acknowledged_abort_means_that_no_put_goes_on},
      {"a rank that has left puts no more", a_rank_that_has_left_puts_no_more},
  });
}
