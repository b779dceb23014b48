// Elementwise reduction and copying of mapped memory: the arithmetic of every collective.
//
// It knows elements, not ranks: the executor says which memory and in which order. What it promises:
// - The sources are folded from the left in the order given, so the caller's order decides the bits of a result.
// - float16 and bfloat16 are accumulated in float32 and rounded once, to nearest even, at the end. Every other type is
//   accumulated in itself; integers wrap.
// - AVG is SUM, divided in the accumulation type when the result is final; integers truncate towards zero, as in NCCL.
// - PREMUL_SUM is SUM of sources that are multiplied by a real factor in the accumulation type as they are read; only
//   the sources marked `scaled` are.
// - MIN and MAX return NaN when any source is NaN, and order -0.0 before +0.0 (IEEE 754-2019 minimum and maximum):
//   they do not depend on the order of the sources, torch.minimum does on the sign of a zero.
// - A floating-point result that is NaN is always the positive quiet NaN without payload (x86 keeps the payload of the
//   operand that the compiler happened to put first).
// - Complex numbers have the two rules above for each of their parts; a product is (ac - bd) + (ad + bc)i, each product
//   and sum rounded.
// - bool: any nonzero byte is true, results are 0 or 1; SUM, MAX and BOR are or, PRODUCT, MIN and BAND are and.
// - The instruction set changes no bit of any result.
#pragma once

#include <cstddef>
#include <string>

#include "core/types.h"

namespace hxcomm {

struct Source {
  const void* data;
  bool partial;         // in the accumulation type (a partial result); otherwise fresh: in dtype
  bool scaled = false;  // PREMUL_SUM: multiplied by the factor as it is read
};

struct ReduceSpec {
  DType dtype;
  ReduceOp op;
  bool final;         // divide (AVG) and store in dtype; otherwise store in the accumulation type
  int divisor;        // AVG: the number of ranks, >= 1
  double factor = 1;  // PREMUL_SUM: rounded to the accumulation type
};

// destinations[d][i] = finish(sources[0][i] op sources[1][i] op ...) for all i < count and all d. One source is lawful:
// it is converted, and divided where that is due.
//
// Expects 1 <= n_sources and has_meaning(dtype, op). No alignment is needed. A destination may be the same
// address as a source, also where their items differ in size; any other overlap is not allowed. Each source is read
// once and each destination written once; nothing is allocated, nothing blocks, nothing is thrown.
void reduce(const ReduceSpec& spec, const Source* sources, int n_sources, void* const* destinations, int n_destinations,
            size_t count);

// Copies nbytes to every destination, piece by piece, so that the source is read from memory once. A destination that
// is the source is skipped; any other overlap is not allowed.
void copy(const void* source, void* const* destinations, int n_destinations, size_t nbytes);

// Why this reduction has no meaning and which ones the dtype has, to be shown to the user; "" when it has one.
std::string unsupported(DType dtype, ReduceOp op);

enum class Isa { automatic, scalar, avx2 };

// Chooses the kernels of the whole process; `automatic` is the state at start: the best that the CPU has. Throws
// Error(usage) when the CPU lacks the one asked for. Meant for start-up: not to be called while another thread reduces.
void set_reduce_isa(Isa isa);
const char* reduce_isa();  // "avx2" or "scalar": what reduce() uses

}  // namespace hxcomm
