// The loop of every reduction, written once. Private to reduce*.cpp.
//
// Each reduce_<isa>.cpp defines Lane<dtype> for every dtype and instantiates the loop with them:
//   Register, kLanes (elements it holds), kRegisters (of a group, which is what is in flight at a time),
//   load_fresh(p), load_partial(p), store_final(p, r), store_partial(p, r): p unaligned, in dtype or accumulation type,
//   settle(r) (applied once to each result), and of add, multiply, minimum, maximum, bit_and, bit_or, bit_xor (a, b),
//   divide(r, divisor), scale(r, factor) those that its reduce operations need (has_meaning() in types.h).
// A dtype without a Lane does not compile.
//
// All of it is in an anonymous namespace: a function that is compiled for AVX2 must not be the copy that the linker
// keeps for everybody. For the same reason functions of other headers are called in constant expressions only.
#pragma once

#include <cstddef>
#include <utility>  // integer_sequence

#include "core/reduce.h"
#include "core/types.h"

namespace hxcomm {

// The arguments of reduce().
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
void copy_avx2(void* destination, const void* source, size_t nbytes);  // they must not overlap
#endif

namespace {

template <DType dtype>
struct Lane;

template <class L, ReduceOp op>
inline typename L::Register combine(typename L::Register a, typename L::Register b) {
  if constexpr (op == ReduceOp::product) return L::multiply(a, b);
  if constexpr (op == ReduceOp::min) return L::minimum(a, b);
  if constexpr (op == ReduceOp::max) return L::maximum(a, b);
  if constexpr (op == ReduceOp::band) return L::bit_and(a, b);
  if constexpr (op == ReduceOp::bor) return L::bit_or(a, b);
  if constexpr (op == ReduceOp::bxor) return L::bit_xor(a, b);
  if constexpr (op == ReduceOp::sum || op == ReduceOp::premul_sum) return L::add(a, b);
}

// The group of kRegisters registers that begins at element `at`.
template <DType dtype, size_t kRegisters>
struct Group {
  using L = Lane<dtype>;
  static constexpr size_t kItem = item_size(dtype);
  static constexpr size_t kWide = accumulation_size(dtype);
  typename L::Register registers[kRegisters];

  template <ReduceOp op>
  void load(const Source& source, size_t at, double factor) {
    const std::byte* from = static_cast<const std::byte*>(source.data);
    if (kWide != kItem && source.partial)
      for (size_t i = 0; i < kRegisters; ++i) registers[i] = L::load_partial(from + (at + i * L::kLanes) * kWide);
    else
      for (size_t i = 0; i < kRegisters; ++i) registers[i] = L::load_fresh(from + (at + i * L::kLanes) * kItem);
    if constexpr (op == ReduceOp::premul_sum)
      if (source.scaled)
        for (size_t i = 0; i < kRegisters; ++i) registers[i] = L::scale(registers[i], factor);
  }

  template <ReduceOp op>
  void fold(const Group& other) {
    for (size_t i = 0; i < kRegisters; ++i) registers[i] = combine<L, op>(registers[i], other.registers[i]);
  }

  template <ReduceOp op>
  void settle(bool divide, int divisor) {
    if constexpr (op == ReduceOp::sum && kind_of(dtype) != DTypeKind::boolean)
      if (divide)
        for (size_t i = 0; i < kRegisters; ++i) registers[i] = L::divide(registers[i], divisor);
    for (size_t i = 0; i < kRegisters; ++i) registers[i] = L::settle(registers[i]);
  }

  void store(void* destination, size_t at, bool final) const {
    std::byte* to = static_cast<std::byte*>(destination);
    if (kWide == kItem || final)
      for (size_t i = 0; i < kRegisters; ++i) L::store_final(to + (at + i * L::kLanes) * kItem, registers[i]);
    else
      for (size_t i = 0; i < kRegisters; ++i) L::store_partial(to + (at + i * L::kLanes) * kWide, registers[i]);
  }
};

// Whole groups in [begin, end), upwards or downwards. kSources and kDestinations: their number where it is known, or 0.
// __restrict says that no store changes the two arrays, so known ones stay in machine registers.
template <DType dtype, ReduceOp op, size_t kRegisters, int kSources, int kDestinations>
void sweep(const Reduction& r, const Source* __restrict sources, void* const* __restrict destinations, size_t begin,
           size_t end, bool downwards) {
  constexpr size_t kGroup = kRegisters * Lane<dtype>::kLanes;
  const int n_sources = kSources > 0 ? kSources : r.n_sources;
  const int n_destinations = kDestinations > 0 ? kDestinations : r.n_destinations;
  const ReduceSpec spec = r.spec;
  const bool divide = spec.final && spec.op == ReduceOp::avg;
  const size_t n_groups = (end - begin) / kGroup;
  const size_t step = downwards ? 0 - kGroup : kGroup;
  size_t at = downwards ? begin + (n_groups - 1) * kGroup : begin;

  for (size_t group = 0; group < n_groups; ++group, at += step) {
    Group<dtype, kRegisters> result, operand;
    result.template load<op>(sources[0], at, spec.factor);
    for (int k = 1; k < n_sources; ++k) {
      operand.template load<op>(sources[k], at, spec.factor);
      result.template fold<op>(operand);
    }
    result.template settle<op>(divide, spec.divisor);
    for (int d = 0; d < n_destinations; ++d) result.store(destinations[d], at, spec.final);
  }
}

// The shapes of 2 and 4 ranks (ring step, two-shot at 2, two-shot at 4) with their numbers known, for SUM and AVG. GB/s
// in cache, generic and known: 2 -> 2 float32 97 and 135, float16 31 and 44; 4 -> 1 float32 87 and 94, bfloat16 32 and
// 38. It costs 8 KiB of code; the other operations are not worth theirs.
template <DType dtype, ReduceOp op>
void sweep_groups(const Reduction& r, size_t begin, size_t end, bool downwards) {
  constexpr size_t n = Lane<dtype>::kRegisters;
  if constexpr (op == ReduceOp::sum) {
    if (r.n_sources == 2 && r.n_destinations == 1)
      return sweep<dtype, op, n, 2, 1>(r, r.sources, r.destinations, begin, end, downwards);
    if (r.n_sources == 2 && r.n_destinations == 2)
      return sweep<dtype, op, n, 2, 2>(r, r.sources, r.destinations, begin, end, downwards);
    if (r.n_sources == 4) return sweep<dtype, op, n, 4, 0>(r, r.sources, r.destinations, begin, end, downwards);
  }
  sweep<dtype, op, n, 0, 0>(r, r.sources, r.destinations, begin, end, downwards);
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
  constexpr bool kWidens = accumulation_size(dtype) > item_size(dtype);
  const bool downwards = kWidens && !r.spec.final;
  if (downwards && L::kLanes > 1) reduce_scalar(r, lanes_end, end);
  if (downwards) sweep<dtype, op, 1, 0, 0>(r, r.sources, r.destinations, groups_end, lanes_end, downwards);
  sweep_groups<dtype, op>(r, begin, groups_end, downwards);
  if (!downwards) sweep<dtype, op, 1, 0, 0>(r, r.sources, r.destinations, groups_end, lanes_end, downwards);
  if (!downwards && L::kLanes > 1) reduce_scalar(r, lanes_end, end);
}

using Fold = void (*)(const Reduction&, size_t, size_t);

struct Folds {
  Fold of[kDTypes][kReduceOps];  // null for pairs without a meaning
};

// AVG folds as SUM does; sweep() divides.
constexpr ReduceOp folded_as(ReduceOp op) { return op == ReduceOp::avg ? ReduceOp::sum : op; }

template <DType dtype, ReduceOp op>
constexpr Fold fold_of() {
  if constexpr (has_meaning(dtype, op))
    return &fold<dtype, folded_as(op)>;
  else
    return nullptr;
}

template <int dtype, int... op>
constexpr void fill_row(Folds& folds, std::integer_sequence<int, op...>) {
  ((folds.of[dtype][op] = fold_of<static_cast<DType>(dtype), static_cast<ReduceOp>(op)>()), ...);
}

template <int... dtype>
constexpr Folds every_fold(std::integer_sequence<int, dtype...>) {
  Folds folds{};
  (fill_row<dtype>(folds, std::make_integer_sequence<int, kReduceOps>{}), ...);
  return folds;
}

}  // namespace
}  // namespace hxcomm
