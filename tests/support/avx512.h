// The AVX-512 intrinsics of csrc on processors that have only AVX2: a vector is two AVX2 registers.
// Compile a kernel with `-include` of this file; with -DWITH_BF16, it has AVX-512 BF16, too. Results
// are those of the instructions, except the payloads of NaN.
#pragma once

#include <cstdint>

#include <immintrin.h>

// Defined after immintrin.h, which would otherwise expect the compiler to have AVX-512.
#define __AVX512F__ 1
#ifdef WITH_BF16
#define __AVX512BF16__ 1
#endif

namespace {
namespace emulated {

// Calls keep the code small: GCC takes minutes for a kernel with inlined intrinsics.
#define EMULATED __attribute__((noinline, unused))

typedef uint32_t Words __attribute__((vector_size(32)));

// Returns part i of x, which has the type To.
template <typename To, typename From>
inline To part(From x, int i) {
  To to;
  __builtin_memcpy(&to, reinterpret_cast<const char*>(&x) + i * sizeof to, sizeof to);
  return to;
}

template <typename To, typename From>
inline To join(From low, From high) {
  static_assert(sizeof(To) == 2 * sizeof(From), "two halves");
  To to;
  __builtin_memcpy(&to, &low, sizeof low);
  __builtin_memcpy(reinterpret_cast<char*>(&to) + sizeof low, &high, sizeof high);
  return to;
}

// Calls function(low halves), then function(high halves), and joins the results.
template <typename To, typename Function, typename... Halves>
inline To halves(Function function, Halves... x) {
  return join<To>(function(part<__m256>(x, 0)...), function(part<__m256>(x, 1)...));
}

EMULATED __m512 fmadd(__m512 a, __m512 b, __m512 c) {
  return halves<__m512>([](auto... x) { return _mm256_fmadd_ps(x...); }, a, b, c);
}
EMULATED __m512 max(__m512 a, __m512 b) {
  return halves<__m512>([](auto... x) { return _mm256_max_ps(x...); }, a, b);
}
EMULATED __m512 min(__m512 a, __m512 b) {
  return halves<__m512>([](auto... x) { return _mm256_min_ps(x...); }, a, b);
}

// Reduces halves, as the intrinsics do.
template <typename Function>
inline float reduced(__m512 x, Function function) {
  const __m256 eight = function(part<__m256>(x, 1), part<__m256>(x, 0));
  float lanes[8];
  __builtin_memcpy(lanes, &eight, sizeof lanes);
  const auto of = [&](float a, float b) {
    return function(_mm256_set1_ps(a), _mm256_set1_ps(b))[0];
  };
  float four[4];
  for (int i = 0; i < 4; ++i) four[i] = of(lanes[i + 4], lanes[i]);
  return of(of(four[0], four[2]), of(four[1], four[3]));
}
EMULATED float sum(__m512 x) {
  return reduced(x, [](__m256 a, __m256 b) { return a + b; });
}
EMULATED float largest(__m512 x) {
  return reduced(x, [](__m256 a, __m256 b) { return _mm256_max_ps(a, b); });
}

// Returns x 2^n for integers n, rounded once.
EMULATED __m512 scalef(__m512 x, __m512 n) {
  for (int i = 0; i < 16; ++i) {
    const uint64_t bits = static_cast<uint64_t>(static_cast<int>(n[i]) + 1023) << 52;
    double power;
    __builtin_memcpy(&power, &bits, sizeof power);
    x[i] = static_cast<float>(x[i] * power);
  }
  return x;
}

EMULATED __m512 blocks(__m512 a, __m512 b, int order) {
  const __m256 low = join<__m256>(part<__m128>(a, order & 3), part<__m128>(a, order >> 2 & 3));
  return join<__m512>(low, join<__m256>(part<__m128>(b, order >> 4 & 3),
                                        part<__m128>(b, order >> 6)));
}

EMULATED __m512i widened_shorts(__m256i x) {
  return join<__m512i>(_mm256_cvtepu16_epi32(part<__m128i>(x, 0)),
                       _mm256_cvtepu16_epi32(part<__m128i>(x, 1)));
}
EMULATED __m512i widened_bytes(__m128i x) {
  return join<__m512i>(_mm256_cvtepi8_epi32(x), _mm256_cvtepi8_epi32(_mm_srli_si128(x, 8)));
}
EMULATED __m256i narrowed(__m512i x) {
  typedef uint32_t From __attribute__((vector_size(64)));
  typedef uint16_t To __attribute__((vector_size(32)));
  return (__m256i)__builtin_convertvector((From)x, To);
}
EMULATED __m512 from_integers(__m512i x) {
  return halves<__m512>([](__m256 y) { return _mm256_cvtepi32_ps((__m256i)y); }, x);
}
EMULATED __m512 from_half(__m256i x) {
  return join<__m512>(_mm256_cvtph_ps(part<__m128i>(x, 0)), _mm256_cvtph_ps(part<__m128i>(x, 1)));
}
EMULATED __m256i to_half(__m512 x) {
  return halves<__m256i>([](__m256 y) { return _mm256_cvtps_ph(y, _MM_FROUND_TO_NEAREST_INT); }, x);
}

// Replaces subnormal numbers by zero.
inline __m256 flushed(__m256 x) {
  const Words bits = (Words)x;
  return (__m256)((bits & 0x7f800000u) == 0 ? bits & 0x80000000u : bits);
}
EMULATED __m256bh to_bfloat16(__m512 x) {
  return halves<__m256bh>(
      [](__m256 y) {
        const Words bits = (Words)flushed(y), nearest = bits + 0x7fffu + (bits >> 16 & 1u);
        const Words rounded = (y == y ? nearest : bits | 0x400000u) >> 16;
        typedef uint16_t To __attribute__((vector_size(16)));
        return __builtin_convertvector(rounded, To);
      },
      x);
}
EMULATED __m512bh to_bfloat16s(__m512 high, __m512 low) {
  return join<__m512bh>(to_bfloat16(low), to_bfloat16(high));
}

// Adds the product of the odd elements first.
EMULATED __m512 add_pair_products(__m512 sum, __m512bh a, __m512bh b) {
  return halves<__m512>(
      [](__m256 y, __m256 c, __m256 d) {
        const auto odd = [](__m256 z) { return flushed((__m256)((Words)z & 0xffff0000u)); };
        const auto even = [](__m256 z) { return flushed((__m256)((Words)z << 16)); };
        y = flushed(_mm256_fmadd_ps(odd(c), odd(d), flushed(y)));
        return flushed(_mm256_fmadd_ps(even(c), even(d), y));
      },
      sum, a, b);
}

}  // namespace emulated
}  // namespace

#define _mm512_fmadd_ps emulated::fmadd
#define _mm512_max_ps emulated::max
#define _mm512_min_ps emulated::min
#define _mm512_reduce_add_ps emulated::sum
#define _mm512_reduce_max_ps emulated::largest
#define _mm512_scalef_ps emulated::scalef
#define _mm512_shuffle_f32x4 emulated::blocks
#define _mm512_shuffle_ps(a, b, order) \
  emulated::halves<__m512>([](__m256 x, __m256 y) { return _mm256_shuffle_ps(x, y, order); }, a, b)
#define _mm512_cvtepu16_epi32 emulated::widened_shorts
#define _mm512_cvtepi8_epi32 emulated::widened_bytes
#define _mm512_cvtepi32_epi16 emulated::narrowed
#define _mm512_cvtepi32_ps emulated::from_integers
#define _mm512_cvtph_ps emulated::from_half
#define _mm512_cvtps_ph(x, rounding) emulated::to_half(x)
#define _mm512_cvtneps_pbh emulated::to_bfloat16
#define _mm512_cvtne2ps_pbh emulated::to_bfloat16s
#define _mm512_dpbf16_ps emulated::add_pair_products
