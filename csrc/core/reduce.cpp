#include "core/reduce.h"

#include <algorithm>
#include <cctype>
#include <cstdint>
#include <cstring>

#include "core/errors.h"
#include "core/reduce_kernels.h"

namespace hxcomm {
namespace {

// Copying 16 MiB to two destinations took 2.8 ms in pieces of 16 KiB and 3.2 ms one after the other; 64 KiB took 2.4
// and 2.9 us. Non-temporal stores are left to memcpy's own threshold: a peer that reads what they wrote waits for
// memory (up to 4 MiB its reading took twice as long, 236 against 125 us), and they won only beyond the cache (16 MiB,
// 15 %).
constexpr size_t kCopyPiece = 16 * 1024;

using Kernel = void (*)(const Reduction&, size_t begin, size_t end);
using Copy = void (*)(void* destination, const void* source, size_t nbytes);

struct Kernels {
  Kernel run;
  Copy copy;
  const char* name;
};

void copy_scalar(void* destination, const void* source, size_t nbytes) { std::memcpy(destination, source, nbytes); }

constexpr Kernels kScalar{reduce_scalar, copy_scalar, "scalar"};
#if defined(__x86_64__)
// glibc's memcpy takes `rep movsb` from some KiB on where the CPU claims it is fast. On Zen 3 that is 15 % faster than
// AVX2 where source and destination lie alike in their cache lines, and four times slower where they do not, as with
// everything from malloc (a staged all_reduce of 16 MiB took 4.5 ms instead of 1.2).
void copy_either(void* destination, const void* source, size_t nbytes) {
  const bool alike = ((reinterpret_cast<uintptr_t>(destination) ^ reinterpret_cast<uintptr_t>(source)) & 63) == 0;
  (alike ? copy_scalar : copy_avx2)(destination, source, nbytes);
}
constexpr Kernels kAvx2{reduce_avx2, copy_either, "avx2"};
bool cpu_has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c"); }
#else
constexpr Kernels kAvx2 = kScalar;
bool cpu_has_avx2() { return false; }
#endif

Kernels chosen = cpu_has_avx2() ? kAvx2 : kScalar;

// As torch and NCCL write it: "PREMUL_SUM".
std::string capitals(ReduceOp op) {
  std::string name = reduce_op_name(op);
  for (char& c : name) c = static_cast<char>(std::toupper(static_cast<unsigned char>(c)));
  return name;
}

const char* reason(DType dtype, ReduceOp op) {
  switch (op) {
    case ReduceOp::min:
    case ReduceOp::max:
      return "complex numbers have no order";
    case ReduceOp::avg:
      return "a truth value cannot be divided";
    case ReduceOp::premul_sum:
      return kind_of(dtype) == DTypeKind::boolean ? "a truth value cannot be multiplied by a factor"
                                                  : "a factor would be cut to a whole number";
    default:
      return "only integers and truth values have bits";
  }
}

}  // namespace

void reduce(const ReduceSpec& spec, const Source* sources, int n_sources, void* const* destinations, int n_destinations,
            size_t count) {
  chosen.run({spec, sources, n_sources, destinations, n_destinations}, 0, count);
}

void copy(const void* source, void* const* destinations, int n_destinations, size_t nbytes) {
  const size_t piece = n_destinations > 1 ? kCopyPiece : nbytes;
  for (size_t at = 0; at < nbytes; at += piece) {
    const std::byte* from = static_cast<const std::byte*>(source) + at;
    for (int d = 0; d < n_destinations; ++d)
      if (destinations[d] != source)
        chosen.copy(static_cast<std::byte*>(destinations[d]) + at, from, std::min(piece, nbytes - at));
  }
}

std::string unsupported(DType dtype, ReduceOp op) {
  if (has_meaning(dtype, op)) return "";
  std::string possible;
  for (int i = 0; i < kReduceOps; ++i)
    if (has_meaning(dtype, static_cast<ReduceOp>(i)))
      possible += (possible.empty() ? "" : ", ") + capitals(static_cast<ReduceOp>(i));
  return capitals(op) + " of " + dtype_name(dtype) + " has no meaning (" + reason(dtype, op) + "); " +
         dtype_name(dtype) + " has " + possible;
}

void set_reduce_isa(Isa isa) {
  if (isa == Isa::avx2 && !cpu_has_avx2())
    throw Error(ErrorKind::usage,
                "the avx2 reduce kernels need AVX2 and F16C, which this CPU lacks; set HXCOMM_ISA to auto or scalar");
  chosen = isa == Isa::scalar || !cpu_has_avx2() ? kScalar : kAvx2;
}

const char* reduce_isa() { return chosen.name; }

}  // namespace hxcomm
