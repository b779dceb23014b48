// Reduce kernels for any machine, one element at a time; the definition that the vector kernels reproduce bit for bit.
#include <bit>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "core/reduce_kernels.h"

namespace hxcomm {
namespace {

// Loads and stores of a type that is accumulated in itself.
template <class T>
struct Plain {
  using Register = T;
  static constexpr size_t kLanes = 1;
  static constexpr size_t kRegisters = 32 / sizeof(T);

  static T load_partial(const std::byte* p) {
    T value;
    std::memcpy(&value, p, sizeof value);
    return value;
  }
  static void store_partial(std::byte* p, T value) { std::memcpy(p, &value, sizeof value); }
  static T load_fresh(const std::byte* p) { return load_partial(p); }
  static void store_final(std::byte* p, T value) { store_partial(p, value); }
};

template <class T>
struct Floating : Plain<T> {
  using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;

  static T add(T a, T b) { return a + b; }
  static T multiply(T a, T b) { return a * b; }
  static T minimum(T a, T b) {
    if (a != a || b != b) return std::numeric_limits<T>::quiet_NaN();
    if (a == b) return std::bit_cast<T>(std::bit_cast<Bits>(a) | std::bit_cast<Bits>(b));  // -0.0 before +0.0
    return a < b ? a : b;
  }
  static T maximum(T a, T b) {
    if (a != a || b != b) return std::numeric_limits<T>::quiet_NaN();
    if (a == b) return std::bit_cast<T>(std::bit_cast<Bits>(a) & std::bit_cast<Bits>(b));
    return a > b ? a : b;
  }
  static T divide(T sum, int divisor) { return sum / static_cast<T>(divisor); }
  static T scale(T value, double factor) { return value * static_cast<T>(factor); }
  static T settle(T value) { return value != value ? std::numeric_limits<T>::quiet_NaN() : value; }
};

// Computes in the unsigned type, where overflow is defined.
template <class T>
struct Integer : Plain<T> {
  using Unsigned = std::make_unsigned_t<T>;

  static T add(T a, T b) { return static_cast<T>(static_cast<Unsigned>(a) + static_cast<Unsigned>(b)); }
  static T multiply(T a, T b) { return static_cast<T>(static_cast<Unsigned>(a) * static_cast<Unsigned>(b)); }
  static T minimum(T a, T b) { return a < b ? a : b; }
  static T maximum(T a, T b) { return a > b ? a : b; }
  static T bit_and(T a, T b) { return static_cast<T>(a & b); }
  static T bit_or(T a, T b) { return static_cast<T>(a | b); }
  static T bit_xor(T a, T b) { return static_cast<T>(a ^ b); }
  static T divide(T sum, int divisor) { return static_cast<T>(sum / divisor); }
  static T settle(T value) { return value; }
};

template <class T>
struct Pair {
  T re, im;
};

template <class T>
struct Complex : Plain<Pair<T>> {
  using Part = Floating<T>;
  using P = Pair<T>;

  static P add(P a, P b) { return {a.re + b.re, a.im + b.im}; }
  static P multiply(P a, P b) { return {a.re * b.re - a.im * b.im, a.re * b.im + a.im * b.re}; }
  static P divide(P sum, int divisor) { return {Part::divide(sum.re, divisor), Part::divide(sum.im, divisor)}; }
  static P scale(P value, double factor) { return {Part::scale(value.re, factor), Part::scale(value.im, factor)}; }
  static P settle(P value) { return {Part::settle(value.re), Part::settle(value.im)}; }
};

float from_bfloat16(uint16_t bits) { return std::bit_cast<float>(uint32_t{bits} << 16); }

// Rounds to nearest even. Expects settled values: the quiet NaN without payload passes through the rounding unharmed.
uint16_t to_bfloat16(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

float from_float16(uint16_t bits) {
  const uint32_t sign = (bits & 0x8000u) << 16;
  const uint32_t exponent = bits >> 10 & 0x1f;
  const uint32_t fraction = bits & 0x3ff;
  if (exponent == 0) {  // zero or subnormal: fraction * 2^-24, exact in float32
    const float magnitude = static_cast<float>(fraction) * 0x1p-24f;
    return std::bit_cast<float>(sign | std::bit_cast<uint32_t>(magnitude));
  }
  const uint32_t widened = exponent == 31 ? 255 : exponent + 127 - 15;
  return std::bit_cast<float>(sign | widened << 23 | fraction << 13);
}

// Rounds to nearest even; as VCVTPS2PH does.
uint16_t to_float16(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint32_t sign = bits >> 16 & 0x8000;
  const uint32_t magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return 0x7e00;                                 // NaN
  if (magnitude >= 0x477ff000) return static_cast<uint16_t>(sign | 0x7c00);  // 65520 and above are infinite
  if (magnitude >= 0x38800000) {                                             // 2^-14 and above are normal
    const uint32_t rounded = magnitude + 0xfff + (magnitude >> 13 & 1);
    return static_cast<uint16_t>(sign | (rounded - ((127 - 15) << 23)) >> 13);
  }
  if (magnitude <= 0x33000000) return static_cast<uint16_t>(sign);  // half the smallest subnormal: a tie, to zero
  const uint32_t significand = (magnitude & 0x7fffff) | 0x800000;
  const uint32_t shift = 126 - (magnitude >> 23);  // 14..24: to units of 2^-24
  const uint32_t unit = significand >> shift;
  const uint32_t rest = significand & ((1u << shift) - 1);
  const uint32_t half = 1u << (shift - 1);
  const uint32_t up = rest > half || (rest == half && (unit & 1) != 0) ? 1 : 0;
  return static_cast<uint16_t>(sign | (unit + up));
}

template <float (*from)(uint16_t), uint16_t (*to)(float)>
struct SixteenBit : Floating<float> {
  static float load_fresh(const std::byte* p) { return from(Plain<uint16_t>::load_partial(p)); }
  static void store_final(std::byte* p, float value) { Plain<uint16_t>::store_partial(p, to(value)); }
};

template <>
struct Lane<DType::float32> : Floating<float> {};
template <>
struct Lane<DType::float64> : Floating<double> {};
template <>
struct Lane<DType::bfloat16> : SixteenBit<from_bfloat16, to_bfloat16> {};
template <>
struct Lane<DType::float16> : SixteenBit<from_float16, to_float16> {};
template <>
struct Lane<DType::int32> : Integer<int32_t> {};
template <>
struct Lane<DType::int64> : Integer<int64_t> {};
template <>
struct Lane<DType::uint8> : Integer<uint8_t> {};
template <>
struct Lane<DType::int8> : Integer<int8_t> {};
template <>
struct Lane<DType::int16> : Integer<int16_t> {};
template <>
struct Lane<DType::complex64> : Complex<float> {};
template <>
struct Lane<DType::complex128> : Complex<double> {};

// Whatever nonzero byte stands for true, or is the larger and and is the smaller of two; the result becomes 0 or 1.
template <>
struct Lane<DType::boolean> : Integer<uint8_t> {
  static uint8_t add(uint8_t a, uint8_t b) { return maximum(a, b); }
  static uint8_t multiply(uint8_t a, uint8_t b) { return minimum(a, b); }
  static uint8_t bit_and(uint8_t a, uint8_t b) { return minimum(a, b); }
  static uint8_t bit_xor(uint8_t a, uint8_t b) { return (a != 0) != (b != 0); }
  static uint8_t settle(uint8_t value) { return value != 0; }
};

constexpr Folds kFolds = every_fold(std::make_integer_sequence<int, kDTypes>{});

}  // namespace

void reduce_scalar(const Reduction& r, size_t begin, size_t end) {
  kFolds.of[static_cast<int>(r.spec.dtype)][static_cast<int>(r.spec.op)](r, begin, end);
}

}  // namespace hxcomm
