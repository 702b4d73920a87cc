// Each product is rounded before the two are added, and so is each result, subnormal or not: the
// bits are those of every other backend.
#include "rotary.h"

#include "vector.h"

namespace kernels::INSTRUCTION_SET {
namespace {

constexpr int kBlock = 256;  // numbers of x, whose angles are at hand for all heads
constexpr int kAhead = 16;   // heads further on, which are fetched meanwhile

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
void turn_heads(const Turned& t, int64_t token, int64_t first, int count, int64_t half,
                const Angles& angles) {
  for (int64_t head = 0; head < t.heads; ++head) {
    const T* x = static_cast<const T*>(t.x) + token * t.x_token_stride + head * t.x_head_stride;
    T* out = static_cast<T*>(t.out) + token * t.out_token_stride + head * t.out_head_stride;
    x += first;
    out += first;
    const T* next = x + kAhead * t.x_head_stride;
    T* next_out = out + kAhead * t.out_head_stride;
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

template <typename T>
void turn_tokens(const Rotary& r, int64_t begin, int64_t end) {
  const int64_t half = r.interleaved ? 0 : r.head_dim / 2, size = r.head_dim - half;
  const float sign = r.backwards ? -1.0f : 1.0f;
  for (int64_t token = begin; token < end; ++token) {
    const int64_t position = r.wide_positions ? static_cast<const int64_t*>(r.positions)[token]
                                              : static_cast<const int32_t*>(r.positions)[token];
    const float* cos = r.cos + position * r.cos_stride;
    const float* sin = r.sin + position * r.sin_stride;
    for (int64_t first = 0; first < size; first += kBlock) {
      const int count = size - first < kBlock ? static_cast<int>(size - first) : kBlock;
      Angles angles = {};
      for (int i = 0; i < count; ++i) {
        const int64_t pair = half ? first + i : (first + i) / 2;
        angles.cos[i] = cos[pair];
        angles.sin[i] = sin[pair] * (half || i % 2 ? sign : -sign);
      }
      turn_heads<T>(r.q, token, first, count, half, angles);
      turn_heads<T>(r.k, token, first, count, half, angles);
    }
  }
}

}  // namespace

void rotary(const Rotary& r, int64_t begin, int64_t end) {
  switch (r.dtype) {
    case DType::float32: return turn_tokens<float>(r, begin, end);
    case DType::float16: return turn_tokens<Half>(r, begin, end);
    case DType::bfloat16: return turn_tokens<ExactBFloat16>(r, begin, end);
  }
}

}  // namespace kernels::INSTRUCTION_SET
