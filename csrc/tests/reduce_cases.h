// The cases of reduce_test.cpp: which reductions are tried, how one is run by the kernels and compared.
#pragma once

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "core/reduce.h"
#include "tests/number_format.h"

namespace hxcomm {

using Bytes = std::vector<std::byte>;

constexpr uint32_t kSeed = 20261123;
constexpr size_t kCounts[] = {0, 1, 7, 31, 32, 33, 255, 1021};
constexpr int kSourceCounts[] = {1, 2, 3, 5, 8};
constexpr size_t kMargin = 64;  // untouched bytes that every destination keeps before and after it
constexpr std::byte kCanary{0xa5};

inline int failures = 0;

template <class... Values>
void fail(const char* format, Values... values) {
  if (++failures <= 20) {
    std::printf("FAILED: ");
    std::printf(format, values...);  // NOLINT: the formats are literals of this file
    std::printf("\n");
  }
}

inline bool has_avx2 = true;

inline std::vector<Isa> isas() { return has_avx2 ? std::vector{Isa::scalar, Isa::avx2} : std::vector{Isa::scalar}; }

// ---- One case, run by the kernels.

// Of the reference, which sees complex numbers as pairs of their parts.
inline DType part_of(DType dtype) {
  return dtype == DType::complex64 ? DType::float32 : dtype == DType::complex128 ? DType::float64 : dtype;
}
inline size_t parts_of(DType dtype) { return item_size(dtype) / item_size(part_of(dtype)); }

// The type that partial results of dtype are stored in.
inline DType wide(DType dtype) { return accumulation_size(dtype) == item_size(dtype) ? dtype : DType::float32; }

inline uint64_t read_bits(const std::byte* p, DType dtype) {
  uint64_t bits = 0;
  std::memcpy(&bits, p, item_size(dtype));
  return bits;
}

inline void write_bits(std::byte* p, DType dtype, uint64_t bits) { std::memcpy(p, &bits, item_size(dtype)); }

inline long double fold(ReduceOp op, long double a, long double b, bool boolean) {
  if (boolean) op = op == ReduceOp::sum ? ReduceOp::bor : op == ReduceOp::product ? ReduceOp::band : op;
  const auto bits = [](long double value) { return static_cast<int64_t>(value); };
  switch (op) {
    case ReduceOp::band:
      return static_cast<long double>(bits(a) & bits(b));
    case ReduceOp::bor:
      return static_cast<long double>(bits(a) | bits(b));
    case ReduceOp::bxor:
      return static_cast<long double>(bits(a) ^ bits(b));
    case ReduceOp::product:
      return a * b;
    case ReduceOp::min:
      return std::min(a, b);
    case ReduceOp::max:
      return std::max(a, b);
    default:
      return a + b;
  }
}

struct Case {
  DType dtype;
  ReduceOp op;
  int n_sources;
  int n_destinations;
  size_t count;
  bool final;
  unsigned partial_sources = 0;  // bit k: source k is partial
  size_t misaligned = 0;         // bytes
  int divisor = 3;
  unsigned scaled_sources = 0;  // bit k: source k is multiplied by the factor
  double factor = 1;

  bool scaled(int k) const { return (scaled_sources >> k & 1) != 0; }
  bool partial(int k) const { return (partial_sources >> k & 1) != 0; }
  DType source_dtype(int k) const { return partial(k) ? wide(dtype) : dtype; }
  DType result_dtype() const { return final ? dtype : wide(dtype); }
  std::string text() const {
    return std::string(dtype_name(dtype)) + " " + reduce_op_name(op) + " sources=" + std::to_string(n_sources) +
           " (partial mask " + std::to_string(partial_sources) + ") destinations=" + std::to_string(n_destinations) +
           " count=" + std::to_string(count) + (final ? " final" : " partial") +
           (op == ReduceOp::premul_sum ? " scaled mask " + std::to_string(scaled_sources) : "") +
           " misaligned=" + std::to_string(misaligned) + " isa=" + reduce_isa();
  }
};

// Runs the case and returns the result; `in_place` >= 0: the first destination is that source. Checks that every
// destination holds the same and that nothing around them was written.
inline Bytes run(const Case& c, const std::vector<Bytes>& inputs, int in_place = -1) {
  const size_t nbytes = c.count * item_size(c.result_dtype());
  std::vector<Bytes> memory;
  const auto fresh_buffer = [&](size_t size) {
    memory.emplace_back(kMargin + c.misaligned + size + kMargin, kCanary);
    return memory.back().data() + kMargin + c.misaligned;
  };
  std::vector<Source> sources;
  std::vector<void*> destinations;
  for (int k = 0; k < c.n_sources; ++k) {
    const size_t size = c.count * item_size(c.source_dtype(k));
    std::byte* p = fresh_buffer(k == in_place ? std::max(size, nbytes) : size);
    if (size > 0) std::memcpy(p, inputs[static_cast<size_t>(k)].data(), size);
    sources.push_back({p, c.partial(k), c.scaled(k)});
    if (k == in_place) destinations.push_back(p);
  }
  while (destinations.size() < static_cast<size_t>(c.n_destinations)) destinations.push_back(fresh_buffer(nbytes));

  reduce({c.dtype, c.op, c.final, c.divisor, c.factor}, sources.data(), c.n_sources, destinations.data(),
         c.n_destinations, c.count);

  const std::byte* first = static_cast<std::byte*>(destinations[0]);
  for (const void* destination : destinations)
    if (nbytes > 0 && std::memcmp(destination, first, nbytes) != 0) fail("%s: destinations differ", c.text().c_str());
  for (const Bytes& buffer : memory)
    if (std::any_of(buffer.begin(), buffer.begin() + kMargin, [](std::byte b) { return b != kCanary; }) ||
        std::any_of(buffer.end() - kMargin, buffer.end(), [](std::byte b) { return b != kCanary; }))
      fail("%s: wrote outside a destination", c.text().c_str());
  return Bytes(first, first + nbytes);
}

inline void expect_equal(const Case& c, const Bytes& got, const Bytes& want, const char* what) {
  const DType dtype = part_of(c.result_dtype());
  for (size_t i = 0; i < c.count * parts_of(c.dtype); ++i) {
    const uint64_t a = read_bits(got.data() + i * item_size(dtype), dtype);
    const uint64_t b = read_bits(want.data() + i * item_size(dtype), dtype);
    if (a == b) continue;
    fail("%s: element %zu is %#llx, %s %#llx", c.text().c_str(), i, static_cast<unsigned long long>(a), what,
         static_cast<unsigned long long>(b));
    return;
  }
}

template <class Visit>
void for_each_dtype_and_op(Visit&& visit) {
  for (const DTypeInfo& entry : kDTypeTable)
    for (int op = 0; op < kReduceOps; ++op)
      if (unsupported(entry.dtype, static_cast<ReduceOp>(op)).empty()) visit(entry.dtype, static_cast<ReduceOp>(op));
}

// Which sources are partial: none, all, and a mixture where it makes a difference.
inline std::vector<unsigned> partial_masks(DType dtype) {
  return wide(dtype) == dtype ? std::vector<unsigned>{0} : std::vector<unsigned>{0, 0xff, 0x5a};
}

template <class Visit>
void for_each_case(Visit&& visit) {
  for_each_dtype_and_op([&](DType dtype, ReduceOp op) {
    for (int n_sources : kSourceCounts)
      for (int n_destinations : {1, 2, 3})
        for (size_t count : kCounts)
          for (bool final : {true, false})
            for (unsigned mask : partial_masks(dtype))
              for (size_t misaligned : {size_t{0}, size_t{1}})
                visit(Case{dtype, op, n_sources, n_destinations, count, final, mask, misaligned, 3,
                           op == ReduceOp::premul_sum ? 0x6d & ~mask : 0, 2.5});
  });
}

}  // namespace hxcomm
