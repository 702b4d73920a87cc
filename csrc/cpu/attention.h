// Helpers shared by the operators of attention over whole sequences.
#pragma once

#include "kernels/attention.h"
#include "operator.h"

namespace kernels {

// The tensors that an operator reads. They keep the memory alive.
struct AttentionTensors {
  Tensor q, k, v;
  OptionalTensor slopes, ends_q, ends_k;  // ends: cu_seqlens
};

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

// Checks the inputs of both passes, and sets `a`.
inline AttentionTensors set_inputs(AttentionInputs& a, const Tensor& q, const Tensor& k,
                                   const Tensor& v, const OptionalTensor& cu_seqlens_q,
                                   const OptionalTensor& cu_seqlens_k,
                                   std::optional<double> softmax_scale, int64_t window_left,
                                   int64_t window_right, double softcap,
                                   const OptionalTensor& alibi_slopes) {
  const bool packed = cu_seqlens_q.has_value();
  const int64_t dim = packed ? 3 : 4;
  for (const Tensor* x : {&q, &k, &v}) {
    require(is_on_cpu(*x, q.scalar_type()) && x->dim() == dim &&
            x->size(dim - 1) == q.size(dim - 1));
  }
  require(same_shape(v, k) && (packed || (!cu_seqlens_k && k.size(0) == q.size(0))));
  require(softcap == 0 || (softcap >= FLT_MIN && softcap <= FLT_MAX));
  const int64_t heads = q.size(dim - 2), kv_heads = k.size(dim - 2), head_dim = q.size(dim - 1);
  a.dtype = required_dtype(q);
  require_heads(heads, kv_heads, head_dim);
  a.scale = scale_of(softmax_scale, head_dim);
  a.softcap = static_cast<float>(softcap);
  a.left = window_bound(window_left);
  a.right = window_bound(window_right);
  a.batch = packed ? 1 : q.size(0);
  a.seqlen_q = q.size(dim - 3);
  a.seqlen_k = k.size(dim - 3);
  a.heads = static_cast<int>(heads);
  a.kv_heads = static_cast<int>(kv_heads);
  a.head_dim = static_cast<int>(head_dim);
  a.lse_stride = a.seqlen_q;
  AttentionTensors tensors{
      with_unit_stride(q), with_unit_stride(k), with_unit_stride(v), {}, {}, {}};
  a.q = heads_of(tensors.q);
  a.k = heads_of(tensors.k);
  a.v = heads_of(tensors.v);
  int64_t sequences = a.batch;
  if (packed) {
    const int64_t entries = cu_seqlens_q->numel();
    require(entries > 0);
    tensors.ends_q = vector_of(*cu_seqlens_q, ScalarType::Int, entries);
    tensors.ends_k =
        cu_seqlens_k ? vector_of(*cu_seqlens_k, ScalarType::Int, entries) : *tensors.ends_q;
    sequences = entries - 1;
  }
  if (alibi_slopes) {
    tensors.slopes = slopes_of(*alibi_slopes, sequences, heads);
    a.slopes = static_cast<const float*>(tensors.slopes->data_ptr());
    a.slope_stride = tensors.slopes->dim() == 2 ? heads : 0;
  }
  return tensors;
}

// Returns the shape of the log-sum-exp.
inline std::vector<int64_t> lse_sizes(const AttentionInputs& a, bool packed) {
  if (packed) return {a.heads, a.seqlen_q};
  return {a.batch, a.heads, a.seqlen_q};
}

}  // namespace kernels
