// Unit test of the reduce kernels: a plain executable. One line per group of cases; exit status 1 and the values that
// differ when one fails. `--bench` prints throughput instead. tests/core/test_reduce.py compiles and runs it.
//
// Results are held against a reference that shares no code with the kernels: values are decoded to long double, folded
// there (those inputs are exact in every step) and rounded by number_format.h. Random bits hold AVX2 against scalar.
#include "core/reduce.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "tests/reduce_cases.h"

using namespace hxcomm;

namespace {

// ---- Groups of cases.

// Any bits at all; every third element is one that tests like to break on.
Bytes random_bits(std::mt19937_64& random, DType dtype, size_t count) {
  if (parts_of(dtype) > 1) return random_bits(random, part_of(dtype), count * parts_of(dtype));
  std::vector<uint64_t> special = {0, 1, ~uint64_t{0}};
  if (is_floating(dtype)) {
    const Format f = format_of(dtype);
    const uint64_t one = 1, sign = one << (f.fraction_bits + f.exponent_bits);
    const uint64_t infinity = ((one << f.exponent_bits) - 1) << f.fraction_bits;
    special = {
        0,           1, infinity, infinity | 1, quiet_nan(dtype), quiet_nan(dtype) | 5, (one << f.fraction_bits) - 1,
        infinity - 1};
    for (size_t i = 0, n = special.size(); i < n; ++i) special.push_back(special[i] | sign);
  }
  Bytes bytes(count * item_size(dtype));
  for (size_t i = 0; i < count; ++i) {
    const uint64_t bits = random() % 3 == 0 ? special[random() % special.size()] : random();
    write_bits(bytes.data() + i * item_size(dtype), dtype, bits);
  }
  return bytes;
}

void avx2_gives_the_bits_of_scalar_in_place_or_not() {
  std::mt19937_64 random(kSeed);
  for_each_case([&](const Case& c) {
    std::vector<Bytes> inputs;
    for (int k = 0; k < c.n_sources; ++k) inputs.push_back(random_bits(random, c.source_dtype(k), c.count));
    set_reduce_isa(Isa::scalar);
    const Bytes want = run(c, inputs);
    for (Isa isa : isas()) {
      set_reduce_isa(isa);
      expect_equal(c, run(c, inputs), want, "scalar says");
      for (int k : {0, c.n_sources - 1}) expect_equal(c, run(c, inputs, k), want, "out of place it is");
    }
  });
}

// The fold of all sources, in integers.
struct Exact {
  long double re = 0, im = 0;
};

Exact fold(const Case& c, Exact a, Exact b) {
  if (parts_of(c.dtype) > 1 && c.op == ReduceOp::product) return {a.re * b.re - a.im * b.im, a.re * b.im + a.im * b.re};
  const bool boolean = c.dtype == DType::boolean;
  return {fold(c.op, a.re, b.re, boolean), parts_of(c.dtype) > 1 ? fold(c.op, a.im, b.im, boolean) : 0};
}

// The sum is rounded (or wrapped) to the accumulation type, then the quotient, then the result.
uint64_t finished(const Case& c, long double value) {
  const DType accumulation = part_of(wide(c.dtype));
  value = decode(accumulation, encode(accumulation, value));
  if (c.final && c.op == ReduceOp::avg) value /= c.divisor;
  if (kind_of(c.dtype) == DTypeKind::integer) value = std::trunc(value);
  return encode(part_of(c.result_dtype()), decode(accumulation, encode(accumulation, value)));
}

std::vector<int> exact_values(const Case& c) {
  // Products of 8 stay within 4^8 and exact in 8 bits of significand because all are powers of two, or zero. Those of
  // complex numbers stay within 8^8 in each part, which 24 bits hold.
  if (c.dtype == DType::boolean) return {0, 1, 1};
  if (c.dtype == DType::uint8) return {0, 1, 2, 4, 3, 255};
  if (c.op == ReduceOp::product) return parts_of(c.dtype) > 1 ? std::vector{-1, 0, 1, 2} : std::vector{-2, -1, 1, 2, 4};
  return {-16, -7, -1, 0, 3, 8, 15};
}

void results_equal_the_exact_reference() {
  std::mt19937_64 random(kSeed);
  for_each_case([&](const Case& c) {
    const std::vector<int> values = exact_values(c);
    const size_t parts = parts_of(c.dtype);
    std::vector<Bytes> inputs(static_cast<size_t>(c.n_sources));
    std::vector<Exact> exact(c.count);
    for (int k = 0; k < c.n_sources; ++k) {
      Bytes& input = inputs[static_cast<size_t>(k)];
      const DType part = part_of(c.source_dtype(k));
      const long double factor = c.scaled(k) ? c.factor : 1;
      input.resize(c.count * parts * item_size(part));
      for (size_t i = 0; i < c.count; ++i) {
        Exact value;
        for (size_t p = 0; p < parts; ++p) {
          const long double drawn = values[random() % values.size()];
          write_bits(input.data() + (i * parts + p) * item_size(part), part, encode(part, drawn));
          (p == 0 ? value.re : value.im) = drawn * factor;
        }
        exact[i] = k == 0 ? value : fold(c, exact[i], value);
      }
    }
    const DType part = part_of(c.result_dtype());
    Bytes want(c.count * parts * item_size(part));
    for (size_t i = 0; i < c.count; ++i)
      for (size_t p = 0; p < parts; ++p)
        write_bits(want.data() + (i * parts + p) * item_size(part), part,
                   finished(c, p == 0 ? exact[i].re : exact[i].im));
    for (Isa isa : isas()) {
      set_reduce_isa(isa);
      expect_equal(c, run(c, inputs), want, "the reference says");
    }
  });
}

// One reduction of single values given as bit patterns, repeated 40 times so that vectors, too, are used.
uint64_t reduce_bits(DType dtype, ReduceOp op, const std::vector<uint64_t>& patterns, bool final = true) {
  Case c{dtype, op, static_cast<int>(patterns.size()), 1, 40, final};
  std::vector<Bytes> inputs;
  for (uint64_t pattern : patterns) {
    inputs.emplace_back(c.count * item_size(dtype));
    for (size_t i = 0; i < c.count; ++i) write_bits(inputs.back().data() + i * item_size(dtype), dtype, pattern);
  }
  const Bytes result = run(c, inputs);
  const uint64_t first = read_bits(result.data(), c.result_dtype());
  for (size_t i = 1; i < c.count; ++i)
    if (read_bits(result.data() + i * item_size(c.result_dtype()), c.result_dtype()) != first)
      fail("%s: element %zu differs from element 0", c.text().c_str(), i);
  return first;
}

void expect_bits(DType dtype, ReduceOp op, const std::vector<uint64_t>& patterns, uint64_t want) {
  for (Isa isa : isas()) {
    set_reduce_isa(isa);
    const uint64_t got = reduce_bits(dtype, op, patterns);
    if (got == want) continue;
    std::string list;
    for (uint64_t pattern : patterns) list.append(" ").append(std::to_string(pattern));
    fail("%s %s of bits%s is %llu, want %llu (%s)", dtype_name(dtype), reduce_op_name(op), list.c_str(),
         static_cast<unsigned long long>(got), static_cast<unsigned long long>(want), reduce_isa());
  }
}

void nan_infinity_zero_and_subnormals_follow_the_contract() {
  for (DType dtype : {DType::float32, DType::float64, DType::bfloat16, DType::float16}) {
    const Format f = format_of(dtype);
    const uint64_t one = encode(dtype, 1), sign = uint64_t{1} << (f.fraction_bits + f.exponent_bits);
    const uint64_t infinity = encode(dtype, INFINITY), nan = quiet_nan(dtype);
    for (uint64_t any_nan : {nan, nan | sign | 3, infinity | 1, infinity | sign | 1})
      for (int op = 0; op < kReduceOps; ++op)
        for (uint64_t other : {uint64_t{0}, sign, one, infinity, infinity | sign, nan | 2}) {
          if (!has_meaning(dtype, static_cast<ReduceOp>(op))) continue;
          expect_bits(dtype, static_cast<ReduceOp>(op), {any_nan, other}, nan);
          expect_bits(dtype, static_cast<ReduceOp>(op), {other, any_nan, one}, nan);
        }
    expect_bits(dtype, ReduceOp::sum, {infinity, infinity | sign}, nan);
    expect_bits(dtype, ReduceOp::product, {infinity, 0}, nan);
    expect_bits(dtype, ReduceOp::sum, {infinity, one}, infinity);
    expect_bits(dtype, ReduceOp::sum, {infinity - 1, infinity - 1}, infinity);  // overflow
    expect_bits(dtype, ReduceOp::max, {infinity | sign, one}, one);
    expect_bits(dtype, ReduceOp::min, {infinity | sign, one}, infinity | sign);
    for (const auto& zeros : {std::vector<uint64_t>{0, sign}, std::vector<uint64_t>{sign, 0}}) {
      expect_bits(dtype, ReduceOp::sum, zeros, 0);
      expect_bits(dtype, ReduceOp::product, zeros, sign);
      expect_bits(dtype, ReduceOp::min, zeros, sign);
      expect_bits(dtype, ReduceOp::max, zeros, 0);
    }
    expect_bits(dtype, ReduceOp::sum, {sign, sign}, sign);
    expect_bits(dtype, ReduceOp::max, {sign, sign}, sign);
    expect_bits(dtype, ReduceOp::sum, {1, 1}, 2);  // subnormals are not flushed
    expect_bits(dtype, ReduceOp::sum, {1, sign | 1}, 0);
    expect_bits(dtype, ReduceOp::max, {1, 0}, 1);
    expect_bits(dtype, ReduceOp::min, {sign | 1, sign}, sign | 1);
    expect_bits(dtype, ReduceOp::avg, {uint64_t{1} << f.fraction_bits, 0, 0},
                encode(dtype, decode(dtype, uint64_t{1} << f.fraction_bits) / 3));
  }
}

void sixteen_bit_floats_round_to_nearest_even() {
  for (DType dtype : {DType::bfloat16, DType::float16})
    for (Isa isa : isas()) {
      set_reduce_isa(isa);
      const uint64_t infinity = encode(dtype, INFINITY);
      Bytes source, want;  // float32 in, dtype out
      const auto add = [&](float value, uint64_t pattern) {
        source.resize(source.size() + 4);
        std::memcpy(source.data() + source.size() - 4, &value, 4);
        want.resize(want.size() + 2);
        write_bits(want.data() + want.size() - 2, dtype, pattern);
      };
      for (uint64_t sign : {uint64_t{0}, uint64_t{0x8000}})
        for (uint64_t pattern = 0; pattern < infinity; ++pattern) {
          const float direction = sign != 0 ? -1.0f : 1.0f;
          const float below = static_cast<float>(decode(dtype, pattern));
          const float middle = static_cast<float>((decode(dtype, pattern) + decode(dtype, pattern + 1)) / 2);
          add(direction * below, sign | pattern);
          add(direction * middle, sign | (pattern + (pattern & 1)));
          add(direction * std::nextafter(middle, 0.0f), sign | pattern);
          add(direction * std::nextafter(middle, INFINITY), sign | (pattern + 1));
        }
      Case c{dtype, ReduceOp::sum, 1, 1, want.size() / 2, true, 1};
      expect_equal(c, run(c, {source}), want, "nearest even is");

      // Widening: every pattern, NaN included.
      c = Case{dtype, ReduceOp::sum, 1, 1, 65536, false};
      Bytes patterns(2 * c.count), widened(4 * c.count), narrowed(2 * c.count);
      for (uint64_t pattern = 0; pattern < c.count; ++pattern) {
        const uint64_t magnitude = pattern & 0x7fff;
        uint64_t wide_bits = encode(DType::float32, decode(dtype, pattern));
        if (magnitude == infinity) wide_bits = 0x7f800000u | (pattern & 0x8000) << 16;
        write_bits(patterns.data() + 2 * pattern, dtype, pattern);
        write_bits(widened.data() + 4 * pattern, DType::float32, magnitude > infinity ? 0x7fc00000u : wide_bits);
        write_bits(narrowed.data() + 2 * pattern, dtype, magnitude > infinity ? quiet_nan(dtype) : pattern);
      }
      expect_equal(c, run(c, {patterns}), widened, "widened it is");
      c.final = true;
      expect_equal(c, run(c, {patterns}), narrowed, "it should be unchanged:");
    }
}

void sources_are_folded_from_the_left_in_float32() {
  const auto f32 = [](float v) { return encode(DType::float32, v); };
  expect_bits(DType::float32, ReduceOp::sum, {f32(0x1p24f), f32(1), f32(1)}, f32(0x1p24f));
  expect_bits(DType::float32, ReduceOp::sum, {f32(1), f32(1), f32(0x1p24f)}, f32(0x1p24f + 2));
  // 256 + 1 is a tie in bfloat16: one rounding at the end sees 258, a rounding at each step would stay at 256.
  const auto bf16 = [](float v) { return encode(DType::bfloat16, v); };
  expect_bits(DType::bfloat16, ReduceOp::sum, {bf16(256), bf16(1), bf16(1)}, bf16(258));
}

void integers_wrap_and_averages_truncate_towards_zero() {
  const auto i32 = [](int64_t v) { return static_cast<uint64_t>(static_cast<uint32_t>(v)); };
  const auto i64 = [](int64_t v) { return static_cast<uint64_t>(v); };
  expect_bits(DType::int32, ReduceOp::sum, {i32(INT32_MAX), i32(1)}, i32(INT32_MIN));
  expect_bits(DType::int32, ReduceOp::product, {i32(65536), i32(65537)}, i32(65536));
  expect_bits(DType::int32, ReduceOp::avg, {i32(-5), i32(0), i32(0)}, i32(-1));
  expect_bits(DType::int32, ReduceOp::avg, {i32(5), i32(0), i32(0)}, i32(1));
  expect_bits(DType::int64, ReduceOp::sum, {i64(INT64_MAX), i64(2)}, i64(INT64_MIN + 1));
  expect_bits(DType::int64, ReduceOp::product, {i64(-3), i64(int64_t{1} << 40)}, i64(-3 * (int64_t{1} << 40)));
  expect_bits(DType::int64, ReduceOp::avg, {i64(-10), i64(0), i64(2)}, i64(-2));
  expect_bits(DType::int8, ReduceOp::sum, {100, 100}, 200);  // -56
  expect_bits(DType::int8, ReduceOp::max, {0xff, 1}, 1);
  expect_bits(DType::int8, ReduceOp::avg, {0xfb, 0, 0}, 0xff);  // -5 / 3
  expect_bits(DType::int16, ReduceOp::product, {257, 256}, 256);
  expect_bits(DType::int16, ReduceOp::min, {0x8000, 1}, 0x8000);
  expect_bits(DType::uint8, ReduceOp::sum, {200, 100}, 44);
  expect_bits(DType::uint8, ReduceOp::product, {16, 17}, 16);
  expect_bits(DType::uint8, ReduceOp::avg, {100, 100, 50}, 83);
}

void any_nonzero_byte_is_true() {
  for (ReduceOp op : {ReduceOp::sum, ReduceOp::max, ReduceOp::product, ReduceOp::min}) {
    const bool is_or = op == ReduceOp::sum || op == ReduceOp::max;
    expect_bits(DType::boolean, op, {2, 4}, 1);  // bitwise and would be 0
    expect_bits(DType::boolean, op, {0, 255}, is_or);
    expect_bits(DType::boolean, op, {128, 0, 1}, is_or);
    expect_bits(DType::boolean, op, {0, 0}, 0);
    expect_bits(DType::boolean, op, {7}, 1);
  }
  expect_bits(DType::boolean, ReduceOp::band, {2, 4}, 1);
  expect_bits(DType::boolean, ReduceOp::bor, {0, 4}, 1);
  expect_bits(DType::boolean, ReduceOp::bxor, {2, 4}, 0);
  expect_bits(DType::boolean, ReduceOp::bxor, {2, 4, 8}, 1);
}

void a_factor_multiplies_marked_sources_in_float32_before_the_sum() {
  // 255 * 1.0078125 + 0.03125 is 257.02: with the product rounded to bfloat16 it would end at 256, not at 258.
  const auto bits = [](DType dtype, long double value) { return encode(dtype, value); };
  for (Isa isa : isas()) {
    set_reduce_isa(isa);
    for (DType dtype : {DType::bfloat16, DType::float16, DType::float32, DType::float64}) {
      const long double x = 255, factor = 1.0078125L, y = 0.03125L;
      Case c{dtype, ReduceOp::premul_sum, 2, 1, 40, true, 0, 0, 1, /*scaled*/ 1, static_cast<double>(factor)};
      std::vector<Bytes> inputs(2, Bytes(c.count * item_size(dtype)));
      Bytes want(c.count * item_size(dtype));
      for (size_t i = 0; i < c.count; ++i) {
        write_bits(inputs[0].data() + i * item_size(dtype), dtype, bits(dtype, x));
        write_bits(inputs[1].data() + i * item_size(dtype), dtype, bits(dtype, y));
        write_bits(want.data() + i * item_size(dtype), dtype, bits(dtype, x * factor + y));
      }
      expect_equal(c, run(c, inputs), want, "multiplied and added it is");
    }
  }
}

void copy_reaches_every_destination_and_skips_the_source() {
  std::mt19937_64 random(kSeed);
  for (size_t nbytes : {0, 1, 63, 4096, 16384, 16385, 100'003})
    for (size_t n_destinations : {0, 1, 2, 3}) {
      Bytes source(nbytes);
      for (std::byte& b : source) b = static_cast<std::byte>(random());
      const Bytes want = source;
      std::vector<Bytes> memory(n_destinations, Bytes(nbytes + 1, kCanary));
      std::vector<void*> destinations{source.data()};
      for (Bytes& buffer : memory) destinations.push_back(buffer.data());
      copy(source.data(), destinations.data(), static_cast<int>(destinations.size()), nbytes);
      for (const Bytes& buffer : memory)
        if (!std::equal(want.begin(), want.end(), buffer.begin()) || buffer.back() != kCanary || source != want)
          fail("copy of %zu bytes to %zu destinations", nbytes, n_destinations);
    }
}

void pairs_without_a_meaning_are_refused_by_name() {
  const std::string complex = unsupported(DType::complex64, ReduceOp::min);
  for (const char* word : {"MIN", "complex64", "order", "SUM, PRODUCT, AVG, PREMUL_SUM"})
    if (complex.find(word) == std::string::npos) fail("'%s' does not say %s", complex.c_str(), word);
  int refused = 0;
  for (const DTypeInfo& entry : kDTypeTable)
    for (int op = 0; op < kReduceOps; ++op) {
      const std::string text = unsupported(entry.dtype, static_cast<ReduceOp>(op));
      if (text.empty() != has_meaning(entry.dtype, static_cast<ReduceOp>(op)))
        fail("unsupported(%s, %s)", entry.name, kReduceOpNames[op]);
      refused += text.empty() ? 0 : 1;
    }
  // 4 floats and 2 complex have no bits, complex no order, bool no quotient, 5 integers and bool no factor.
  if (refused != 6 * 3 + 2 * 2 + 1 + 6) fail("%d pairs are refused", refused);
}

// ---- Throughput.

// GB/s of bytes read and written: the best of 15 runs of at least 4 MiB, since others share the machine.
double throughput(DType dtype, int n_sources, int n_destinations, size_t nbytes) {
  using Clock = std::chrono::steady_clock;
  constexpr size_t kPage = 4096;
  std::vector<Bytes> memory(static_cast<size_t>(n_sources + n_destinations), Bytes(nbytes + 2 * kPage));
  std::vector<Source> sources;
  std::vector<void*> destinations;
  for (size_t i = 0; i < memory.size(); ++i) {
    // Cache lines of their own, and not all at the same place in a page: equal low bits make loads wait for stores.
    std::byte* page = memory[i].data() + (kPage - reinterpret_cast<uintptr_t>(memory[i].data()) % kPage);
    std::byte* p = page + 576 * i;
    if (i < static_cast<size_t>(n_sources))
      sources.push_back({p, false});
    else
      destinations.push_back(p);
  }
  const size_t repeats = std::max<size_t>(1, (4 << 20) / nbytes);
  std::vector<double> seconds;
  for (int run = 0; run < 15; ++run) {
    const auto start = Clock::now();
    for (size_t i = 0; i < repeats; ++i)
      reduce({dtype, ReduceOp::sum, true, 1, 1}, sources.data(), n_sources, destinations.data(), n_destinations,
             nbytes / item_size(dtype));
    seconds.push_back(std::chrono::duration<double>(Clock::now() - start).count() / static_cast<double>(repeats));
  }
  const double best = *std::min_element(seconds.begin(), seconds.end());
  return static_cast<double>(memory.size() * nbytes) / best / 1e9;
}

void bench() {
  std::printf("%-10s %-8s %12s %8s %8s   GB/s read and written\n", "dtype", "", "bytes", "scalar", "avx2");
  for (DType dtype : {DType::float32, DType::bfloat16})
    for (auto [n_sources, n_destinations] : {std::pair{2, 1}, std::pair{2, 2}, std::pair{4, 1}})
      for (size_t nbytes : {size_t{8} << 10, size_t{256} << 10, size_t{16} << 20}) {
        std::printf("%-10s %d -> %d %13zu", dtype_name(dtype), n_sources, n_destinations, nbytes);
        for (Isa isa : isas()) {
          set_reduce_isa(isa);
          std::printf(" %8.1f", throughput(dtype, n_sources, n_destinations, nbytes));
        }
        std::printf("\n");
      }
}

}  // namespace

int main(int argc, char** argv) {
  try {
    set_reduce_isa(Isa::avx2);
  } catch (const std::exception& error) {
    has_avx2 = false;
    std::printf("only the scalar kernels are tested: %s\n", error.what());
  }
  if (argc > 1 && std::strcmp(argv[1], "--bench") == 0) {
    bench();
    return 0;
  }
  const struct {
    const char* name;
    void (*run)();
  } groups[] = {
      {"avx2 gives the bits of scalar, in place or not", avx2_gives_the_bits_of_scalar_in_place_or_not},
      {"results equal the exact reference", results_equal_the_exact_reference},
      {"NaN, infinity, zero and subnormals follow the contract", nan_infinity_zero_and_subnormals_follow_the_contract},
      {"16-bit floats round to nearest even", sixteen_bit_floats_round_to_nearest_even},
      {"sources are folded from the left in float32", sources_are_folded_from_the_left_in_float32},
      {"integers wrap and averages truncate towards zero", integers_wrap_and_averages_truncate_towards_zero},
      {"any nonzero byte is true", any_nonzero_byte_is_true},
      {"copy reaches every destination and skips the source", copy_reaches_every_destination_and_skips_the_source},
      {"a factor multiplies marked sources in float32 before the sum",
       a_factor_multiplies_marked_sources_in_float32_before_the_sum},
      {"pairs without a meaning are refused by name", pairs_without_a_meaning_are_refused_by_name},
  };
  for (const auto& group : groups) {
    const int before = failures;
    group.run();
    std::printf("%-60s %s\n", group.name, failures == before ? "ok" : "FAILED");
  }
  if (failures > 0) std::printf("%d failures (seed %u)\n", failures, kSeed);
  return failures > 0 ? 1 : 0;
}
