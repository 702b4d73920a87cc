// Vectors of float32 in the instruction set of the compiler flags.
//
// ops/compiler.py compiles every kernel once per instruction set and defines INSTRUCTION_SET as its
// name; instruction_sets.h selects one at run time. The linker must not replace code compiled for
// one set by code compiled for another, for example an inline function by its AVX-512 version.
// Therefore everything here has internal linkage, and kernels use only types of the standard
// library.
//
// ops/compiler.py compiles several kernel sources as one file. Names in their anonymous namespaces
// must therefore differ.
//
// The compiler does not contract a * b + c. Only fma() uses fused multiply-adds, if the instruction
// set has them.
#pragma once

#include "../../dtype.h"

#include <cstdint>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace kernels::INSTRUCTION_SET {
namespace {

#define INLINE __attribute__((always_inline)) inline

constexpr float kInfinity = __builtin_inff();

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;  // SSE2, NEON
#endif

// GCC and Clang vectors: operators and a ? b : c are elementwise; casts keep the bits.
typedef float Vec __attribute__((vector_size(4 * kLanes)));
typedef int32_t IntVec __attribute__((vector_size(4 * kLanes)));
typedef uint32_t UintVec __attribute__((vector_size(4 * kLanes)));
typedef uint16_t ShortVec __attribute__((vector_size(2 * kLanes)));

struct Half {
  uint16_t bits;
};

struct BFloat16 {
  uint16_t bits;
};

struct ExactBFloat16 : BFloat16 {};  // stored without flushing subnormal numbers to zero

// A vector of pairs of bfloat16, if the instruction set has products of them.
#if defined(__AVX512BF16__)
#define HAS_PAIRS 1
typedef __m512bh PairVec;
#elif defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
#define HAS_PAIRS 1
typedef bfloat16x8_t PairVec;
#endif

INLINE Vec splat(float x) { return x - Vec{}; }

INLINE Vec fma(Vec a, Vec b, Vec c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__AVX2__)
  return _mm256_fmadd_ps(a, b, c);
#elif defined(__aarch64__)
  return vfmaq_f32(c, a, b);
#else
  return a * b + c;
#endif
}

// Elementwise maximum; NaN where b is NaN. Intrinsics, because GCC often compares and blends.
INLINE Vec max(Vec a, Vec b) {
#if defined(__AVX512F__)
  return _mm512_max_ps(a, b);
#elif defined(__AVX2__)
  return _mm256_max_ps(a, b);
#else
  return a > b ? a : b;
#endif
}

INLINE Vec min(Vec a, Vec b) {
#if defined(__AVX512F__)
  return _mm512_min_ps(a, b);
#elif defined(__AVX2__)
  return _mm256_min_ps(a, b);
#else
  return a < b ? a : b;
#endif
}

INLINE Vec abs(Vec x) { return (Vec)((UintVec)x & 0x7fffffffu); }

INLINE float sum(Vec x) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps(x);
#elif defined(__AVX2__)
  const __m128 fours = _mm256_castps256_ps128(x) + _mm256_extractf128_ps(x, 1);
  const __m128 pairs = fours + _mm_movehl_ps(fours, fours);
  return pairs[0] + pairs[1];
#else
  float total = x[0];
  for (int i = 1; i < kLanes; ++i) total += x[i];
  return total;
#endif
}

// Stores sum(x[i]) in results[i], with the same bits as sum().
template <int kCount>
INLINE void sums(const Vec (&x)[kCount], float* results) {
#if defined(__AVX512F__)
  if constexpr (kCount == 16) {
    // Each step adds the halves of two vectors and packs both results into one vector.
    __m512 blocks[4], pairs[2];
    for (int i = 0; i < 4; ++i) {
      __m512 quarters[2];
      for (int j = 0; j < 2; ++j) {
        const __m512 a = x[i + 8 * j], b = x[i + 8 * j + 4];
        quarters[j] = _mm512_shuffle_f32x4(a, b, 0x44) + _mm512_shuffle_f32x4(a, b, 0xee);
      }
      blocks[i] = _mm512_shuffle_f32x4(quarters[0], quarters[1], 0x88) +
                  _mm512_shuffle_f32x4(quarters[0], quarters[1], 0xdd);
    }
    for (int i = 0; i < 2; ++i) {
      const __m512 a = blocks[2 * i], b = blocks[2 * i + 1];
      pairs[i] = _mm512_shuffle_ps(a, b, 0x44) + _mm512_shuffle_ps(a, b, 0xee);
    }
    const Vec all = _mm512_shuffle_ps(pairs[0], pairs[1], 0x88) +
                    _mm512_shuffle_ps(pairs[0], pairs[1], 0xdd);
    __builtin_memcpy(results, &all, sizeof all);
    return;
  }
#elif defined(__AVX2__)
  if constexpr (kCount % 4 == 0) {
    for (int i = 0; i < kCount; i += 4) {
      __m128 fours[4], pairs[2];
      for (int j = 0; j < 4; ++j) {
        fours[j] = _mm256_castps256_ps128(x[i + j]) + _mm256_extractf128_ps(x[i + j], 1);
      }
      for (int j = 0; j < 2; ++j) {
        const __m128 a = fours[2 * j], b = fours[2 * j + 1];
        pairs[j] = _mm_movelh_ps(a, b) + _mm_movehl_ps(b, a);
      }
      const __m128 all = _mm_shuffle_ps(pairs[0], pairs[1], 0x88) +
                         _mm_shuffle_ps(pairs[0], pairs[1], 0xdd);
      __builtin_memcpy(results + i, &all, sizeof all);
    }
    return;
  }
#endif
  for (int i = 0; i < kCount; ++i) results[i] = sum(x[i]);
}

INLINE float max(Vec x) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps(x);
#else
  float largest = x[0];
  for (int i = 1; i < kLanes; ++i) largest = x[i] > largest ? x[i] : largest;
  return largest;
#endif
}

// x + kRounder - kRounder rounds x to an integer n. The low bits of x + kRounder are n + 254.
constexpr float kRounder = 0x1.8p23f + 254.0f;

// Returns x 2^n, where `shifted` is n + kRounder for integers n in [-252, 254].
INLINE Vec times_power_of_2(Vec x, Vec shifted) {
#if defined(__AVX512F__)
  return _mm512_scalef_ps(x, shifted - kRounder);
#else
  // Two factors are needed, because 2^128 overflows and 2^-149 underflows. Their exponents, with a
  // bias of 127 each, add up to n + 254.
  const UintVec both = (UintVec)shifted, first = both >> 1;
  return x * (Vec)(first << 23) * (Vec)((both - first) << 23);
#endif
}

constexpr float kLog2E = 0x1.715476p0f;

// Returns e^(x - n ln(2)) for integers n next to x / ln(2).
INLINE Vec exp_remainder(Vec x, Vec n) {
  Vec r = fma(n, splat(-0.693359375f), x);  // exact, with or without fma
  r = fma(n, splat(2.12194440e-4f), r);
  Vec p = fma(splat(1.9875691500e-4f), r, splat(1.3981999507e-3f));
  p = fma(p, r, splat(8.3334519073e-3f));
  p = fma(p, r, splat(4.1665795894e-2f));
  p = fma(p, r, splat(1.6666665459e-1f));
  p = fma(p, r, splat(5.0000001201e-1f));
  return fma(p * r, r, r) + 1.0f;
}

// Returns 2^x for |x| <= 1/2, with a relative error of 2^-18.
INLINE Vec rough_exp2(Vec x) {
  Vec p = fma(splat(0.00957010034f), x, splat(0.0559178591f));
  p = fma(p, x, splat(0.240247443f));
  p = fma(p, x, splat(0.693121791f));
  return fma(p, x, splat(0.999999285f));
}

// Returns e^x, accurate to about 1 ulp, with underflow to 0, overflow to infinity, and NaN for NaN.
INLINE Vec exp(Vec x) {
  x = min(splat(89.0f), max(splat(-104.0f), x));
  const Vec shifted = fma(x, splat(kLog2E), splat(kRounder));
  return times_power_of_2(exp_remainder(x, shifted - kRounder), shifted);
}

// The same for x <= 88, with fewer instructions and underflow to 0 below 2^-126. If kRough, the
// relative error is 2^-18 or, for large |x|, |x| 2^-24: enough for results of 16 bits.
template <bool kRough>
INLINE Vec exp_below_88(Vec x) {
  x = max(splat(-88.0f), x);
  // The lowest bits of `shifted` are n + 127: the exponent of 2^n, and that of 0 for n = -127.
  const Vec rounder = splat(kRounder - 127.0f);
  const Vec shifted = fma(x, splat(kLog2E), rounder), n = shifted - rounder;
  const Vec p = kRough ? rough_exp2(fma(x, splat(kLog2E), -n)) : exp_remainder(x, n);
  return p * (Vec)((UintVec)shifted << 23);
}

// Returns e^x roughly for any x; results above 2^127.5 are infinity.
INLINE Vec rough_exp(Vec x) { return exp_below_88<true>(min(splat(89.0f), x)); }

// Near 0, where 1 - 2 / (e^2x + 1) suffers from cancellation, a polynomial with a relative error of
// 4e-8 is used.
INLINE Vec tanh(Vec x) {
  const Vec square = x * x;
  Vec p = fma(splat(0.0164375f), square, splat(-0.05267176f));
  p = fma(p, square, splat(0.13320724f));
  p = fma(p, square, splat(-0.33332947f));
  const Vec near = fma(p * square, x, x);
  const Vec far = 1.0f - 2.0f / (exp(2.0f * abs(x)) + 1.0f);
  return abs(x) < 0.55f ? near : x < 0.0f ? -far : far;
}

template <typename To, typename From>
INLINE To load_as(const From* x) {
  To to;
  __builtin_memcpy(&to, x, sizeof to);
  return to;
}

INLINE Vec load(const float* x) { return load_as<Vec>(x); }
INLINE void store(float* to, Vec x) { __builtin_memcpy(to, &x, sizeof x); }

// Intrinsics, because GCC converts vectors in two halves and, on Arm, one number at a time.
INLINE UintVec widened(ShortVec x) {
#if defined(__AVX512F__)
  return (UintVec)_mm512_cvtepu16_epi32((__m256i)x);
#elif defined(__AVX2__)
  return (UintVec)_mm256_cvtepu16_epi32((__m128i)x);
#elif defined(__aarch64__)
  return (UintVec)vmovl_u16((uint16x4_t)x);
#else
  return __builtin_convertvector(x, UintVec);
#endif
}

// x < 2^16.
INLINE ShortVec narrowed(UintVec x) {
#if defined(__AVX512F__)
  return (ShortVec)_mm512_cvtepi32_epi16((__m512i)x);
#elif defined(__AVX2__)
  return (ShortVec)_mm_packus_epi32(_mm256_castsi256_si128((__m256i)x),
                                    _mm256_extracti128_si256((__m256i)x, 1));
#else
  return __builtin_convertvector(x, ShortVec);
#endif
}

INLINE Vec load(const BFloat16* x) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  // One shuffle of two copies of the numbers, because Zen 2 has one unit for shifts.
  const __m256i to_upper_halves = _mm256_set_epi64x(0x0f0effff0d0cffff, 0x0b0affff0908ffff,
                                                    0x0706ffff0504ffff, 0x0302ffff0100ffff);
  const __m256i copies = _mm256_broadcastsi128_si256(load_as<__m128i>(x));
  return (Vec)_mm256_shuffle_epi8(copies, to_upper_halves);
#else
  return (Vec)(widened(load_as<ShortVec>(x)) << 16);
#endif
}

// Returns the bits of x rounded to bfloat16, to nearest and ties to even, in the upper halves. The
// lower halves are unspecified.
INLINE UintVec bfloat16_bits(Vec x) {
  const UintVec bits = (UintVec)x, nan = UintVec{} + 0x7fc00000u;
  return x == x ? bits + 0x7fffu + ((bits >> 16) & 1u) : nan;
}

INLINE void store(ExactBFloat16* to, Vec x) {
  const ShortVec rounded = narrowed(bfloat16_bits(x) >> 16);
  __builtin_memcpy(to, &rounded, sizeof rounded);
}

// The AVX-512 BF16 instruction flushes subnormal numbers to zero. Both instructions keep the
// payload of NaN.
INLINE void store(BFloat16* to, Vec x) {
#if defined(__AVX512BF16__)
  const auto rounded = _mm512_cvtneps_pbh(x);
  __builtin_memcpy(to, &rounded, sizeof rounded);
#elif defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
  const auto rounded = vcvt_bf16_f32(x);
  __builtin_memcpy(to, &rounded, sizeof rounded);
#else
  store(static_cast<ExactBFloat16*>(to), x);
#endif
}

INLINE Vec load(const Half* x) {
#if defined(__AVX512F__)
  return _mm512_cvtph_ps(load_as<__m256i>(x));
#elif defined(__AVX2__)
  return _mm256_cvtph_ps(load_as<__m128i>(x));
#elif defined(__aarch64__)
  return vcvt_f32_f16(load_as<float16x4_t>(x));
#else
  const UintVec bits = __builtin_convertvector(load_as<ShortVec>(x), UintVec);
  const UintVec magnitude = bits & 0x7fffu;
  // Normal numbers, infinity and NaN: rebias the exponent. Subnormal numbers: subtracting 0.5
  // normalizes them.
  const Vec normal = (Vec)((magnitude << 13) + (0xe0u << 23)) * 0x1.0p-112f;
  const Vec subnormal = (Vec)(magnitude | (126u << 23)) - 0.5f;
  const Vec x_abs = magnitude < 0x400u ? subnormal : normal;
  return (Vec)((UintVec)x_abs | ((bits & 0x8000u) << 16));
#endif
}

INLINE void store(Half* to, Vec x) {
#if defined(__AVX512F__)
  const auto rounded = _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__AVX2__)
  const auto rounded = _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__aarch64__)
  const auto rounded = vcvt_f16_f32(x);
#else
  // The scaling overflows to infinity past the largest Half. Adding 2^(e + 13), or 2^-1 for
  // subnormal numbers, rounds to the precision of Half and moves its bits to the lowest ones.
  const UintVec bits = (UintVec)x, magnitude = bits & 0x7fffffffu;
  const Vec scaled = abs(x) * 0x1.0p112f * 0x1.0p-110f;
  UintVec exponent = (bits << 1) & 0xff000000u;
  exponent = exponent < 0x71000000u ? UintVec{} + 0x71000000u : exponent;
  const UintVec sum = (UintVec)((Vec)((exponent >> 1) + 0x07800000u) + scaled);
  const UintVec number = ((sum >> 13) & 0x7c00u) + (sum & 0xfffu);
  const UintVec half = magnitude > 0x7f800000u ? UintVec{} + 0x7e00u : number;
  const auto rounded = __builtin_convertvector(half | ((bits >> 16) & 0x8000u), ShortVec);
#endif
  __builtin_memcpy(to, &rounded, sizeof rounded);
}

INLINE Vec load(const int8_t* x) {
#if defined(__AVX512F__)
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(load_as<__m128i>(x)));
#elif defined(__AVX2__)
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_cvtsi64_si128(load_as<int64_t>(x))));
#elif defined(__x86_64__)
  // Unpack four copies of each byte; the arithmetic shift keeps the highest, sign-extended.
  __m128i bytes = _mm_cvtsi32_si128(load_as<int32_t>(x));
  bytes = _mm_unpacklo_epi8(bytes, bytes);
  return _mm_cvtepi32_ps(_mm_srai_epi32(_mm_unpacklo_epi16(bytes, bytes), 24));
#elif defined(__aarch64__)
  const int8x8_t bytes = vreinterpret_s8_s32(vdup_n_s32(load_as<int32_t>(x)));
  return vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(bytes))));
#else
  typedef int8_t ByteVec __attribute__((vector_size(kLanes)));
  return __builtin_convertvector(load_as<ByteVec>(x), Vec);
#endif
}

#if defined(HAS_PAIRS)
// Adds both products of each pair to the sum. Subnormal numbers are flushed to zero. Each addition
// is rounded to nearest with AVX-512, and to odd, with an error below 1 ulp, on Arm.
INLINE Vec add_pair_products(Vec sum, PairVec a, PairVec b) {
#if defined(__AVX512BF16__)
  return _mm512_dpbf16_ps(sum, a, b);
#else
  return vbfdotq_f32(sum, a, b);
#endif
}

// Rounds consecutive numbers to pairs.
INLINE PairVec rounded_pairs(Vec low, Vec high) {
#if defined(__AVX512BF16__)
  return _mm512_cvtne2ps_pbh(high, low);
#else
  return vcvtq_high_bf16_f32(vcvtq_low_bf16_f32(low), high);
#endif
}
#endif

// Returns x rounded to T.
template <typename T>
INLINE Vec rounded(Vec x) {
  T whole[kLanes];
  store(whole, x);
  return load(whole);
}
#if !defined(__AVX512BF16__) && !defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
template <>
INLINE Vec rounded<BFloat16>(Vec x) {
  return (Vec)(bfloat16_bits(x) & 0xffff0000u);
}
#endif

// Loads `count` numbers; further lanes are 0.
template <typename T>
INLINE Vec load(const T* x, int count) {
  if (count == kLanes) return load(x);
  T whole[kLanes] = {};
  __builtin_memcpy(whole, x, count * sizeof(T));
  return load(whole);
}

template <typename T>
INLINE void store(T* to, Vec x, int count) {
  if (count == kLanes) return store(to, x);
  T whole[kLanes];
  store(whole, x);
  __builtin_memcpy(to, whole, count * sizeof(T));
}

// Returns body(number), called with a value of the type for this dtype; Brain for bfloat16.
template <typename Brain = BFloat16, typename Body>
INLINE auto with_type(DType dtype, Body body) {
  switch (dtype) {
    case DType::float16: return body(Half{});
    case DType::bfloat16: return body(Brain{});
    default: return body(float{});
  }
}

// Numbers per cache line.
template <typename T>
constexpr int kLine = 64 / sizeof(T);

// Calls body(first, count) for each vector of kLanes numbers, and for the remainder.
template <typename Body>
INLINE void for_each_vector(int64_t size, Body body) {
  int64_t first = 0;
  for (; first + kLanes <= size; first += kLanes) body(first, kLanes);
  if (first < size) body(first, static_cast<int>(size - first));
}

// Prefetches x[begin : begin + count] into L2, unless x is null.
template <typename T>
INLINE void prefetch(const T* x, int64_t begin, int count) {
  if (!x) return;
  for (int i = 0; i < count; i += kLine<T>) __builtin_prefetch(x + begin + i, 0, 2);
}

// As above, and prefetches the same elements of `ahead`, once per cache line.
template <typename Body, typename T, typename... More>
INLINE void for_each_vector(int64_t size, Body body, const T* ahead, const More*... more) {
  int64_t begin = 0;
  for (; begin + kLine<T> <= size; begin += kLine<T>) {
    prefetch(ahead, begin, kLine<T>);
    (prefetch(more, begin, kLine<T>), ...);
    for (int i = 0; i < kLine<T>; i += kLanes) body(begin + i, kLanes);
  }
  for_each_vector(size - begin, [&](int64_t i, int lanes) { body(begin + i, lanes); });
}

}  // namespace
}  // namespace kernels::INSTRUCTION_SET
