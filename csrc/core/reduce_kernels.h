// The loop of every reduction, written once. Private to reduce*.cpp.
//
// Each reduce_<isa>.cpp defines Lane<dtype> for every dtype and instantiates the loop with them:
//   Register, kLanes (elements it holds), kRegisters (of a group, which is what is in flight at a time),
//   load_fresh(p), load_partial(p), store_final(p, r), store_partial(p, r): p unaligned, in dtype or accumulation type,
//   add, multiply, minimum, maximum (a, b), divide(r, divisor), settle(r) (applied once to each result).
// All of it is in an anonymous namespace: a function that is compiled for AVX2 must not be the copy that the linker
// keeps for everybody. So nothing here calls an inline function that is not constexpr and forced at compile time.
#pragma once

#include <cstddef>
#include <utility>

#include "core/reduce.h"
#include "core/types.h"

namespace hxcomm {

struct Reduction {
  const ReduceSpec& spec;
  const Source* sources;
  int n_sources;
  void* const* destinations;
  int n_destinations;
};

// Elements [begin, end) of a reduction.
void reduce_scalar(const Reduction& r, size_t begin, size_t end);
#if defined(__x86_64__)
void reduce_avx2(const Reduction& r, size_t begin, size_t end);
#endif

namespace {

template <DType dtype>
struct Lane;

template <class L, ReduceOp op>
inline typename L::Register combine(typename L::Register a, typename L::Register b) {
  if constexpr (op == ReduceOp::product) return L::multiply(a, b);
  if constexpr (op == ReduceOp::min) return L::minimum(a, b);
  if constexpr (op == ReduceOp::max) return L::maximum(a, b);
  if constexpr (op == ReduceOp::sum) return L::add(a, b);
}

// The group of kRegisters registers that begins at element `at`.
template <DType dtype, size_t kRegisters>
struct Group {
  using L = Lane<dtype>;
  typename L::Register registers[kRegisters];

  void load(const Source& source, size_t at) {
    const std::byte* from = static_cast<const std::byte*>(source.data);
    if (source.partial)
      for (size_t i = 0; i < kRegisters; ++i)
        registers[i] = L::load_partial(from + (at + i * L::kLanes) * accumulation_size(dtype));
    else
      for (size_t i = 0; i < kRegisters; ++i)
        registers[i] = L::load_fresh(from + (at + i * L::kLanes) * item_size(dtype));
  }

  template <ReduceOp op>
  void fold(const Group& other) {
    for (size_t i = 0; i < kRegisters; ++i) registers[i] = combine<L, op>(registers[i], other.registers[i]);
  }

  void settle(bool divide, int divisor) {
    if (divide)
      for (size_t i = 0; i < kRegisters; ++i) registers[i] = L::divide(registers[i], divisor);
    for (size_t i = 0; i < kRegisters; ++i) registers[i] = L::settle(registers[i]);
  }

  void store(void* destination, size_t at, bool final) const {
    std::byte* to = static_cast<std::byte*>(destination);
    if (final)
      for (size_t i = 0; i < kRegisters; ++i)
        L::store_final(to + (at + i * L::kLanes) * item_size(dtype), registers[i]);
    else
      for (size_t i = 0; i < kRegisters; ++i)
        L::store_partial(to + (at + i * L::kLanes) * accumulation_size(dtype), registers[i]);
  }
};

// Whole groups in [begin, end), upwards or downwards.
template <DType dtype, ReduceOp op, size_t kRegisters>
void sweep(const Reduction& r, size_t begin, size_t end, bool downwards) {
  constexpr size_t kGroup = kRegisters * Lane<dtype>::kLanes;
  const ReduceSpec spec = r.spec;
  const bool divide = spec.final && spec.op == ReduceOp::avg;
  const size_t n_groups = (end - begin) / kGroup;
  const size_t step = downwards ? 0 - kGroup : kGroup;
  size_t at = downwards ? begin + (n_groups - 1) * kGroup : begin;

  for (size_t group = 0; group < n_groups; ++group, at += step) {
    Group<dtype, kRegisters> result, operand;
    result.load(r.sources[0], at);
    for (int k = 1; k < r.n_sources; ++k) {
      operand.load(r.sources[k], at);
      result.template fold<op>(operand);
    }
    result.settle(divide, spec.divisor);
    for (int d = 0; d < r.n_destinations; ++d) result.store(r.destinations[d], at, spec.final);
  }
}

// Groups, then single registers, then what is left element by element.
template <DType dtype, ReduceOp op>
void fold(const Reduction& r, size_t begin, size_t end) {
  using L = Lane<dtype>;
  constexpr size_t kGroup = L::kRegisters * L::kLanes;
  const size_t groups_end = begin + (end - begin) / kGroup * kGroup;
  const size_t lanes_end = begin + (end - begin) / L::kLanes * L::kLanes;
  // A result that is wider than a fresh source may be stored over that source: then it must not run ahead of the
  // reading. One that is narrower than a partial source is safe upwards, and equal sizes are safe both ways.
  const bool downwards = !r.spec.final && accumulation_size(dtype) > item_size(dtype);
  if (downwards && L::kLanes > 1) reduce_scalar(r, lanes_end, end);
  if (downwards) sweep<dtype, op, 1>(r, groups_end, lanes_end, downwards);
  sweep<dtype, op, L::kRegisters>(r, begin, groups_end, downwards);
  if (!downwards) sweep<dtype, op, 1>(r, groups_end, lanes_end, downwards);
  if (!downwards && L::kLanes > 1) reduce_scalar(r, lanes_end, end);
}

using Fold = void (*)(const Reduction&, size_t, size_t);

struct Folds {
  Fold of[kDTypes][kReduceOps];
};

// AVG folds as SUM does; sweep() divides.
constexpr ReduceOp folded_as(ReduceOp op) { return op == ReduceOp::avg ? ReduceOp::sum : op; }

template <int dtype, int... op>
constexpr void fill_row(Folds& folds, std::integer_sequence<int, op...>) {
  ((folds.of[dtype][op] = &fold<static_cast<DType>(dtype), folded_as(static_cast<ReduceOp>(op))>), ...);
}

template <int... dtype>
constexpr Folds every_fold(std::integer_sequence<int, dtype...>) {
  Folds folds{};
  (fill_row<dtype>(folds, std::make_integer_sequence<int, kReduceOps>{}), ...);
  return folds;
}

}  // namespace
}  // namespace hxcomm
