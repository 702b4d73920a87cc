// The rotation of one token's heads, in one instruction set. Each product is rounded before the two
// are added, and so is each result, subnormal or not: the bits are those of every other backend.
#pragma once

#include "vector.h"

namespace kernels::INSTRUCTION_SET {
namespace {

constexpr int kBlock = 256;  // numbers of x, whose angles are at hand for all heads
constexpr int kAhead = 16;   // heads further on, which are prefetched

// Heads of one token, and where they go: elsewhere, or to where they are. Strides in elements.
template <typename T>
struct TokenHeads {
  const T* x;
  T* out;
  int64_t heads, x_stride, out_stride;
};

// Of one token: cosines and sines of pairs, or interleaved: what a number and its partner in the
// pair are multiplied by.
struct Angles {
  float cos[kBlock], sin[kBlock];
};

INLINE Vec swap_neighbours(Vec x) {
  typedef uint64_t LongVec __attribute__((vector_size(4 * kLanes)));
  const LongVec pairs = (LongVec)x;
  return (Vec)(pairs << 32 | pairs >> 32);
}

// `count` numbers from `first` on of every head; half-split, as many half a head further on.
template <typename T>
void rotate_block(const TokenHeads<T>& t, int64_t first, int count, int64_t half,
                  const Angles& angles) {
  for (int64_t head = 0; head < t.heads; ++head) {
    const T* x = t.x + head * t.x_stride + first;
    T* out = t.out + head * t.out_stride + first;
    const T* next = x + kAhead * t.x_stride;
    T* next_out = out + kAhead * t.out_stride;
    for_each_vector(count, [&](int64_t i, int lanes) {
      __builtin_prefetch(next + i, 0, 2);
      __builtin_prefetch(next_out + i, 1, 2);
      const Vec cos = load(angles.cos + i), sin = load(angles.sin + i), a = load(x + i, lanes);
      if (half) {
        __builtin_prefetch(next + half + i, 0, 2);
        __builtin_prefetch(next_out + half + i, 1, 2);
        const Vec b = load(x + half + i, lanes);
        store(out + i, a * cos - b * sin, lanes);
        store(out + half + i, b * cos + a * sin, lanes);
      } else {
        store(out + i, a * cos + swap_neighbours(a) * sin, lanes);
      }
    });
  }
}

// Rotates the heads of q and k by one position's cosines and sines; by sign * angle.
template <typename T>
void rotate_token(const TokenHeads<T>& q, const TokenHeads<T>& k, const float* cos,
                  const float* sin, int64_t head_dim, bool interleaved, float sign) {
  const int64_t half = interleaved ? 0 : head_dim / 2, size = head_dim - half;
  for (int64_t first = 0; first < size; first += kBlock) {
    const int count = size - first < kBlock ? static_cast<int>(size - first) : kBlock;
    Angles angles = {};
    for (int i = 0; i < count; ++i) {
      const int64_t pair = half ? first + i : (first + i) / 2;
      angles.cos[i] = cos[pair];
      angles.sin[i] = sin[pair] * (half || i % 2 ? sign : -sign);
    }
    rotate_block(q, first, count, half, angles);
    rotate_block(k, first, count, half, angles);
  }
}

}  // namespace
}  // namespace kernels::INSTRUCTION_SET
