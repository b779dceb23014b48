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

#include "tests/number_format.h"

using namespace hxcomm;

namespace {

using Bytes = std::vector<std::byte>;

constexpr uint32_t kSeed = 20261123;
constexpr size_t kCounts[] = {0, 1, 7, 31, 32, 33, 255, 1021};
constexpr int kSourceCounts[] = {1, 2, 3, 5, 8};
constexpr size_t kMargin = 64;  // untouched bytes that every destination keeps before and after it
constexpr std::byte kCanary{0xa5};

int failures = 0;

template <class... Values>
void fail(const char* format, Values... values) {
  if (++failures <= 20) {
    std::printf("FAILED: ");
    std::printf(format, values...);  // NOLINT: the formats are literals of this file
    std::printf("\n");
  }
}

bool has_avx2 = true;

std::vector<Isa> isas() { return has_avx2 ? std::vector{Isa::scalar, Isa::avx2} : std::vector{Isa::scalar}; }

// ---- One case, run by the kernels.

// The type that partial results of dtype are stored in.
DType wide(DType dtype) { return accumulation_size(dtype) == item_size(dtype) ? dtype : DType::float32; }

uint64_t read_bits(const std::byte* p, DType dtype) {
  uint64_t bits = 0;
  std::memcpy(&bits, p, item_size(dtype));
  return bits;
}

void write_bits(std::byte* p, DType dtype, uint64_t bits) { std::memcpy(p, &bits, item_size(dtype)); }

long double fold(ReduceOp op, long double a, long double b, bool boolean) {
  if (boolean) op = op == ReduceOp::sum ? ReduceOp::max : op == ReduceOp::product ? ReduceOp::min : op;
  switch (op) {
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

  bool partial(int k) const { return (partial_sources >> k & 1) != 0; }
  DType source_dtype(int k) const { return partial(k) ? wide(dtype) : dtype; }
  DType result_dtype() const { return final ? dtype : wide(dtype); }
  std::string text() const {
    return std::string(dtype_name(dtype)) + " " + reduce_op_name(op) + " sources=" + std::to_string(n_sources) +
           " (partial mask " + std::to_string(partial_sources) + ") destinations=" + std::to_string(n_destinations) +
           " count=" + std::to_string(count) + (final ? " final" : " partial") +
           " misaligned=" + std::to_string(misaligned) + " isa=" + reduce_isa();
  }
};

// Runs the case and returns the result; `in_place` >= 0: the first destination is that source. Checks that every
// destination holds the same and that nothing around them was written.
Bytes run(const Case& c, const std::vector<Bytes>& inputs, int in_place = -1) {
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
    sources.push_back({p, c.partial(k)});
    if (k == in_place) destinations.push_back(p);
  }
  while (destinations.size() < static_cast<size_t>(c.n_destinations)) destinations.push_back(fresh_buffer(nbytes));

  reduce({c.dtype, c.op, c.final, c.divisor}, sources.data(), c.n_sources, destinations.data(), c.n_destinations,
         c.count);

  const std::byte* first = static_cast<std::byte*>(destinations[0]);
  for (const void* destination : destinations)
    if (nbytes > 0 && std::memcmp(destination, first, nbytes) != 0) fail("%s: destinations differ", c.text().c_str());
  for (const Bytes& buffer : memory)
    if (std::any_of(buffer.begin(), buffer.begin() + kMargin, [](std::byte b) { return b != kCanary; }) ||
        std::any_of(buffer.end() - kMargin, buffer.end(), [](std::byte b) { return b != kCanary; }))
      fail("%s: wrote outside a destination", c.text().c_str());
  return Bytes(first, first + nbytes);
}

void expect_equal(const Case& c, const Bytes& got, const Bytes& want, const char* what) {
  const DType dtype = c.result_dtype();
  for (size_t i = 0; i < c.count; ++i) {
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
      if (unsupported(entry.dtype, static_cast<ReduceOp>(op)) == nullptr) visit(entry.dtype, static_cast<ReduceOp>(op));
}

// Which sources are partial: none, all, and a mixture where it makes a difference.
std::vector<unsigned> partial_masks(DType dtype) {
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
                visit(Case{dtype, op, n_sources, n_destinations, count, final, mask, misaligned});
  });
}

// ---- Groups of cases.

// Any bits at all; every third element is one that tests like to break on.
Bytes random_bits(std::mt19937_64& random, DType dtype, size_t count) {
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

void results_equal_the_exact_reference() {
  std::mt19937_64 random(kSeed);
  for_each_case([&](const Case& c) {
    const bool boolean = c.dtype == DType::boolean;
    // Products of 8 stay within 4^8 and exact in 8 bits of significand because all are powers of two, or zero.
    const std::vector<int> values = boolean                     ? std::vector{0, 1, 1}
                                    : c.dtype == DType::uint8   ? std::vector{0, 1, 2, 4, 3, 255}
                                    : c.op == ReduceOp::product ? std::vector{-2, -1, 1, 2, 4}
                                                                : std::vector{-16, -7, -1, 0, 3, 8, 15};
    std::vector<Bytes> inputs(static_cast<size_t>(c.n_sources));
    std::vector<long double> exact(c.count);
    for (int k = 0; k < c.n_sources; ++k) {
      Bytes& input = inputs[static_cast<size_t>(k)];
      const DType dtype = c.source_dtype(k);
      input.resize(c.count * item_size(dtype));
      for (size_t i = 0; i < c.count; ++i) {
        const long double value = values[random() % values.size()];
        write_bits(input.data() + i * item_size(dtype), dtype, encode(dtype, value));
        exact[i] = k == 0 ? value : fold(c.op, exact[i], value, boolean);
      }
    }
    Bytes want(c.count * item_size(c.result_dtype()));
    for (size_t i = 0; i < c.count; ++i) {
      // The sum is rounded (or wrapped) to the accumulation type, then the quotient, then the result.
      long double value = decode(wide(c.dtype), encode(wide(c.dtype), exact[i]));
      if (c.final && c.op == ReduceOp::avg) value /= c.divisor;
      if (!is_floating(c.dtype)) value = std::trunc(value);
      value = decode(wide(c.dtype), encode(wide(c.dtype), value));
      write_bits(want.data() + i * item_size(c.result_dtype()), c.result_dtype(), encode(c.result_dtype(), value));
    }
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

void only_the_average_of_bool_is_unsupported() {
  for (const DTypeInfo& entry : kDTypeTable)
    for (int op = 0; op < kReduceOps; ++op) {
      const bool meaningless = entry.dtype == DType::boolean && static_cast<ReduceOp>(op) == ReduceOp::avg;
      if ((unsupported(entry.dtype, static_cast<ReduceOp>(op)) != nullptr) != meaningless)
        fail("unsupported(%s, %s)", entry.name, kReduceOpNames[op]);
    }
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
      reduce({dtype, ReduceOp::sum, true, 1}, sources.data(), n_sources, destinations.data(), n_destinations,
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
      {"only the average of bool is unsupported", only_the_average_of_bool_is_unsupported},
  };
  for (const auto& group : groups) {
    const int before = failures;
    group.run();
    std::printf("%-60s %s\n", group.name, failures == before ? "ok" : "FAILED");
  }
  if (failures > 0) std::printf("%d failures (seed %u)\n", failures, kSeed);
  return failures > 0 ? 1 : 0;
}
