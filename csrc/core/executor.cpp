#include "core/executor.h"

#include <algorithm>

namespace hxcomm {
namespace {

// Operands of one transfer that are resolved on the stack; a wider one (more than 32 ranks) takes the heap.
constexpr size_t kInlineOperands = 64;

bool is_users(const Operand& operand) {
  return operand.buffer == BufferKind::input || operand.buffer == BufferKind::output;
}

size_t each_of(const Binding& b, const Operand& operand) {
  return is_partial(b, operand) ? accumulation_size(b.dtype) : item_size(b.dtype);
}

}  // namespace

size_t scratch_stride(const Plan& plan, DType dtype, ReduceOp reduce_op, uint64_t window) {
  uint64_t elements = 0;
  if (plan.input.blocks > 0) elements = std::max(elements, piece_elements(window, plan.input.pieces));
  if (plan.output.blocks > 0) elements = std::max(elements, piece_elements(window, plan.output.pieces));
  const bool wide = plan.partials || reduce_op == ReduceOp::premul_sum;
  const size_t each = wide ? accumulation_size(dtype) : item_size(dtype);
  return (elements * each + 63) / 64 * 64;
}

std::byte* resolve(const Binding& b, const Operand& operand) {
  if (operand.buffer == BufferKind::scratch)
    return b.scratch[operand.rank] + static_cast<size_t>(operand.chunk) * b.scratch_stride;
  if (operand.buffer == BufferKind::message) {
    if (operand.rank != b.plan->rank) return b.outgoing;
    return const_cast<std::byte*>(b.messages->arrived(static_cast<uint32_t>(operand.chunk)));  // a source: only read
  }
  const bool input = operand.buffer == BufferKind::input;
  const int32_t pieces = (input ? b.plan->input : b.plan->output).pieces;
  const Block& block = (input ? b.inputs : b.outputs)[operand.rank][operand.chunk / pieces];
  return block.data + piece_of(block.count, b.low, b.high, pieces, operand.chunk % pieces).begin * item_size(b.dtype);
}

uint64_t transfer_count(const Binding& b, const Instruction& in) {
  const bool input = in.count_buffer == BufferKind::input;
  const int32_t pieces = (input ? b.plan->input : b.plan->output).pieces;
  const Block& block = (input ? b.inputs : b.outputs)[b.plan->rank][in.count_chunk / pieces];
  return piece_of(block.count, b.low, b.high, pieces, in.count_chunk % pieces).count;
}

bool is_partial(const Binding& b, const Operand& operand) {
  if (operand.mark == Mark::fresh && !is_users(operand)) return b.reduce_op == ReduceOp::premul_sum;
  return operand.mark == Mark::partial;
}

bool is_scaled(const Binding& b, const Operand& operand) {
  return b.reduce_op == ReduceOp::premul_sum && operand.mark == Mark::fresh && is_users(operand);
}

bool is_reduction(const Binding& b, const Instruction& in) {
  return in.reduce || is_scaled(b, b.plan->operands[in.first_operand]);
}

void Execution::transfer(const Instruction& in) {
  const uint64_t count = transfer_count(binding_, in);
  if (in.sends) {
    if (send_in_place(in, count)) return;
    // All messages of a transfer hold the same.
    const Operand* message = destinations_of(in);
    while (message->buffer != BufferKind::message) ++message;
    binding_.outgoing = binding_.messages->outgoing(count * each_of(binding_, *message));
  }
  if (hook_ != nullptr)
    hook_->run(binding_, in);
  else if (count > 0)
    compute(in, count);
  if (!in.sends) return;
  // Empty ones, too: the receiver waits for each.
  for (const Operand* to = destinations_of(in); to != destinations_of(in) + in.n_destinations; ++to)
    if (to->buffer == BufferKind::message) binding_.messages->send(to->rank, static_cast<uint32_t>(to->chunk));
}

// A copy of this rank's own tensor, which other hosts get as it lies there. True where that was possible.
bool Execution::send_in_place(const Instruction& in, uint64_t count) {
  const Binding& b = binding_;
  const Operand& from = b.plan->operands[in.first_operand];
  if (b.plan->is_private || is_reduction(b, in) || from.rank != b.plan->rank || !is_users(from)) return false;
  const Operand* first = destinations_of(in);
  const Operand* last = first + in.n_destinations;
  if (std::any_of(first, last, [](const Operand& to) { return to.buffer != BufferKind::message; })) return false;
  const std::byte* data = resolve(b, from);
  for (const Operand* to = first; to != last; ++to)
    if (!b.messages->lend(to->rank, static_cast<uint32_t>(to->chunk), data, count * each_of(b, from))) return false;
  return true;
}

void Execution::compute(const Instruction& in, uint64_t count) const {
  const Binding& b = binding_;
  const Operand* operands = &b.plan->operands[in.first_operand];

  Source inline_sources[kInlineOperands];
  void* inline_destinations[kInlineOperands];
  std::unique_ptr<Source[]> heap_sources;
  std::unique_ptr<void*[]> heap_destinations;
  Source* sources = inline_sources;
  void** destinations = inline_destinations;
  if (in.n_sources > kInlineOperands) sources = (heap_sources = std::make_unique<Source[]>(in.n_sources)).get();
  if (in.n_destinations > kInlineOperands)
    destinations = (heap_destinations = std::make_unique<void*[]>(in.n_destinations)).get();

  for (int i = 0; i < in.n_sources; ++i)
    sources[i] = Source{resolve(b, operands[i]), is_partial(b, operands[i]), is_scaled(b, operands[i])};
  int n_destinations = 0;
  bool sends = false;
  for (int i = 0; i < in.n_destinations; ++i) {
    const Operand& to = operands[in.n_sources + i];
    const bool message = to.buffer == BufferKind::message;
    if (!message || !sends) destinations[n_destinations++] = resolve(b, to);
    sends |= message;
  }

  if (is_reduction(b, in)) {
    const ReduceSpec spec{b.dtype, b.reduce_op, in.final, b.plan->world_size, b.factor};
    reduce(spec, sources, in.n_sources, destinations, n_destinations, count);
  } else {
    copy(sources[0].data, destinations, n_destinations, count * each_of(b, operands[0]));
  }
}

}  // namespace hxcomm
