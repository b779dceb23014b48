// Streams of operations on several groups at once, for the sanitizers (scripts/sanitize.sh): ranks are threads of one
// process, each with an endpoint, a watcher and a background thread of its own, and two threads that call. Every result
// is compared with what it must be. At the end one group is aborted and another left while its peers need it.
//
// Usage: stress PLANS [steps] [seed]. PLANS is a file with a plan a line: op, world size, rank, root, algorithm, hash,
// number of words, words.
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdio>
#include <fstream>
#include <map>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <sstream>
#include <string>
#include <thread>
#include <tuple>
#include <vector>

#include "communicator/group.h"
#include "tests/expect.h"

#ifdef __SANITIZE_THREAD__
// TSan knows memory by its address, so ranks must see each other's at the same one: a segment is mapped once, however
// often it is asked for. Linked with --wrap.
extern "C" {
void* __real_mmap(void* address, size_t nbytes, int protection, int flags, int fd, off_t offset);
int __real_munmap(void* address, size_t nbytes);

namespace {
struct Shared {
  void* base;
  int users;
};
std::mutex shared_mutex;
std::map<ino_t, Shared> shared;  // by memfd
}  // namespace

void* __wrap_mmap(void* address, size_t nbytes, int protection, int flags, int fd, off_t offset) {
  struct stat file;
  if ((flags & MAP_SHARED) == 0 || fstat(fd, &file) != 0)
    return __real_mmap(address, nbytes, protection, flags, fd, offset);
  const std::lock_guard lock(shared_mutex);
  Shared& entry = shared[file.st_ino];
  if (entry.users++ == 0) entry.base = __real_mmap(address, nbytes, protection, flags, fd, offset);
  return entry.base;
}

int __wrap_munmap(void* address, size_t nbytes) {
  const std::lock_guard lock(shared_mutex);
  for (auto it = shared.begin(); it != shared.end(); ++it)
    if (it->second.base == address) {
      if (--it->second.users > 0) return 0;
      shared.erase(it);
      break;
    }
  return __real_munmap(address, nbytes);
}
}
#endif

using namespace hxcomm;
using namespace hxcomm::test;

namespace {

constexpr size_t kSegmentBytes = 16 << 20;
constexpr uint64_t kWindowBytes = 4096;  // so that long calls take several windows
constexpr int kTimeoutMs = 20'000;
constexpr int64_t kTimeoutNs = 60'000'000'000;
constexpr int kManyOperations = 1000;
constexpr unsigned kLimitS = 240;

using PlanKey = std::tuple<OpCode, int, int, int>;  // op, world size, rank, root
std::map<PlanKey, std::vector<std::shared_ptr<const Plan>>> plans;

OpCode op_named(const std::string& name) {
  for (int code = 0; code < kOpCodes; ++code)
    if (name == op_name(static_cast<OpCode>(code))) return static_cast<OpCode>(code);
  throw Error(ErrorKind::usage, "a plan of the unknown op '" + name + "'");
}

void read_plans(const char* path) {
  std::ifstream file(path);
  std::string line, op, algorithm;
  int world_size = 0, rank = 0, root = 0;
  uint64_t hash = 0;
  size_t n = 0;
  while (std::getline(file, line)) {
    std::istringstream fields(line);
    fields >> op >> world_size >> rank >> root >> algorithm >> hash >> n;
    std::vector<int32_t> words(n);
    for (int32_t& word : words) fields >> word;
    plans[{op_named(op), world_size, rank, root}].push_back(
        std::make_shared<Plan>(Plan::decode(std::move(words), hash, algorithm)));
  }
  if (plans.empty()) throw Error(ErrorKind::usage, std::string("no plans in ") + path);
}

Planner planner_of(int world_size, int rank) {
  return [world_size, rank](const ChoiceKey& key) -> Choice {
    const auto& known = plans.at({key.op, world_size, rank, key.root});
    return {known[key.nbytes / 4 % known.size()], kWindowBytes};
  };
}

struct Process {
  std::shared_ptr<Endpoint> endpoint = std::make_shared<Endpoint>(kSegmentBytes);
  std::shared_ptr<Progress> progress = std::make_shared<Progress>(endpoint);
};

using Groups = std::vector<std::shared_ptr<Group>>;  // by rank; null where a process is not in it

Groups make_group(const std::vector<Process>& processes, const std::vector<size_t>& members, const std::string& name) {
  static uint64_t nonce = 0;
  ++nonce;
  const int world_size = static_cast<int>(members.size());
  Groups groups(processes.size());
  for (int rank = 0; rank < world_size; ++rank) {
    const Process& process = processes[members[static_cast<size_t>(rank)]];
    GroupConfig config;
    config.name = name;
    config.rank = rank;
    config.world_size = world_size;
    for (int r = 0; r < world_size; ++r) config.labels.push_back("rank " + std::to_string(r));
    config.nonce = nonce;
    groups[members[static_cast<size_t>(rank)]] = std::make_shared<Group>(process.endpoint, process.progress, config);
  }
  for (const size_t me : members)
    for (int rank = 0; rank < world_size; ++rank) {
      const size_t other = members[static_cast<size_t>(rank)];
      if (other == me) continue;
      const Endpoint& there = *processes[other].endpoint;
      groups[me]->attach(rank, processes[me].endpoint->connect(there.address(), there.nonce(), kTimeoutMs),
                         groups[other]->control_offset());
    }
  for (const size_t me : members) groups[me]->start(planner_of(world_size, groups[me]->rank()), nullptr);
  return groups;
}

// One call of one rank, with what it must give.
struct Request {
  std::vector<int32_t> input, output, want;
  std::shared_ptr<Op> op;
  std::atomic<int> ended{0};
};

int32_t element(int rank, int step, uint64_t i) {
  return rank * 1'000'000 + step * 1000 + static_cast<int32_t>(i % 997);
}

// The `step`th operation of a group: the same for all ranks, drawn from the group's own random numbers.
Call call_of(const Group& group, int step, std::mt19937& random, Request& request) {
  static constexpr OpCode kOps[] = {OpCode::all_reduce, OpCode::all_reduce, OpCode::all_reduce,
                                    OpCode::broadcast,  OpCode::all_gather, OpCode::barrier};
  static constexpr uint64_t kCounts[] = {0, 1, 17, 500, 3001};
  const int n = group.world_size(), me = group.rank();
  Call call;
  call.op = kOps[random() % std::size(kOps)];
  call.count = call.op == OpCode::barrier ? 0 : kCounts[random() % std::size(kCounts)];
  const int root = static_cast<int>(random() % static_cast<unsigned>(n));
  if (call.op == OpCode::broadcast) call.root = root;
  call.dtype = DType::int32;
  call.timeout_ns = kTimeoutNs;
  if (call.op == OpCode::barrier) return call;

  const int blocks = call.op == OpCode::all_gather ? n : 1;
  for (uint64_t i = 0; i < call.count; ++i) request.input.push_back(element(me, step, i));
  request.output.resize(call.count * static_cast<uint64_t>(blocks));
  for (int b = 0; b < blocks; ++b)
    for (uint64_t i = 0; i < call.count; ++i) {
      int32_t value = element(call.op == OpCode::broadcast ? root : b, step, i);
      for (int r = 1; call.op == OpCode::all_reduce && r < n; ++r) value += element(r, step, i);
      request.want.push_back(value);
    }
  if (call.op == OpCode::broadcast) request.output = request.input;  // in place: the root stores nothing
  auto& from = call.op == OpCode::broadcast ? request.output : request.input;
  call.input.push_back({reinterpret_cast<std::byte*>(from.data()), call.count});
  for (int b = 0; b < blocks; ++b)
    call.output.push_back(
        {reinterpret_cast<std::byte*>(request.output.data() + static_cast<uint64_t>(b) * call.count), call.count});
  return call;
}

std::mutex expect_mutex;
void check(bool holds, const std::string& what) {
  const std::lock_guard lock(expect_mutex);
  expect(holds, what);
}

void finish(Group& group, Request& request) {
  group.wait(request.op);
  check(request.output == request.want, std::string("another result of ") + op_name(request.op->call.op) + " #" +
                                            std::to_string(request.op->first_sequence) + " of group " + group.name() +
                                            " at rank " + std::to_string(group.rank()));
}

using Pending = std::vector<std::pair<Group*, std::unique_ptr<Request>>>;

// Posts the call that `make` returns for a new request, which it may fill.
template <class Make>
Request& post(Group& group, Pending& pending, Make&& make) {
  auto request = std::make_unique<Request>();
  const Call call = make(*request);
  std::atomic<int>& ended = request->ended;
  request->op = group.post(call, [&ended](const Error* error) { ended += error == nullptr ? 1 : 100; });
  pending.emplace_back(&group, std::move(request));
  return *pending.back().second;
}

// A message to the next rank and one from the rank before, small or in pieces.
void post_messages(Group& group, int step, std::mt19937& random, Pending& pending) {
  static constexpr uint64_t kCounts[] = {0, 17, 3001, 20'000};
  const uint64_t count = kCounts[random() % std::size(kCounts)];
  const int n = group.world_size(), me = group.rank(), last = (me + n - 1) % n;
  const auto message = [&](OpCode op, int peer, std::vector<int32_t>& memory) {
    Call call;
    call.op = op;
    call.root = peer;
    call.tag = step;
    call.count = count;
    call.dtype = DType::int32;
    call.timeout_ns = kTimeoutNs;
    (op == OpCode::send ? call.input : call.output).push_back({reinterpret_cast<std::byte*>(memory.data()), count});
    return call;
  };
  post(group, pending, [&](Request& request) {
    request.output.resize(count);
    for (uint64_t i = 0; i < count; ++i) request.want.push_back(element(last, step, i));
    return message(OpCode::recv, last, request.output);
  });
  post(group, pending, [&](Request& request) {
    for (uint64_t i = 0; i < count; ++i) request.input.push_back(element(me, step, i));
    return message(OpCode::send, (me + 1) % n, request.input);
  });
}

// A thread that calls operations of the given groups in turn, asynchronously but for every third, and waits for the
// pending ones of a round in an order of its own.
void stream(const std::vector<std::shared_ptr<Group>>& groups, int steps, unsigned seed) {
  std::vector<std::mt19937> random;
  for (size_t g = 0; g < groups.size(); ++g) random.emplace_back(seed + g);
  std::mt19937 own(seed * 100 + static_cast<unsigned>(groups[0]->rank()));
  for (int step = 0; step < steps; step += 3) {
    Pending pending;
    for (int i = step; i < step + 3; ++i)
      for (size_t g = 0; g < groups.size(); ++g) {
        Group& group = *groups[g];
        if (i % 3 == 1) post_messages(group, i, random[g], pending);
        Request& request = post(group, pending, [&](Request& fresh) { return call_of(group, i, random[g], fresh); });
        if (i % 3 == 2)
          finish(group, request);
        else
          group.advance_in_background();
      }
    std::shuffle(pending.begin(), pending.end(), own);
    for (auto& [group, request] : pending) finish(*group, *request);
    for (auto& [group, request] : pending) {
      // Whoever finished the op calls back after that: it may be another thread.
      while (request->ended == 0) std::this_thread::yield();
      check(request->ended == 1, "on_finish to be called once, without an error");
    }
  }
}

// Calls one operation after another, so many or until the group ends.
void run_operations(Group& group, int n) {
  std::mt19937 random(1);
  for (int step = 0; step < n; ++step) {
    Request request;
    request.op = group.post(call_of(group, step, random, request));
    group.wait(request.op);
  }
}

void expect_end(Group& group, ErrorKind kind, const std::string& part) {
  try {
    run_operations(group, kManyOperations);
    check(false, "an error, but nothing was thrown");
  } catch (const Error& error) {
    check(error.kind() == kind && error.message().find(part) != std::string::npos,
          "'" + part + "' in the message: " + error.message());
  }
}

void rank_main(const std::vector<Groups>& groups, size_t me, int steps, unsigned seed) {
  const Groups &first = groups[0], &second = groups[1], &third = groups[2], &pair = groups[3];
  std::thread other([&] {
    stream({third[me]}, steps, seed + 10);
    if (pair[me]) stream({pair[me]}, steps, seed + 20);
  });
  stream({first[me], second[me]}, steps, seed + 30);
  other.join();
  if (me + 1 == first.size()) {
    run_operations(*first[me], 3);
    first[me]->abort(AbortCause::called, first[me]->rank(), "the end of the stress");
    run_operations(*second[me], 3);
    second[me]->leave();
  } else {
    expect_end(*first[me], ErrorKind::aborted, "the end of the stress");
    expect_end(*second[me], ErrorKind::peer_failed, "has left the group");
  }
  for (const Groups& group : groups)
    if (group[me]) group[me]->leave();
}

void stress(size_t n, int steps, unsigned seed) {
  const std::vector<Process> processes(n);
  std::vector<size_t> all(n);
  std::iota(all.begin(), all.end(), 0);
  const std::vector<size_t> reversed(all.rbegin(), all.rend());
  std::vector<Groups> groups = {make_group(processes, all, "first"), make_group(processes, all, "second"),
                                make_group(processes, reversed, "third"), make_group(processes, {0, n - 1}, "pair")};
  std::vector<std::thread> ranks;
  for (size_t me = 0; me < n; ++me)
    ranks.emplace_back([&, me] {
      try {
        rank_main(groups, me, steps, seed);
      } catch (const Error& error) {
        check(false, "no error at rank " + std::to_string(me) + ": " + error.message());
      }
    });
  for (std::thread& rank : ranks) rank.join();
}

int steps = 60;
unsigned seed = 1;

}  // namespace

int main(int argc, char** argv) {
  if (argc < 2) {
    std::fprintf(stderr, "usage: %s PLANS [steps] [seed]\n", argv[0]);
    return 2;
  }
  if (argc > 2) steps = std::stoi(argv[2]);
  if (argc > 3) seed = static_cast<unsigned>(std::stoul(argv[3]));
  alarm(kLimitS);  // nothing may hang
  std::printf("%d steps, seed %u\n", steps, seed);
  read_plans(argv[1]);
  return run({
      {"two ranks on four groups", [] { stress(2, steps, seed); }},
      {"three ranks on four groups", [] { stress(3, steps, seed); }},
      {"four ranks on four groups", [] { stress(4, steps, seed); }},
  });
}
