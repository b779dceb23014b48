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
  static __m256d settle(__m256d r) {
    const __m256d quiet_nan = _mm256_castsi256_pd(_mm256_set1_epi64x(0x7ff8000000000000));
    return _mm256_blendv_pd(r, quiet_nan, _mm256_cmp_pd(r, r, _CMP_UNORD_Q));
  }
};

__m128i load_128(const std::byte* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }
void store_128(std::byte* p, __m128i r) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), r); }

struct BFloat16x8 : Float32x8 {
  static __m256 load_fresh(const std::byte* p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load_128(p)), 16));
  }
  // To nearest even: adds half of the last place, less one where the result would be odd only for that.
  static void store_final(std::byte* p, __m256 r) {
    const __m256i bits = _mm256_castps_si256(r);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i upper = _mm256_srli_epi32(rounded, 16);
    store_128(p, _mm_packus_epi32(_mm256_castsi256_si128(upper), _mm256_extracti128_si256(upper, 1)));
  }
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
  static __m256i settle(__m256i r) { return r; }
  static __m256i divide(__m256i r, int) { return r; }  // AVX2 divides no integers: reduce_avx2 hands that on
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

struct Boolx32 : UInt8x32 {
  static __m256i add(__m256i a, __m256i b) { return maximum(a, b); }
  static __m256i multiply(__m256i a, __m256i b) { return minimum(a, b); }
  static __m256i settle(__m256i r) { return _mm256_min_epu8(r, _mm256_set1_epi8(1)); }
};

template <>
struct Lane<DType::float32> : Float32x8 {};
template <>
struct Lane<DType::float64> : Float64x4 {};
template <>
struct Lane<DType::bfloat16> : BFloat16x8 {};
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

constexpr Folds kFolds = every_fold(std::make_integer_sequence<int, kDTypes>{});

}  // namespace

void reduce_avx2(const Reduction& r, size_t begin, size_t end) {
  kFolds.of[static_cast<int>(r.spec.dtype)][static_cast<int>(r.spec.op)](r, begin, end);
}

}  // namespace hxcomm
#endif
