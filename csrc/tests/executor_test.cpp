// Unit test of the executor: two ranks run a plan written by hand over plain memory, first step by step on one thread,
// then as two threads that wait for each other. rank_main() is all that a driver must do.
#include "core/executor.h"

#include <cmath>
#include <cstdint>
#include <cstring>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "tests/expect.h"
#include "tests/staged_plan.h"

using namespace hxcomm;
using namespace hxcomm::test;

namespace {

constexpr uint32_t kSeed = 20261124;
constexpr uint64_t kSequence = 41;
using Status = Execution::Status;

// Two ranks of one process: their plans, progress lines, buffers and scratch.
struct Pair {
  Pair(DType dtype_, ReduceOp op_, uint64_t count_) : dtype(dtype_), op(op_), count(count_) {
    std::mt19937 random(kSeed);
    for (int32_t rank : {0, 1}) {
      const auto r = static_cast<size_t>(rank);
      plans[r] = Plan::decode(staged_all_reduce(rank), 1, "staged");
      inputs[r].resize(count * item_size(dtype));
      outputs[r].resize(inputs[r].size(), std::byte{0xa5});
      scratch_memory[r].resize(2 * stride());
      scratch[r] = scratch_memory[r].data();
      line_of[r] = &lines[r];
      for (uint64_t i = 0; i < count; ++i) {
        // Of any magnitude, so that sums round; 32 bits of an int32 are as good.
        const float value =
            std::ldexp(static_cast<float>(static_cast<int32_t>(random())), static_cast<int>(i % 40) - 50);
        std::memcpy(inputs[r].data() + i * 4, &value, 4);
      }
      input_blocks[r] = {inputs[r].data(), count};
      output_blocks[r] = {outputs[r].data(), count};
      inputs_of[r] = &input_blocks[r];
      outputs_of[r] = &output_blocks[r];
    }
  }

  size_t stride() const { return scratch_stride(plans[0], dtype, op, count); }

  Binding binding(size_t rank, uint64_t sequence, uint64_t low, uint64_t high) const {
    return {.plan = &plans[rank],
            .dtype = dtype,
            .reduce_op = op,
            .inputs = inputs_of,
            .outputs = outputs_of,
            .low = low,
            .high = high,
            .scratch = scratch,
            .scratch_stride = stride(),
            .sequence = sequence,
            .lines = line_of};
  }

  DType dtype;
  ReduceOp op;
  uint64_t count;
  Plan plans[2];
  Line lines[2] = {};
  Line* line_of[2] = {};
  std::vector<std::byte> inputs[2], outputs[2], scratch_memory[2];
  Block input_blocks[2], output_blocks[2];
  const Block* inputs_of[2] = {};
  const Block* outputs_of[2] = {};
  std::byte* scratch[2] = {};
};

template <class T>
std::vector<T> values(const std::vector<std::byte>& bytes) {
  std::vector<T> result(bytes.size() / sizeof(T));
  if (!result.empty()) std::memcpy(result.data(), bytes.data(), bytes.size());
  return result;
}

// What every output must be, by a loop that knows nothing of chunks.
template <class T>
std::vector<std::byte> plain_loop(const Pair& pair) {
  const std::vector<T> a = values<T>(pair.inputs[0]), b = values<T>(pair.inputs[1]);
  std::vector<std::byte> result(pair.inputs[0].size());
  for (size_t i = 0; i < a.size(); ++i) {
    T value{};
    if constexpr (std::is_integral_v<T>)
      value = static_cast<T>(static_cast<uint32_t>(a[i]) + static_cast<uint32_t>(b[i]));  // wraps
    else
      value = pair.op == ReduceOp::product ? a[i] * b[i] : pair.op == ReduceOp::avg ? (a[i] + b[i]) / 2 : a[i] + b[i];
    std::memcpy(result.data() + i * sizeof(T), &value, sizeof(T));
  }
  return result;
}

// Sleeps until the line says `value`. Nobody polls: std::atomic waits on a futex.
void wait_for(Line& line, uint64_t value) {
  for (uint64_t seen; (seen = line.progress.load(std::memory_order_acquire)) < value;) line.progress.wait(seen);
}

void arrive(Pair& pair, size_t rank, uint64_t sequence) {
  pair.lines[rank].progress.store(progress_value(sequence, 1), std::memory_order_release);
  pair.lines[rank].progress.notify_all();
}

void rank_main(Pair& pair, size_t rank, const std::vector<uint64_t>& windows) {
  Execution execution;
  for (size_t i = 0; i + 1 < windows.size(); ++i) {
    const uint64_t sequence = kSequence + i;
    execution.start(pair.binding(rank, sequence, windows[i], windows[i + 1]), nullptr);
    for (;;) {
      const Status status = execution.run([&] { pair.lines[rank].progress.notify_all(); });
      if (status == Status::done) break;
      if (status == Status::entering) {
        arrive(pair, rank, sequence);
        wait_for(pair.lines[1 - rank], progress_value(sequence, 1));
        execution.entered();
      } else {
        wait_for(pair.lines[static_cast<size_t>(execution.blocked_on_peer())], execution.blocked_on_value());
      }
    }
  }
}

template <class T>
void expect_plain_loop(DType dtype, ReduceOp op, const std::vector<uint64_t>& windows) {
  Pair pair(dtype, op, windows.back());
  std::thread other(rank_main, std::ref(pair), 1, std::cref(windows));
  rank_main(pair, 0, windows);
  other.join();
  const std::vector<std::byte> want = plain_loop<T>(pair);
  for (size_t rank : {size_t{0}, size_t{1}})
    expect(pair.outputs[rank] == want, std::string("the bits of a plain loop: ") + dtype_name(dtype) + " " +
                                           reduce_op_name(op) + " of " + std::to_string(pair.count) + " elements in " +
                                           std::to_string(windows.size() - 1) + " operations at rank " +
                                           std::to_string(rank) + ", seed " + std::to_string(kSeed));
}

void it_stops_where_it_must_wait_and_says_for_what() {
  Pair pair(DType::float32, ReduceOp::sum, 100);
  Execution a, b;
  int published = 0;
  const auto count = [&] { ++published; };
  a.start(pair.binding(0, kSequence, 0, 100), nullptr);
  b.start(pair.binding(1, kSequence, 0, 100), nullptr);
  expect(a.run(count) == Status::entering && a.run(count) == Status::entering, "rank 0 to stop at ENTER until told");
  expect(std::memcmp(pair.scratch[0], pair.inputs[0].data() + 64 * 4, 36 * 4) == 0, "the other's chunk staged by then");
  expect(pair.lines[0].progress.load() == 0 && published == 0, "nothing published: the arrival is the driver's");
  expect(b.run(count) == Status::entering, "rank 1 to stop at ENTER");
  arrive(pair, 0, kSequence);
  arrive(pair, 1, kSequence);
  a.entered();
  b.entered();

  expect(a.run(count) == Status::blocked && published == 1, "rank 0 to publish round 1 and wait");
  expect(pair.lines[0].progress.load() == progress_value(kSequence, 2), "round 1 of the operation in its line");
  expect(a.blocked_on_peer() == 1 && a.blocked_on_value() == progress_value(kSequence, 2), "round 1 of rank 1 awaited");
  expect(a.run(count) == Status::blocked && published == 1, "no step while rank 1 has not published");
  expect(b.run(count) == Status::done && published == 2, "rank 1 to run to the end");
  expect(a.run(count) == Status::done && published == 2, "rank 0 to go on where it stopped");
  const std::vector<std::byte> want = plain_loop<float>(pair);
  expect(pair.outputs[0] == want && pair.outputs[1] == want, "the sum at both ranks");
}

void a_peer_that_is_operations_ahead_blocks_nobody() {
  Pair pair(DType::float32, ReduceOp::sum, 100);
  Execution a;
  a.start(pair.binding(0, kSequence, 0, 100), nullptr);
  a.run([] {});
  a.entered();
  pair.lines[1].progress.store(progress_value(kSequence + 3, 1));
  expect(a.run([] {}) == Status::done, "one comparison to see that the peer finished long ago");
}

void two_ranks_give_the_bits_of_a_plain_loop() {
  for (uint64_t count : {0u, 1u, 15u, 16u, 17u, 33u, 1000u, 70'001u}) {
    for (ReduceOp op : {ReduceOp::sum, ReduceOp::product, ReduceOp::avg})
      expect_plain_loop<float>(DType::float32, op, {0, count});
    expect_plain_loop<int32_t>(DType::int32, ReduceOp::sum, {0, count});
  }
}

void windows_of_one_buffer_in_the_same_scratch_give_the_same_bits() {
  std::vector<uint64_t> windows = {0, 1, 17, 1000, 1000, 4096};
  for (uint64_t i = 1; i <= 400; ++i) windows.push_back(4096 + 37 * i);
  expect_plain_loop<float>(DType::float32, ReduceOp::sum, windows);
  expect_plain_loop<int32_t>(DType::int32, ReduceOp::sum, windows);
}

void a_hook_runs_every_transfer_in_the_executors_place() {
  struct Counting : TransferHook {
    void run(const Binding&, const Instruction& in) override { reduces.push_back(in.reduce); }
    std::vector<bool> reduces;
  } hook;
  Pair pair(DType::float32, ReduceOp::sum, 100);
  const std::vector<std::byte> before = pair.outputs[0];
  Execution a;
  a.start(pair.binding(0, kSequence, 0, 100), &hook);
  expect(a.run([] {}) == Status::entering, "ENTER to be the driver's all the same");
  a.entered();
  pair.lines[1].progress.store(progress_value(kSequence, 2));
  expect(a.run([] {}) == Status::done, "the end");
  expect(hook.reduces == std::vector<bool>{false, true, false}, "copy, reduce, copy");
  expect(pair.outputs[0] == before, "no memory touched by the executor itself");
}

}  // namespace

int main() {
  return run({
      {"it stops where it must wait and says for what", it_stops_where_it_must_wait_and_says_for_what},
      {"a peer that is operations ahead blocks nobody", a_peer_that_is_operations_ahead_blocks_nobody},
      {"two ranks give the bits of a plain loop", two_ranks_give_the_bits_of_a_plain_loop},
      {"windows of one buffer in the same scratch give the same bits",
       windows_of_one_buffer_in_the_same_scratch_give_the_same_bits},
      {"a hook runs every transfer in the executor's place", a_hook_runs_every_transfer_in_the_executors_place},
  });
}
