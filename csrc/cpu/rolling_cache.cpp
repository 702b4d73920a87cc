// The update on the CPU: one pass over the new tokens, spread over PyTorch's threads.
#include "../rolling_cache.h"
#include "../torch_checks.h"

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstring>

// Compiled twice, and chosen by the processor when the library is loaded.
#if defined(__x86_64__) && defined(__GLIBC__) && !defined(__clang__)
#define FOR_EACH_CPU __attribute__((target_clones("avx2", "default")))
#else
#define FOR_EACH_CPU
#endif

namespace rolling_cache {
namespace {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

// The compiler makes vectors of these loops: nothing aliases, nothing branches.
template <typename T>
__attribute__((always_inline)) inline void rotate_head(const T* __restrict x, T* __restrict out,
                                                       const float* __restrict cos,
                                                       const float* __restrict sin, int half,
                                                       bool interleaved) {
  if (interleaved) {
    for (int i = 0; i < half; ++i) {
      const Pair y = rotate({float(x[2 * i]), float(x[2 * i + 1])}, cos[i], sin[i]);
      out[2 * i] = T(y.a);
      out[2 * i + 1] = T(y.b);
    }
  } else {
    for (int i = 0; i < half; ++i) {
      const Pair y = rotate({float(x[i]), float(x[i + half])}, cos[i], sin[i]);
      out[i] = T(y.a);
      out[i + half] = T(y.b);
    }
  }
}

// Not templates: GCC clones ordinary functions only.
#define ROTATE_HEAD(name, T)                                                                    \
  FOR_EACH_CPU void name(const char* x, char* out, const float* cos, const float* sin, int half, \
                         bool interleaved) {                                                    \
    rotate_head(reinterpret_cast<const T*>(x), reinterpret_cast<T*>(out), cos, sin, half,       \
                interleaved);                                                                   \
  }
ROTATE_HEAD(rotate_float, float)
ROTATE_HEAD(rotate_half, Half)
ROTATE_HEAD(rotate_bfloat16, BFloat16)

// Copies `count` tokens that follow one another on both sides, in the largest pieces there are.
void copy_tokens(const Heads& from, int64_t token, const Heads& to, Slot slot, int64_t count,
                 const Update& u) {
  const int64_t head_bytes = int64_t{u.head_dim} * u.element_size();
  const int64_t token_bytes = head_bytes * u.num_kv_heads;
  const bool whole = from.head_stride == head_bytes && to.head_stride == head_bytes;
  if (whole && from.token_stride == token_bytes && to.token_stride == token_bytes) {
    std::memcpy(to.at(slot.outer, slot.token, 0), from.at(0, token, 0), count * token_bytes);
    return;
  }
  const int heads = whole ? 1 : u.num_kv_heads;
  for (int64_t i = 0; i < count; ++i) {
    for (int head = 0; head < heads; ++head) {
      std::memcpy(to.at(slot.outer, slot.token + i, head), from.at(0, token + i, head),
                  whole ? token_bytes : head_bytes);
    }
  }
}

void rotate_token(const Heads& from, int64_t token, const Heads& to, Slot slot, int heads,
                  uint32_t position, const Update& u) {
  const auto rotate_one = u.dtype == DType::float32   ? rotate_float
                          : u.dtype == DType::float16 ? rotate_half
                                                      : rotate_bfloat16;
  const float* cos = u.cos + position * u.cos_stride;
  const float* sin = u.sin + position * u.sin_stride;
  for (int head = 0; head < heads; ++head) {
    rotate_one(from.at(0, token, head), to.at(slot.outer, slot.token, head), cos, sin,
               u.head_dim / 2, u.interleaved);
  }
}

// Tokens [begin, end) of q, k and v, all of one sequence.
void update_tokens(const Update& u, int64_t sequence, int64_t begin, int64_t end) {
  const int64_t start = u.cu_seqlens[sequence], count = u.cu_seqlens[sequence + 1] - start;
  const auto position = [&](int64_t token) {
    return static_cast<uint32_t>(u.lengths[sequence] + (token - start));
  };
  for (int64_t token = begin; u.q.data && token < end; ++token) {
    rotate_token(u.q, token, u.q_out, {0, token}, u.num_heads, position(token), u);
  }
  while (begin < end && !is_kept(begin - start, count, u.capacity)) ++begin;
  while (begin < end) {  // tokens whose slots follow one another
    const Slot slot = slot_of(u, sequence, position(begin));
    const int64_t run = std::min(end - begin, u.page_size - slot.token);
    copy_tokens(u.v, begin, u.v_cache, slot, run, u);
    if (!u.q.data) copy_tokens(u.k, begin, u.k_cache, slot, run, u);
    for (int64_t i = 0; u.q.data && i < run; ++i) {
      rotate_token(u.k, begin + i, u.k_cache, {slot.outer, slot.token + i}, u.num_kv_heads,
                   position(begin + i), u);
    }
    begin += run;
  }
}

}  // namespace

const char* update(const Update& u, void*) {
  const int64_t token_bytes =
      (u.num_heads + 2 * int64_t{u.num_kv_heads}) * u.head_dim * u.element_size();
  const int64_t grain = std::max<int64_t>((int64_t{1} << 17) / token_bytes, 1);  // worth a thread
  const int32_t *offsets = u.cu_seqlens, *last = offsets + u.batch;
  torch::stable::parallel_for(0, *last, grain, [&](int64_t begin, int64_t end) {
    // The sequence of the first token: the last one that begins at it or before.
    int64_t sequence = std::upper_bound(offsets, last, begin) - offsets - 1;
    for (; begin < end; ++sequence) {
      const int64_t stop = std::min<int64_t>(end, offsets[sequence + 1]);
      update_tokens(u, sequence, begin, stop);
      begin = stop;
    }
  });
  return nullptr;
}

}  // namespace rolling_cache
