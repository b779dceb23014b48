// What the bit patterns of each dtype mean, in long double arithmetic: the reference of reduce_test.cpp, which shares
// nothing with the conversions of the kernels.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "core/types.h"

namespace hxcomm {

struct Format {
  int fraction_bits, exponent_bits;
};

// Of a floating dtype.
inline Format format_of(DType dtype) {
  if (dtype == DType::float64) return {52, 11};
  if (dtype == DType::bfloat16) return {7, 8};
  if (dtype == DType::float16) return {10, 5};
  return {23, 8};
}

inline uint64_t quiet_nan(DType dtype) {
  const Format f = format_of(dtype);
  return ((uint64_t{1} << (f.exponent_bits + 1)) - 1) << (f.fraction_bits - 1);
}

// Of a finite pattern; also of infinity, as the power of two that would follow the largest finite value.
inline long double decode(DType dtype, uint64_t bits) {
  if (dtype == DType::int8) return static_cast<int8_t>(bits);
  if (dtype == DType::int16) return static_cast<int16_t>(bits);
  if (dtype == DType::int32) return static_cast<int32_t>(bits);
  if (dtype == DType::int64) return static_cast<long double>(static_cast<int64_t>(bits));
  if (!is_floating(dtype)) return static_cast<long double>(bits);
  const Format f = format_of(dtype);
  const int bias = (1 << (f.exponent_bits - 1)) - 1;
  const uint64_t fraction = bits & ((uint64_t{1} << f.fraction_bits) - 1);
  const int exponent = static_cast<int>(bits >> f.fraction_bits) & ((1 << f.exponent_bits) - 1);
  const uint64_t significand = exponent == 0 ? fraction : fraction | uint64_t{1} << f.fraction_bits;
  const long double magnitude =
      std::ldexp(static_cast<long double>(significand), std::max(exponent, 1) - bias - f.fraction_bits);
  return (bits >> (f.fraction_bits + f.exponent_bits) & 1) != 0 ? -magnitude : magnitude;
}

// The pattern nearest to value, ties to even; integers wrap.
inline uint64_t encode(DType dtype, long double value) {
  if (!is_floating(dtype)) {
    const uint64_t bits = static_cast<uint64_t>(static_cast<int64_t>(value));
    return item_size(dtype) == 8 ? bits : bits & ((uint64_t{1} << (8 * item_size(dtype))) - 1);
  }
  const Format f = format_of(dtype);
  const int bias = (1 << (f.exponent_bits - 1)) - 1;
  const uint64_t sign = uint64_t{std::signbit(value)} << (f.fraction_bits + f.exponent_bits);
  const uint64_t infinity = ((uint64_t{1} << f.exponent_bits) - 1) << f.fraction_bits;
  if (value == 0) return sign;
  const int exponent = std::max(std::isinf(value) ? bias + 1 : std::ilogb(value), 1 - bias);
  if (exponent > bias) return sign | infinity;
  const uint64_t units =
      static_cast<uint64_t>(std::nearbyint(std::ldexp(std::fabs(value), f.fraction_bits - exponent)));
  // units carries the leading one of a normal value into the exponent field, as it does a rounding to the next power.
  return sign | ((static_cast<uint64_t>(exponent + bias - 1) << f.fraction_bits) + units);
}

}  // namespace hxcomm
