#include "rotary.h"

#include "rotate.h"

namespace kernels::INSTRUCTION_SET {
namespace {

template <typename T>
TokenHeads<T> heads_of(const Rotated& r, int64_t token) {
  return {r.x.at<T>(0, token, 0), r.out.at<T>(0, token, 0), r.heads, r.x.head_stride,
          r.out.head_stride};
}

}  // namespace

void rotary(const Rotary& r, int64_t begin, int64_t end) {
  const float sign = r.inverse ? -1.0f : 1.0f;
  with_type<ExactBFloat16>(r.dtype, [&](auto number) {
    using T = decltype(number);
    for (int64_t token = begin; token < end; ++token) {
      const int64_t position = r.position_of(token);
      rotate_token(heads_of<T>(r.q, token), heads_of<T>(r.k, token),
                   r.cos + position * r.cos_stride, r.sin + position * r.sin_stride, r.head_dim,
                   r.interleaved, sign);
    }
  });
}

}  // namespace kernels::INSTRUCTION_SET
