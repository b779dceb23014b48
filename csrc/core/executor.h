// The executor: runs one rank's plan over mapped memory. Wait, transfer, publish.
//
// It is resumable: run() goes on until it reaches ENTER or END or must wait for a peer, and says which; whoever drives
// it decides how to wait. It knows memory and progress lines, and nothing of operations, groups, torch or Python.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "core/failpoint.h"
#include "core/line.h"
#include "core/plan.h"
#include "core/reduce.h"
#include "core/types.h"

namespace hxcomm {

struct Block {
  std::byte* data = nullptr;
  uint64_t count = 0;  // elements
};

// What a plan's messages to and from other hosts travel in. The executor knows no transport; whoever runs it gives it
// this. Numbers are those of the plan: of the message among all that its receiver gets.
class Messages {
 public:
  virtual ~Messages() = default;
  // The payload of a message to this rank; null until it has arrived.
  virtual const std::byte* arrived(uint32_t number) = 0;
  // Memory for one payload, whole until the next call; what send() sends, to one rank or several.
  virtual std::byte* outgoing(size_t nbytes) = 0;
  virtual void send(int peer, uint32_t number) = 0;
  // Sends memory of this rank without a copy where that pays; false: use outgoing(). It may be written to again once
  // nothing is lent.
  virtual bool lend(int peer, uint32_t number, const std::byte* data, size_t nbytes) = 0;
  virtual bool lends() = 0;
  virtual bool agreed() = 0;  // all hosts make this very call; throws where they do not
};

// Where one plan finds its memory for one operation (one segment of a long one).
struct Binding {
  const Plan* plan = nullptr;
  DType dtype{};
  ReduceOp reduce_op{};
  double factor = 1;  // PREMUL_SUM: this rank's own
  // By rank, the blocks of its input and output; valid for this rank from the start, for peers from ENTER on and only
  // where the plan is mapped.
  const Block* const* inputs = nullptr;
  const Block* const* outputs = nullptr;
  uint64_t low = 0, high = 0;           // the window of every block, in elements
  std::byte* const* scratch = nullptr;  // [world_size] base of each rank's scratch, valid for peers from ENTER on
  size_t scratch_stride = 0;            // bytes from one scratch chunk to the next
  uint64_t sequence = 0;
  Line* const* lines = nullptr;   // [world_size]
  Messages* messages = nullptr;   // where the plan crosses hosts
  std::byte* outgoing = nullptr;  // what the transfer that is running stores messages to
};

// Bytes from one scratch chunk to the next for a window of `window` elements: the largest chunk, in the accumulation
// type where partial results lie there, rounded up to cache lines.
size_t scratch_stride(const Plan& plan, DType dtype, ReduceOp reduce_op, uint64_t window);

// Resolves a location to memory. What the Python executor calls, too.
std::byte* resolve(const Binding& binding, const Operand& operand);
uint64_t transfer_count(const Binding& binding, const Instruction& instruction);

// PREMUL_SUM. Only a rank knows its own factor, so contributions are multiplied by their owner: where it reads its
// input in a reduction, and where it copies it to its scratch, which then holds products in the accumulation type.
// Whoever reads a contribution in scratch takes it as a partial result. So 16-bit results still round once.
bool is_partial(const Binding& binding, const Operand& operand);  // lies in the accumulation type
bool is_scaled(const Binding& binding, const Operand& operand);   // a source to be multiplied by this rank's factor
bool is_reduction(const Binding& binding, const Instruction& instruction);  // a copy that multiplies is one

// Runs a transfer some other way (HXCOMM_EXECUTOR=python); null for the native loop.
struct TransferHook {
  virtual ~TransferHook() = default;
  virtual void run(const Binding& binding, const Instruction& instruction) = 0;
};

class Execution {
 public:
  enum class Status { entering, blocked, done };

  void start(const Binding& binding, TransferHook* hook) {
    binding_ = binding;
    hook_ = hook;
    at_ = 0;
  }
  // Runs on. At ENTER it stops with `entering`; the driver publishes, gathers everyone's arrival, and calls
  // entered() once before the next run(). A publish that may wake somebody calls `published`.
  template <class Published>
  Status run(Published&& published);
  void entered() { ++at_; }
  int blocked_on_peer() const { return binding_.plan->instructions[at_].peer; }
  uint64_t blocked_on_value() const {
    return progress_value(binding_.sequence, uint64_t{binding_.plan->instructions[at_].round} + 1);
  }
  Instruction::Code blocked_at() const { return binding_.plan->instructions[at_].code; }
  uint32_t blocked_on_message() const { return binding_.plan->instructions[at_].number; }
  const Binding& binding() const { return binding_; }

 private:
  void transfer(const Instruction& instruction);
  void compute(const Instruction& instruction, uint64_t count) const;
  bool send_in_place(const Instruction& instruction, uint64_t count);
  const Operand* destinations_of(const Instruction& instruction) const {
    return &binding_.plan->operands[instruction.first_operand + instruction.n_sources];
  }
  // Memory that is lent may not be overwritten, by this rank or by one that learns that it was read.
  bool must_keep_lent() const { return binding_.messages != nullptr && binding_.messages->lends(); }

  Binding binding_;
  TransferHook* hook_ = nullptr;
  size_t at_ = 0;
};

template <class Published>
Execution::Status Execution::run(Published&& published) {
  for (;; ++at_) {
    const Instruction& in = binding_.plan->instructions[at_];
    switch (in.code) {
      case Instruction::Code::transfer:
        if (in.stores && must_keep_lent()) return Status::blocked;
        transfer(in);
        failpoint(Failpoint::transfer);
        break;
      case Instruction::Code::wait:
        if (!binding_.lines[in.peer]->has_reached(blocked_on_value())) return Status::blocked;
        break;
      case Instruction::Code::receive:
        if (binding_.messages->arrived(in.number) == nullptr) return Status::blocked;
        break;
      case Instruction::Code::agree:
        if (!binding_.messages->agreed()) return Status::blocked;
        break;
      case Instruction::Code::publish:
        if (must_keep_lent()) return Status::blocked;
        binding_.lines[binding_.plan->rank]->publish(progress_value(binding_.sequence, uint64_t{in.round} + 1));
        published();
        failpoint(Failpoint::published);
        break;
      case Instruction::Code::enter:
        return Status::entering;
      case Instruction::Code::end:
        return Status::done;
    }
  }
}

}  // namespace hxcomm
