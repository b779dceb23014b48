#include "core/executor.h"

#include <algorithm>

namespace hxcomm {
namespace {

// Operands of one transfer that are resolved on the stack; a wider one (more than 32 ranks) takes the heap.
constexpr size_t kInlineOperands = 64;

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
  if (operand.mark == Mark::fresh && operand.buffer == BufferKind::scratch) return b.reduce_op == ReduceOp::premul_sum;
  return operand.mark == Mark::partial;
}

bool is_scaled(const Binding& b, const Operand& operand) {
  return b.reduce_op == ReduceOp::premul_sum && operand.mark == Mark::fresh && operand.buffer != BufferKind::scratch;
}

bool is_reduction(const Binding& b, const Instruction& in) {
  return in.reduce || is_scaled(b, b.plan->operands[in.first_operand]);
}

void Execution::transfer(const Instruction& in) {
  if (hook_ != nullptr) {
    hook_->run(binding_, in);
    return;
  }
  const Binding& b = binding_;
  const uint64_t count = transfer_count(b, in);
  if (count == 0) return;
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
  for (int i = 0; i < in.n_destinations; ++i) destinations[i] = resolve(b, operands[in.n_sources + i]);

  if (is_reduction(b, in)) {
    const ReduceSpec spec{b.dtype, b.reduce_op, in.final, b.plan->world_size, b.factor};
    reduce(spec, sources, in.n_sources, destinations, in.n_destinations, count);
  } else {
    const size_t each = sources[0].partial ? accumulation_size(b.dtype) : item_size(b.dtype);
    copy(sources[0].data, destinations, in.n_destinations, count * each);
  }
}

}  // namespace hxcomm
