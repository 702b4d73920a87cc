// The rotation of one token's heads, in one instruction set. Each product is rounded before the two
// are added, and subnormal results are kept, so that results are bit-identical on every backend.
#pragma once

#include "vector.h"

namespace kernels::INSTRUCTION_SET {
namespace {

constexpr int kChannels = 256;   // channels per block; all heads share the angles of a block
constexpr int kHeadsAhead = 16;  // distance of the prefetches

// The heads of one token and their output. `out` may be `x`. Strides are in elements.
template <typename T>
struct TokenHeads {
  const T* x;
  T* out;
  int64_t heads, x_stride, out_stride;
};

// The angles of one token for a block of channels. Half-split: the cosine and sine of each pair.
// Interleaved: for each channel, the factors of the channel itself and of its partner in the pair.
struct Angles {
  float cos[kChannels], sin[kChannels];
};

INLINE Vec swap_pairs(Vec x) {
  typedef uint64_t LongVec __attribute__((vector_size(4 * kLanes)));
  const LongVec pairs = (LongVec)x;
  return (Vec)(pairs << 32 | pairs >> 32);
}

// Rotates channels [first, first + count) of every head. Half-split pairs: the partner of channel i
// is channel i + `half`. Interleaved pairs: `half` is 0, and partners are adjacent.
template <typename T>
void rotate_block(const TokenHeads<T>& t, int64_t first, int count, int64_t half,
                  const Angles& angles) {
  for (int64_t head = 0; head < t.heads; ++head) {
    const T* x = t.x + head * t.x_stride + first;
    T* out = t.out + head * t.out_stride + first;
    const T *next = x + kHeadsAhead * t.x_stride, *next_half = half ? next + half : nullptr;
    const T *next_out = out + kHeadsAhead * t.out_stride;
    const T *next_out_half = half ? next_out + half : nullptr;
    const auto rotate = [&](int64_t i, int lanes) {
      const Vec cos = load(angles.cos + i), sin = load(angles.sin + i), a = load(x + i, lanes);
      if (half) {
        const Vec b = load(x + half + i, lanes);
        store(out + i, a * cos - b * sin, lanes);
        store(out + half + i, b * cos + a * sin, lanes);
      } else {
        store(out + i, a * cos + swap_pairs(a) * sin, lanes);
      }
    };
    for_each_vector(count, rotate, next, next_half, next_out, next_out_half);
  }
}

// Rotates the heads of q and k by sign * angle, given the cosines and sines of one position.
template <typename T>
void rotate_token(const TokenHeads<T>& q, const TokenHeads<T>& k, const float* cos,
                  const float* sin, int64_t head_dim, bool interleaved, float sign) {
  const int64_t half = interleaved ? 0 : head_dim / 2, size = head_dim - half;
  for (int64_t first = 0; first < size; first += kChannels) {
    const int count = size - first < kChannels ? static_cast<int>(size - first) : kChannels;
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
