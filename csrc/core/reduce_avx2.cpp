// Reduce kernels for x86 with AVX2 and F16C. The pragma, not a compiler flag, selects the instructions: it must come
// before every include, and the includes must bring no inline function that others link against (reduce_kernels.h).
#if defined(__x86_64__)
#pragma GCC target("avx2,f16c")
#include <immintrin.h>

#include <cstdint>

#include "core/reduce_kernels.h"

namespace hxcomm {
namespace {

struct Float32x8 {
  using Register = __m256;
  static constexpr size_t kLanes = 8;
  static constexpr size_t kRegisters = 4;

  static __m256 load_partial(const std::byte* p) { return _mm256_loadu_ps(reinterpret_cast<const float*>(p)); }
  static void store_partial(std::byte* p, __m256 r) { _mm256_storeu_ps(reinterpret_cast<float*>(p), r); }
  static __m256 load_fresh(const std::byte* p) { return load_partial(p); }
  static void store_final(std::byte* p, __m256 r) { store_partial(p, r); }

  static __m256 add(__m256 a, __m256 b) { return _mm256_add_ps(a, b); }
  static __m256 multiply(__m256 a, __m256 b) { return _mm256_mul_ps(a, b); }
  // VMINPS returns its second operand for equal zeros and for NaN. Asked both ways round, the two answers differ only
  // there: or gives -0.0 before +0.0 (and, for the maximum, +0.0), and the mask makes any NaN a NaN.
  static __m256 minimum(__m256 a, __m256 b) {
    return _mm256_or_ps(_mm256_or_ps(_mm256_min_ps(a, b), _mm256_min_ps(b, a)), _mm256_cmp_ps(a, b, _CMP_UNORD_Q));
  }
  static __m256 maximum(__m256 a, __m256 b) {
    return _mm256_or_ps(_mm256_and_ps(_mm256_max_ps(a, b), _mm256_max_ps(b, a)), _mm256_cmp_ps(a, b, _CMP_UNORD_Q));
  }
  static __m256 divide(__m256 sum, int divisor) {
    return _mm256_div_ps(sum, _mm256_set1_ps(static_cast<float>(divisor)));
  }
  static __m256 scale(__m256 r, double factor) { return _mm256_mul_ps(r, _mm256_set1_ps(static_cast<float>(factor))); }
  static __m256 settle(__m256 r) {
    const __m256 quiet_nan = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fc00000));
    return _mm256_blendv_ps(r, quiet_nan, _mm256_cmp_ps(r, r, _CMP_UNORD_Q));
  }
};

struct Float64x4 {
  using Register = __m256d;
  static constexpr size_t kLanes = 4;
  static constexpr size_t kRegisters = 4;

  static __m256d load_partial(const std::byte* p) { return _mm256_loadu_pd(reinterpret_cast<const double*>(p)); }
  static void store_partial(std::byte* p, __m256d r) { _mm256_storeu_pd(reinterpret_cast<double*>(p), r); }
  static __m256d load_fresh(const std::byte* p) { return load_partial(p); }
  static void store_final(std::byte* p, __m256d r) { store_partial(p, r); }

  static __m256d add(__m256d a, __m256d b) { return _mm256_add_pd(a, b); }
  static __m256d multiply(__m256d a, __m256d b) { return _mm256_mul_pd(a, b); }
  static __m256d minimum(__m256d a, __m256d b) {
    return _mm256_or_pd(_mm256_or_pd(_mm256_min_pd(a, b), _mm256_min_pd(b, a)), _mm256_cmp_pd(a, b, _CMP_UNORD_Q));
  }
  static __m256d maximum(__m256d a, __m256d b) {
    return _mm256_or_pd(_mm256_and_pd(_mm256_max_pd(a, b), _mm256_max_pd(b, a)), _mm256_cmp_pd(a, b, _CMP_UNORD_Q));
  }
  static __m256d divide(__m256d sum, int divisor) {
    return _mm256_div_pd(sum, _mm256_set1_pd(static_cast<double>(divisor)));
  }
  static __m256d scale(__m256d r, double factor) { return _mm256_mul_pd(r, _mm256_set1_pd(factor)); }
  static __m256d settle(__m256d r) {
    const __m256d quiet_nan = _mm256_castsi256_pd(_mm256_set1_epi64x(0x7ff8000000000000));
    return _mm256_blendv_pd(r, quiet_nan, _mm256_cmp_pd(r, r, _CMP_UNORD_Q));
  }
};

// Re and im side by side. A product is re * (c, d) -/+ im * (d, c), as the scalar one rounds it.
struct Complex64x4 : Float32x8 {
  static constexpr size_t kLanes = 4;
  static __m256 multiply(__m256 a, __m256 b) {
    const __m256 crossed = _mm256_mul_ps(_mm256_movehdup_ps(a), _mm256_permute_ps(b, 0xb1));
    return _mm256_addsub_ps(_mm256_mul_ps(_mm256_moveldup_ps(a), b), crossed);
  }
};

struct Complex128x2 : Float64x4 {
  static constexpr size_t kLanes = 2;
  static __m256d multiply(__m256d a, __m256d b) {
    const __m256d crossed = _mm256_mul_pd(_mm256_permute_pd(a, 0xf), _mm256_permute_pd(b, 0x5));
    return _mm256_addsub_pd(_mm256_mul_pd(_mm256_movedup_pd(a), b), crossed);
  }
};

__m128i load_128(const std::byte* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }
void store_128(std::byte* p, __m128i r) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), r); }

// 16 elements as two registers: elements 0-3 and 8-11, and 4-7 and 12-15, which is how the 256-bit unpack and pack
// instructions split and join them. 1.5x as fast as single registers of eight widened by VPMOVZXWD (27 to 38 GB/s).
struct BFloat16x16 {
  struct Register {
    __m256 a, b;
  };
  static constexpr size_t kLanes = 16;
  static constexpr size_t kRegisters = 2;

  static Register load_fresh(const std::byte* p) {
    const __m256i packed = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    const __m256i zero = _mm256_setzero_si256();
    return {_mm256_castsi256_ps(_mm256_unpacklo_epi16(zero, packed)),
            _mm256_castsi256_ps(_mm256_unpackhi_epi16(zero, packed))};
  }
  static Register load_partial(const std::byte* p) {
    const __m256 low = Float32x8::load_partial(p), high = Float32x8::load_partial(p + 32);
    return {_mm256_permute2f128_ps(low, high, 0x20), _mm256_permute2f128_ps(low, high, 0x31)};
  }
  static void store_partial(std::byte* p, Register r) {
    Float32x8::store_partial(p, _mm256_permute2f128_ps(r.a, r.b, 0x20));
    Float32x8::store_partial(p + 32, _mm256_permute2f128_ps(r.a, r.b, 0x31));
  }
  static void store_final(std::byte* p, Register r) {
    const __m256i packed = _mm256_packus_epi32(rounded(r.a), rounded(r.b));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), packed);
  }
  // The upper halves, to nearest even: half of the last place is added, less one bit where the place is even.
  static __m256i rounded(__m256 r) {
    const __m256i bits = _mm256_castps_si256(r);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i sum = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
    return _mm256_srli_epi32(sum, 16);
  }

  static Register add(Register x, Register y) { return {Float32x8::add(x.a, y.a), Float32x8::add(x.b, y.b)}; }
  static Register multiply(Register x, Register y) {
    return {Float32x8::multiply(x.a, y.a), Float32x8::multiply(x.b, y.b)};
  }
  static Register minimum(Register x, Register y) {
    return {Float32x8::minimum(x.a, y.a), Float32x8::minimum(x.b, y.b)};
  }
  static Register maximum(Register x, Register y) {
    return {Float32x8::maximum(x.a, y.a), Float32x8::maximum(x.b, y.b)};
  }
  static Register divide(Register r, int divisor) {
    return {Float32x8::divide(r.a, divisor), Float32x8::divide(r.b, divisor)};
  }
  static Register scale(Register r, double factor) {
    return {Float32x8::scale(r.a, factor), Float32x8::scale(r.b, factor)};
  }
  static Register settle(Register r) { return {Float32x8::settle(r.a), Float32x8::settle(r.b)}; }
};

struct Float16x8 : Float32x8 {
  static __m256 load_fresh(const std::byte* p) { return _mm256_cvtph_ps(load_128(p)); }
  static void store_final(std::byte* p, __m256 r) {
    store_128(p, _mm256_cvtps_ph(r, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
};

struct IntegerRegister {
  using Register = __m256i;
  static constexpr size_t kRegisters = 4;

  static __m256i load_partial(const std::byte* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  static void store_partial(std::byte* p, __m256i r) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), r); }
  static __m256i load_fresh(const std::byte* p) { return load_partial(p); }
  static void store_final(std::byte* p, __m256i r) { store_partial(p, r); }
  static __m256i bit_and(__m256i a, __m256i b) { return _mm256_and_si256(a, b); }
  static __m256i bit_or(__m256i a, __m256i b) { return _mm256_or_si256(a, b); }
  static __m256i bit_xor(__m256i a, __m256i b) { return _mm256_xor_si256(a, b); }
  static __m256i settle(__m256i r) { return r; }
  static __m256i divide(__m256i r, int) { return r; }  // never called: reduce_avx2() hands these on
};

struct Int32x8 : IntegerRegister {
  static constexpr size_t kLanes = 8;
  static __m256i add(__m256i a, __m256i b) { return _mm256_add_epi32(a, b); }
  static __m256i multiply(__m256i a, __m256i b) { return _mm256_mullo_epi32(a, b); }
  static __m256i minimum(__m256i a, __m256i b) { return _mm256_min_epi32(a, b); }
  static __m256i maximum(__m256i a, __m256i b) { return _mm256_max_epi32(a, b); }
};

struct Int64x4 : IntegerRegister {
  static constexpr size_t kLanes = 4;
  static __m256i add(__m256i a, __m256i b) { return _mm256_add_epi64(a, b); }
  // low * low + ((high * low + low * high) << 32), from 32 x 32 -> 64 bit products.
  static __m256i multiply(__m256i a, __m256i b) {
    const __m256i cross = _mm256_mullo_epi32(a, _mm256_shuffle_epi32(b, 0xb1));
    const __m256i high = _mm256_slli_epi64(_mm256_add_epi64(cross, _mm256_srli_epi64(cross, 32)), 32);
    return _mm256_add_epi64(_mm256_mul_epu32(a, b), high);
  }
  static __m256i minimum(__m256i a, __m256i b) { return _mm256_blendv_epi8(a, b, _mm256_cmpgt_epi64(a, b)); }
  static __m256i maximum(__m256i a, __m256i b) { return _mm256_blendv_epi8(b, a, _mm256_cmpgt_epi64(a, b)); }
};

struct Int16x16 : IntegerRegister {
  static constexpr size_t kLanes = 16;
  static __m256i add(__m256i a, __m256i b) { return _mm256_add_epi16(a, b); }
  static __m256i multiply(__m256i a, __m256i b) { return _mm256_mullo_epi16(a, b); }
  static __m256i minimum(__m256i a, __m256i b) { return _mm256_min_epi16(a, b); }
  static __m256i maximum(__m256i a, __m256i b) { return _mm256_max_epi16(a, b); }
};

struct UInt8x32 : IntegerRegister {
  static constexpr size_t kLanes = 32;
  static __m256i add(__m256i a, __m256i b) { return _mm256_add_epi8(a, b); }
  static __m256i multiply(__m256i a, __m256i b) {
    const __m256i even = _mm256_and_si256(_mm256_mullo_epi16(a, b), _mm256_set1_epi16(0xff));
    const __m256i odd = _mm256_mullo_epi16(_mm256_srli_epi16(a, 8), _mm256_srli_epi16(b, 8));
    return _mm256_or_si256(even, _mm256_slli_epi16(odd, 8));
  }
  static __m256i minimum(__m256i a, __m256i b) { return _mm256_min_epu8(a, b); }
  static __m256i maximum(__m256i a, __m256i b) { return _mm256_max_epu8(a, b); }
};

// Sums and products of bytes have the same low bits whether these are signed or not.
struct Int8x32 : UInt8x32 {
  static __m256i minimum(__m256i a, __m256i b) { return _mm256_min_epi8(a, b); }
  static __m256i maximum(__m256i a, __m256i b) { return _mm256_max_epi8(a, b); }
};

struct Boolx32 : UInt8x32 {
  static __m256i add(__m256i a, __m256i b) { return maximum(a, b); }
  static __m256i multiply(__m256i a, __m256i b) { return minimum(a, b); }
  static __m256i bit_and(__m256i a, __m256i b) { return minimum(a, b); }
  static __m256i bit_xor(__m256i a, __m256i b) { return _mm256_xor_si256(settle(a), settle(b)); }
  static __m256i settle(__m256i r) { return _mm256_min_epu8(r, _mm256_set1_epi8(1)); }
};

template <>
struct Lane<DType::float32> : Float32x8 {};
template <>
struct Lane<DType::float64> : Float64x4 {};
template <>
struct Lane<DType::bfloat16> : BFloat16x16 {};
template <>
struct Lane<DType::float16> : Float16x8 {};
template <>
struct Lane<DType::int32> : Int32x8 {};
template <>
struct Lane<DType::int64> : Int64x4 {};
template <>
struct Lane<DType::uint8> : UInt8x32 {};
template <>
struct Lane<DType::boolean> : Boolx32 {};
template <>
struct Lane<DType::int8> : Int8x32 {};
template <>
struct Lane<DType::int16> : Int16x16 {};
template <>
struct Lane<DType::complex64> : Complex64x4 {};
template <>
struct Lane<DType::complex128> : Complex128x2 {};

constexpr Folds kFolds = every_fold(std::make_integer_sequence<int, kDTypes>{});

}  // namespace

void reduce_avx2(const Reduction& r, size_t begin, size_t end) {
  if (r.spec.op == ReduceOp::avg && r.spec.final &&
      kDTypeTable[static_cast<int>(r.spec.dtype)].kind == DTypeKind::integer)
    return reduce_scalar(r, begin, end);  // AVX2 divides no integers, and the division costs more than all the rest
  kFolds.of[static_cast<int>(r.spec.dtype)][static_cast<int>(r.spec.op)](r, begin, end);
}

void copy_avx2(void* destination, const void* source, size_t nbytes) {
  auto* to = static_cast<unsigned char*>(destination);
  const auto* from = static_cast<const unsigned char*>(source);
  if (nbytes < 256) {
    __builtin_memcpy(to, from, nbytes);
    return;
  }
  // The first 32 bytes unaligned, then stores that never cross a cache line; the last 128 unaligned again.
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
  const size_t first = 32 - (reinterpret_cast<uintptr_t>(to) & 31);
  const auto copy_128 = [&](size_t at) {
    const auto* f = reinterpret_cast<const __m256i*>(from + at);
    auto* t = reinterpret_cast<__m256i*>(to + at);
    const __m256i a = _mm256_loadu_si256(f), b = _mm256_loadu_si256(f + 1);
    const __m256i c = _mm256_loadu_si256(f + 2), d = _mm256_loadu_si256(f + 3);
    _mm256_storeu_si256(t, a);
    _mm256_storeu_si256(t + 1, b);
    _mm256_storeu_si256(t + 2, c);
    _mm256_storeu_si256(t + 3, d);
  };
  for (size_t at = first; at + 128 <= nbytes; at += 128) copy_128(at);
  copy_128(nbytes - 128);
}

}  // namespace hxcomm
#endif
