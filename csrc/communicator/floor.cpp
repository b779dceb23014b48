#include "communicator/floor.h"

#include <immintrin.h>
#include <sched.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>

#include "core/clock.h"

namespace hxcomm {
namespace {

// Enough that the median leaves out preemption, also of operations so long that a block is one of them.
constexpr int kMaxBlocks = 64;
// A rank that does not take part ends the probe after this long, and the group with it.
constexpr int64_t kTimeoutNs = 60'000'000'000;

// Words that begin where torch's tensors do, at a cache line: the copy from malloc's memory, 16 bytes into one, to
// scratch is another one (core/reduce.cpp) and would not be the floor of what programs do. With a segment they lie in
// it, as tensors of device hx do.
class Buffer {
 public:
  explicit Buffer(uint64_t nbytes, Segment* segment = nullptr) : n_((nbytes + 63) / 64 * 8), segment_(segment) {
    if (segment != nullptr) {
      offset_ = segment->allocate(n_ * sizeof(uint64_t));
      words_ = reinterpret_cast<uint64_t*>(segment->base() + offset_);
    } else {
      words_ = static_cast<uint64_t*>(std::aligned_alloc(64, n_ * sizeof(uint64_t)));
      if (words_ == nullptr)
        throw Error(ErrorKind::usage, "no memory for a buffer of " + std::to_string(nbytes) + " bytes");
    }
    clear();
  }
  ~Buffer() { segment_ != nullptr ? segment_->release(offset_, n_ * sizeof(uint64_t)) : std::free(words_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  void clear() { std::memset(words_, 0, n_ * sizeof(uint64_t)); }
  std::byte* data() const { return reinterpret_cast<std::byte*>(words_); }
  const uint64_t* begin() const { return words_; }
  const uint64_t* end() const { return words_ + n_; }

 private:
  uint64_t n_;
  Segment* segment_;
  size_t offset_ = 0;
  uint64_t* words_ = nullptr;
};

uint64_t read_all(const Buffer& words) {
  uint64_t sum = 0;
  for (const uint64_t word : words) sum += word;
  return sum;
}

double median(std::vector<double> values) {
  const auto middle = values.begin() + static_cast<std::ptrdiff_t>(values.size() / 2);
  std::nth_element(values.begin(), middle, values.end());
  return *middle;
}

// Writes and reads the buffer as a program would; between the two, `between` is called.
template <class Between>
double loop_seconds(Buffer& words, int iterations, bool touched, Between&& between) {
  volatile uint64_t sink = 0;
  const int64_t begin = now_ns();
  for (int i = 0; i < iterations; ++i) {
    if (touched) words.clear();
    between();
    if (touched) sink = sink + read_all(words);
  }
  return static_cast<double>(now_ns() - begin) * 1e-9 / iterations;
}

}  // namespace

Floor::Floor(Group& group) : group_(group), driver_(group.driver_) {
  if (group.has_posted())
    throw Error(ErrorKind::usage,
                "the floor is measured on a group that has nothing pending; wait for what was posted");
}

void Floor::publish(uint64_t value) { group_.own().line.publish(value); }

// Spins and yields as Group::spin does, then sleeps as a group's waiter does, but by the clock: nobody rings. Without
// sleeping two ranks that the scheduler put on one core stay there.
void Floor::wait_for(int rank, uint64_t value) {
  const Line& line = group_.control(rank).line;
  const AbortLine& abort_line = group_.own().abort;
  int64_t deadline = 0;
  for (int64_t i = 0; !line.has_reached(value); ++i) {
    if (abort_line.is_set()) throw *group_.failure(nullptr);
    if (i < group_.spin_pauses_) {
      _mm_pause();
      continue;
    }
    if (i < group_.spin_pauses_ + group_.spin_yields_) {
      sched_yield();
      continue;
    }
    const timespec shortest{0, 1};
    nanosleep(&shortest, nullptr);
    if (deadline == 0) deadline = now_ns() + kTimeoutNs;
    if (now_ns() > deadline)
      group_.abort(AbortCause::timeout, group_.rank(),
                   group_.config_.labels[static_cast<size_t>(rank)] + " does not take part in measuring the floor");
  }
}

void Floor::run_once(const Prepared& p, DType dtype) {
  const int n = group_.config_.world_size;
  for (uint64_t low = 0; low < p.count; low += p.window) {
    const uint64_t sequence = group_.next_sequence_.load(std::memory_order_relaxed);
    group_.next_sequence_.store(sequence + 1, std::memory_order_relaxed);
    Binding binding;
    binding.plan = p.choice.plan.get();
    binding.dtype = dtype;
    binding.reduce_op = ReduceOp::sum;
    binding.inputs = p.block_of.data();
    binding.outputs = p.block_of.data();
    binding.low = low;
    binding.high = low + p.window;
    binding.scratch = p.scratch[sequence & 1].data();
    binding.scratch_stride = p.stride;
    binding.sequence = sequence;
    binding.lines = group_.lines_.data();
    Execution execution;
    execution.start(binding, nullptr);
    execution.run([] {});  // stages
    publish(progress_value(sequence, 1));
    for (int r = 0; r < n; ++r) wait_for(r, progress_value(sequence, 1));
    execution.entered();
    while (execution.run([] {}) == Execution::Status::blocked)
      wait_for(execution.blocked_on_peer(), execution.blocked_on_value());
  }
}

double Floor::all_reduce_seconds(Group& group, uint64_t nbytes, DType dtype, int iterations, bool touched,
                                 DeviceKind device) {
  const uint64_t count = nbytes / item_size(dtype);
  if (count == 0 || iterations < 1)
    throw Error(ErrorKind::usage, "the floor needs at least one element and one iteration, not " +
                                      std::to_string(nbytes) + " bytes and " + std::to_string(iterations));
  Buffer words(nbytes, device == DeviceKind::hx ? &group.endpoint_->segment() : nullptr);
  Prepared prepared;
  prepared.count = count;
  const Block own{words.data(), count};
  Call call;
  call.op = OpCode::all_reduce;
  call.dtype = dtype;
  call.count = count;
  call.device = device;
  call.input.push_back(own);
  call.output.push_back(own);
  call.timeout_ns = kTimeoutNs;
  // Two ordinary operations: they line the ranks up, check that all ask for the same, and leave scratch of this size at
  // both parities of the sequence, at offsets that every rank has published.
  prepared.blocks.resize(static_cast<size_t>(group.world_size()));
  for (int i = 0; i < 2; ++i) {
    const auto op = group.post(call);
    group.wait(op);
    prepared.choice = op->choice;
    prepared.window = op->window;
    for (int r = 0; r < group.world_size(); ++r) {
      const uint64_t offset =
          inputs_at(descriptor_at(group.control(r), group.world_size(), op->first_sequence))->offset;
      prepared.blocks[static_cast<size_t>(r)] = {group.segments_[static_cast<size_t>(r)] + offset, count};
    }
  }
  prepared.blocks[static_cast<size_t>(group.rank())] = own;
  for (const Block& block : prepared.blocks) prepared.block_of.push_back(&block);
  Floor floor(group);
  prepared.stride = scratch_stride(*prepared.choice.plan, dtype, call.reduce_op, prepared.window);
  for (int parity = 0; parity < 2; ++parity)
    for (int r = 0; r < group.world_size(); ++r)
      prepared.scratch[parity].push_back(group.segments_[static_cast<size_t>(r)] +
                                         group.control(r).line.scratch_offset_of(static_cast<uint64_t>(parity)));
  const int n_blocks = std::min(iterations, kMaxBlocks);
  const int each = (iterations + n_blocks - 1) / n_blocks;
  std::vector<double> blocks;
  for (int b = 0; b < n_blocks; ++b) {
    const double touching = touched ? loop_seconds(words, each, true, [] {}) : 0.0;
    if (b == 0 || touched) floor.run_once(prepared, dtype);  // waits for the last rank
    blocks.push_back(loop_seconds(words, each, touched, [&] { floor.run_once(prepared, dtype); }) - touching);
  }
  return std::max(0.0, median(std::move(blocks)));
}

double Floor::hand_over_seconds(Group& group, int iterations) {
  Floor floor(group);
  const uint64_t first = group.next_sequence();
  const auto n = static_cast<uint64_t>(std::max(1, iterations));
  const int rank = group.rank();
  int64_t begin = now_ns();
  for (uint64_t i = 0; i <= n; ++i) {
    if (i == 1) begin = now_ns();  // the first lines the two up
    const uint64_t value = progress_value(first + i, 1);
    if (rank == 0) {
      floor.publish(value);
      if (group.world_size() > 1) floor.wait_for(1, value);
    } else if (rank == 1) {
      floor.wait_for(0, value);
      floor.publish(value);
    }
  }
  const int64_t end = now_ns();
  floor.publish(progress_value(first + n, 1));
  // Nobody may go on to another operation while a peer is still in the one before this: it may read our scratch.
  for (int r = 0; r < group.world_size(); ++r) floor.wait_for(r, progress_value(first, 1));
  group.next_sequence_.store(first + n + 1, std::memory_order_relaxed);
  return rank < 2 && group.world_size() > 1 ? static_cast<double>(end - begin) * 1e-9 / static_cast<double>(n) : 0.0;
}

double copy_seconds(size_t nbytes, int iterations) {
  const Buffer from(std::max<size_t>(nbytes, 1)), to(std::max<size_t>(nbytes, 1));
  const int n_blocks = std::clamp(iterations, 1, kMaxBlocks);
  const int each = (iterations + n_blocks - 1) / n_blocks;
  std::vector<double> blocks;
  for (int b = 0; b < n_blocks; ++b) {
    std::memcpy(to.data(), from.data(), nbytes);
    const int64_t begin = now_ns();
    for (int i = 0; i < each; ++i) {
      std::memcpy(to.data(), from.data(), nbytes);
      asm volatile("" : : "r"(to.data()) : "memory");  // or the compiler keeps one of them
    }
    blocks.push_back(static_cast<double>(now_ns() - begin) * 1e-9 / each);
  }
  return median(std::move(blocks));
}

}  // namespace hxcomm
