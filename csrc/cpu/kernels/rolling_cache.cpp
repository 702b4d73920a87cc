#include "rolling_cache.h"

#include "rotate.h"

namespace kernels::INSTRUCTION_SET {
namespace {

// Copies `count` tokens from consecutive tokens to consecutive slots, with as few memcpy calls as
// the strides allow.
template <typename T>
void copy_tokens(const Heads& from, int64_t token, const Heads& to, Slot slot, int64_t count,
                 const Update& u) {
  const int64_t head_dim = u.head_dim, width = head_dim * u.num_kv_heads;
  const bool whole = from.head_stride == head_dim && to.head_stride == head_dim;
  if (whole && from.token_stride == width && to.token_stride == width) {
    __builtin_memcpy(to.at<T>(slot.outer, slot.token, 0), from.at<T>(0, token, 0),
                     count * width * sizeof(T));
    return;
  }
  const int heads = whole ? 1 : u.num_kv_heads;
  for (int64_t i = 0; i < count; ++i) {
    for (int head = 0; head < heads; ++head) {
      __builtin_memcpy(to.at<T>(slot.outer, slot.token + i, head), from.at<T>(0, token + i, head),
                       (whole ? width : head_dim) * sizeof(T));
    }
  }
}

template <typename T>
void update(const Update& u, int64_t sequence, int64_t begin, int64_t end) {
  const int64_t start = u.cu_seqlens[sequence], count = u.cu_seqlens[sequence + 1] - start;
  const auto slot_at = [&](int64_t token) {
    return slot_of(u, sequence, static_cast<uint32_t>(u.lengths[sequence] + (token - start)));
  };
  for (int64_t token = begin; u.q.data && token < end; ++token) {
    const int64_t position = u.lengths[sequence] + (token - start);
    TokenHeads<T> k{};
    if (is_kept(token - start, count, u.capacity)) {
      const Slot slot = slot_at(token);
      k = {u.k.at<T>(0, token, 0), u.k_cache.at<T>(slot.outer, slot.token, 0), u.num_kv_heads,
           u.k.head_stride, u.k_cache.head_stride};
    }
    const TokenHeads<T> q = {u.q.at<T>(0, token, 0), u.q_out.at<T>(0, token, 0), u.num_heads,
                             u.q.head_stride, u.q_out.head_stride};
    rotate_token(q, k, u.cos + position * u.cos_stride, u.sin + position * u.sin_stride,
                 u.head_dim, u.interleaved, 1.0f);
  }
  while (begin < end && !is_kept(begin - start, count, u.capacity)) ++begin;
  while (begin < end) {  // copy runs of tokens with consecutive slots
    const Slot slot = slot_at(begin);
    const int64_t left = end - begin, free = u.page_size - slot.token;
    const int64_t run = left < free ? left : free;
    copy_tokens<T>(u.v, begin, u.v_cache, slot, run, u);
    if (!u.q.data) copy_tokens<T>(u.k, begin, u.k_cache, slot, run, u);
    begin += run;
  }
}

}  // namespace

void update_tokens(const Update& u, int64_t sequence, int64_t begin, int64_t end) {
  with_type<ExactBFloat16>(u.dtype, [&](auto number) {
    update<decltype(number)>(u, sequence, begin, end);
  });
}

}  // namespace kernels::INSTRUCTION_SET
