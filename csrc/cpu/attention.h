// Helpers shared by the operators of attention over whole sequences.
#pragma once

#include "../heads.h"
#include "operator.h"

namespace kernels {

// Returns the layout of (batch, seqlen, heads, head_dim), or of packed (tokens, heads, head_dim).
inline Heads heads_of(const Tensor& x) {
  const int64_t dim = x.dim();
  return {x.data_ptr(), dim == 4 ? x.stride(0) : 0, x.stride(dim - 3), x.stride(dim - 2)};
}

inline Heads from_token(Heads heads, int64_t token, DType dtype) {
  heads.data = static_cast<char*>(heads.data) + token * heads.token_stride * size_of(dtype);
  return heads;
}

// Returns a window bound to which positions can be added without overflow. -1 means unbounded.
inline int64_t window_bound(int64_t distance) {
  constexpr int64_t kUnbounded = int64_t{1} << 62;
  return distance < 0 ? kUnbounded : std::min(distance, kUnbounded);
}

// Returns the values of cu_seqlens, which are checked: they decide which memory is read.
inline const int32_t* checked_offsets(const Tensor& cu_seqlens, int64_t tokens,
                                      int64_t max_seqlen) {
  const auto* offsets = static_cast<const int32_t*>(cu_seqlens.data_ptr());
  const int64_t last = cu_seqlens.numel() - 1;
  require(offsets[0] == 0 && offsets[last] <= tokens);
  for (int64_t i = 0; i < last; ++i) {
    const int64_t length = int64_t{offsets[i + 1]} - offsets[i];
    require(length >= 0 && length <= max_seqlen);
  }
  return offsets;
}

// Returns ALiBi's slopes, (heads,) or (sequences, heads), as a contiguous tensor.
inline Tensor slopes_of(const Tensor& x, int64_t sequences, int64_t heads) {
  const int64_t dim = x.dim();
  require(is_on_cpu(x, ScalarType::Float) && (dim == 1 || dim == 2) && x.size(dim - 1) == heads);
  require(dim == 1 || x.size(0) == sequences);
  return as_contiguous(x);
}

}  // namespace kernels
