// Products of a small left matrix with a packed right matrix, the main work of attention and of
// linear layers with many rows.
//
// Products work on units of 32 bits: a float32 or, if an instruction multiplies them, a pair of
// bfloat16. One instruction multiplies a unit with a vector of units. The left matrix is stored in
// rows. The right matrix is stored in tiles of kCols columns; within a tile, the kCols units of one
// step of the inner dimension are contiguous.
#pragma once

#include "vector.h"

#include <utility>

namespace kernels::INSTRUCTION_SET {
namespace {

// Size of the accumulator tile in registers: rows, and vectors per row.
constexpr int kRows = 6;
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kVecs = 4;
#else
constexpr int kVecs = 2;
#endif
constexpr int kCols = kVecs * kLanes;

constexpr int kMaxHeadDim = 256;

// Returns the lanes of a and b that the indices select; those of b begin at kLanes.
template <int... kIndex>
INLINE Vec shuffle(Vec a, Vec b) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, kIndex...);
#else
  return __builtin_shuffle(a, b, IntVec{kIndex...});
#endif
}

// Exchanges the second of two consecutive blocks of kSize lanes in a for the first in b.
template <int kSize, int... kLane>
INLINE void exchange_blocks(Vec& a, Vec& b, std::integer_sequence<int, kLane...>) {
  const Vec first = shuffle<(kLane & kSize ? kLane + kLanes - kSize : kLane)...>(a, b);
  b = shuffle<(kLane & kSize ? kLane + kLanes : kLane + kSize)...>(a, b);
  a = first;
}

// Interleaves the lanes of a and b inside each block of 128 bits: the first two, and the last two.
template <int... kLane>
INLINE void interleave(Vec& a, Vec& b, std::integer_sequence<int, kLane...>) {
  const Vec low = shuffle<(kLane & ~3) + (kLane & 3) / 2 + (kLane & 1) * kLanes...>(a, b);
  b = shuffle<(kLane & ~3) + (kLane & 3) / 2 + (kLane & 1) * kLanes + 2 ...>(a, b);
  a = low;
}

// Transposes a matrix of kLanes rows and columns of 32-bit units in registers: first its blocks of
// 4 x 4, then the units of each block.
INLINE void transpose(Vec (&x)[kLanes]) {
  constexpr std::make_integer_sequence<int, kLanes> lanes{};
  if constexpr (kLanes == 16) {
    for (int i = 0; i < 8; ++i) exchange_blocks<8>(x[i], x[i + 8], lanes);
  }
  if constexpr (kLanes >= 8) {
    for (int i = 0; i < kLanes; ++i) {
      if (!(i & 4)) exchange_blocks<4>(x[i], x[i + 4], lanes);
    }
  }
  for (int i = 0; i < kLanes; i += 4) {
    for (int j = i; j < i + 2; ++j) interleave(x[j], x[j + 2], lanes);
    for (int j = i; j < i + 4; j += 2) interleave(x[j], x[j + 1], lanes);
  }
}

INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

INLINE int64_t clamp(int64_t x, int64_t low, int64_t high) {
  return x < low ? low : x > high ? high : x;
}

// The unit of a product: one float32.
struct SingleUnit {
  using Number = float;
  static constexpr int kWidth = 1;  // numbers per unit

  static INLINE Vec multiply_add(const Number* a, Vec b, Vec sum) { return fma(splat(*a), b, sum); }
  static INLINE Vec exponential(Vec x) { return exp(x); }
};

#if defined(HAS_PAIRS)
// The unit of a product: a pair of bfloat16.
struct PairUnit {
  using Number = BFloat16;
  static constexpr int kWidth = 2;

  static INLINE Vec multiply_add(const Number* a, Vec b, Vec sum) {
    return add_pair_products(sum, (PairVec)(IntVec{} + load_as<int32_t>(a)), (PairVec)b);
  }
  static INLINE Vec exponential(Vec x) { return rough_exp(x); }
};
#else
using PairUnit = SingleUnit;
#endif

INLINE SingleUnit unit_of(float) { return {}; }
INLINE SingleUnit unit_of(Half) { return {}; }
INLINE PairUnit unit_of(BFloat16) { return {}; }

// Returns body(number, unit), called with values of the types for this dtype.
template <typename Body>
INLINE auto with_units(DType dtype, Body body) {
  return with_type(dtype, [&](auto number) { return body(number, unit_of(number)); });
}

// Unrolls a loop over accumulators. Otherwise GCC keeps them in memory: half the speed with AVX2.
#define UNROLL _Pragma("GCC unroll 8")

// c = a b, or c += a b if `accumulate`, for kR rows and the columns of one tile. b_stride is the
// number of units between the steps of the tile: a float32 matrix in rows is a right matrix too.
template <int kR, typename Unit, typename Number = typename Unit::Number>
void multiply_rows(const Number* a, int64_t a_stride, const Number* b, int steps, float* c,
                   int64_t c_stride, bool accumulate, int64_t b_stride) {
  Vec sums[kR][kVecs] = {};
  if (accumulate) {
    UNROLL for (int r = 0; r < kR; ++r) {
      UNROLL for (int i = 0; i < kVecs; ++i) sums[r][i] = load(c + r * c_stride + i * kLanes);
    }
  }
  for (int step = 0; step < steps; ++step) {
    Vec factors[kVecs];
    for (int i = 0; i < kVecs; ++i) factors[i] = load_as<Vec>(b + i * kLanes * Unit::kWidth);
    for (int r = 0; r < kR; ++r) {
      for (int i = 0; i < kVecs; ++i) {
        sums[r][i] = Unit::multiply_add(a + r * a_stride, factors[i], sums[r][i]);
      }
    }
    a += Unit::kWidth;
    b += b_stride * Unit::kWidth;
  }
  UNROLL for (int r = 0; r < kR; ++r) {
    UNROLL for (int i = 0; i < kVecs; ++i) store(c + r * c_stride + i * kLanes, sums[r][i]);
  }
}

// The same for any number of rows.
template <typename Unit, typename Number = typename Unit::Number>
void multiply(const Number* a, int64_t a_stride, int rows, const Number* b, int steps, float* c,
              int64_t c_stride, bool accumulate, int64_t b_stride = kCols) {
  for (; rows >= kRows; rows -= kRows) {
    multiply_rows<kRows, Unit>(a, a_stride, b, steps, c, c_stride, accumulate, b_stride);
    a += kRows * a_stride;
    c += kRows * c_stride;
  }
  const auto rest = rows == 5   ? multiply_rows<5, Unit>
                    : rows == 4 ? multiply_rows<4, Unit>
                    : rows == 3 ? multiply_rows<3, Unit>
                    : rows == 2 ? multiply_rows<2, Unit>
                                : multiply_rows<1, Unit>;
  if (rows) rest(a, a_stride, b, steps, c, c_stride, accumulate, b_stride);
}

// Converts one head of a token and pads it with zeros up to `size`.
template <typename T, typename Number>
INLINE void convert(const T* from, int head_dim, Number* to, int size) {
  for_each_vector(head_dim, [&](int64_t i, int count) {
    store(to + i, load(from + i, count), count);
  });
  for (int i = head_dim; i < size; ++i) to[i] = Number{};
}

}  // namespace
}  // namespace kernels::INSTRUCTION_SET
