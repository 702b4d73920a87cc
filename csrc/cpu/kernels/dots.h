// Dot products of a few rows with a few other rows, the main work of decoding.
//
// Each dot product is accumulated in the lanes of one float32 vector, in memory order. Its bits do
// not depend on the other rows of the tile.
#pragma once

#include "vector.h"

namespace kernels::INSTRUCTION_SET {
namespace {

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kRegisters = 32;
#else
constexpr int kRegisters = 16;
#endif

// The operand of one multiply-add. Numbers are converted to float32, except pairs of bfloat16, if
// one instruction adds both products. It flushes subnormal numbers to zero, as PyTorch's matrix
// products do.
template <typename T>
struct Factor {
  static constexpr int kSize = kLanes;
  Vec x;
};

template <typename T>
INLINE void multiply_add(Factor<T> a, Factor<T> b, Vec& sum) {
  sum = fma(a.x, b.x, sum);
}

template <typename T>
INLINE Factor<T> load_factor(const T* x, int count) {
  return {load(x, count)};
}

#if defined(HAS_PAIRS)
template <>
struct Factor<BFloat16> {
  static constexpr int kSize = 2 * kLanes;
  PairVec x;
};

INLINE void multiply_add(Factor<BFloat16> a, Factor<BFloat16> b, Vec& sum) {
  sum = add_pair_products(sum, a.x, b.x);
}

INLINE Factor<BFloat16> load_factor(const BFloat16* x, int count) {
  if (count == Factor<BFloat16>::kSize) return {load_as<PairVec>(x)};
  BFloat16 whole[Factor<BFloat16>::kSize] = {};
  __builtin_memcpy(whole, x, count * sizeof(BFloat16));
  return {load_as<PairVec>(whole)};
}
#endif

// Converts int8 to factors of T, which is exact for every T.
template <typename T>
INLINE Factor<T> load_factor_of(const int8_t* x, int count) {
  return {load(x, count)};
}

#if defined(HAS_PAIRS)
template <>
INLINE Factor<BFloat16> load_factor_of<BFloat16>(const int8_t* x, int count) {
  int8_t whole[Factor<BFloat16>::kSize] = {};
  if (count < Factor<BFloat16>::kSize) {
    __builtin_memcpy(whole, x, count);
    x = whole;
  }
  return {rounded_pairs(load(x), load(x + kLanes))};
}
#endif

// Rows of numbers. Each row begins `stride` elements after the previous one.
template <typename T>
struct Rows {
  const T* data;
  int64_t stride;
};

// Adds the products of row i of w and row j of x to totals[j * kW + i], lane by lane.
// load_w(i, first, count) returns `count` elements of row i of w, from element `first` on.
template <int kW, int kX, typename T, typename LoadW>
INLINE void add_products(LoadW load_w, Rows<T> x, int64_t size, Vec* totals) {
  constexpr int kSize = Factor<T>::kSize;
  const auto step = [&](int64_t first, int count) __attribute__((always_inline)) {
    Factor<T> w_factors[kW];
    for (int i = 0; i < kW; ++i) w_factors[i] = load_w(i, first, count);
    for (int j = 0; j < kX; ++j) {
      const Factor<T> factor = load_factor(x.data + j * x.stride + first, count);
      for (int i = 0; i < kW; ++i) multiply_add(w_factors[i], factor, totals[j * kW + i]);
    }
  };
  int64_t first = 0;
  for (; first + kSize <= size; first += kSize) step(first, kSize);
  if (first < size) step(first, static_cast<int>(size - first));
}

// Stores the dot product of row i of w and row j of x in products[j * kW + i].
template <int kW, int kX, typename T, typename LoadW>
INLINE void dots(LoadW load_w, Rows<T> x, int64_t size, float* products) {
  Vec totals[kX * kW] = {};
  add_products<kW, kX, T>(load_w, x, size, totals);
  sums(totals, products);
}

}  // namespace
}  // namespace kernels::INSTRUCTION_SET
