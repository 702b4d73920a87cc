// Conditions and layouts shared by the operators for the CPU.
#pragma once

#include "../operator.h"
#include "instruction_sets.h"

#include <cfloat>
#include <cmath>

#include <torch/csrc/stable/ops.h>

namespace kernels {

inline int64_t width_of(const Tensor& x) { return x.dim() ? x.size(x.dim() - 1) : 1; }

inline bool same_shape(const Tensor& x, const Tensor& y) {
  const auto a = x.sizes(), b = y.sizes();
  return a.size() == b.size() && std::equal(a.begin(), a.end(), b.begin());
}

inline bool is_on_cpu(const Tensor& x, ScalarType dtype) {
  return x.is_cpu() && x.scalar_type() == dtype;
}

// A tensor as a sequence of parts: the last one or two dimensions. Part i begins i * outer_stride
// elements after the first. `x` is a copy if the parts are not evenly spaced or the last dimension
// is not contiguous.
struct Parts {
  Tensor x;
  int64_t outer_stride, inner_stride;  // inner: stride of the second to last dimension
};

inline std::optional<Parts> parts_without_copy(const Tensor& x, int64_t inner_dims) {
  const auto sizes = x.sizes(), strides = x.strides();
  const int64_t dim = static_cast<int64_t>(sizes.size());
  int64_t next = 1;  // stride of the next outer dimension if the parts are evenly spaced
  for (int64_t i = std::max<int64_t>(dim - inner_dims, 0); i < dim; ++i) next *= sizes[i];
  Parts parts{x, next, dim > 1 ? strides[dim - 2] : 0};
  if (x.numel() == 0) return parts;
  if (dim && sizes[dim - 1] > 1 && strides[dim - 1] != 1) return std::nullopt;
  bool is_first = true;
  for (int64_t i = dim - inner_dims - 1; i >= 0; --i) {
    if (sizes[i] == 1) continue;
    if (is_first) {
      parts.outer_stride = strides[i];
    } else if (strides[i] != next) {
      return std::nullopt;
    }
    is_first = false;
    next = strides[i] * sizes[i];
  }
  return parts;
}

inline Tensor as_contiguous(const Tensor& x) {
  return x.is_contiguous() ? x : torch::stable::contiguous(x);
}

// Returns x, or a copy if its last dimension is not contiguous.
inline Tensor with_unit_stride(const Tensor& x) {
  const int64_t last = x.dim() - 1;
  return x.size(last) <= 1 || x.stride(last) == 1 ? x : torch::stable::contiguous(x);
}

inline Parts parts_of(const Tensor& x, int64_t inner_dims) {
  if (auto parts = parts_without_copy(x, inner_dims)) return *std::move(parts);
  return *parts_without_copy(torch::stable::contiguous(x), inner_dims);
}

// Returns the rows of x, which must have the shape and dtype of `like`.
inline Parts rows_like(const Tensor& x, const Tensor& like) {
  require(is_on_cpu(x, like.scalar_type()) && same_shape(x, like));
  return parts_of(x, 1);
}

// Returns x as a contiguous tensor. x must have this dtype and one dimension of this size.
inline Tensor vector_of(const Tensor& x, ScalarType dtype, int64_t size) {
  require(is_on_cpu(x, dtype) && x.dim() == 1 && x.numel() == size);
  return as_contiguous(x);
}

constexpr int64_t kMaxHeadDim = 256;

// Requires sizes that the attention kernels support.
inline void require_heads(int64_t heads, int64_t kv_heads, int64_t head_dim) {
  require(heads > 0 && heads <= INT32_MAX && kv_heads > 0 && heads % kv_heads == 0);
  require(head_dim > 0 && head_dim <= kMaxHeadDim);
}

// Returns the factor of the attention scores: by default 1 / sqrt(head_dim).
inline float scale_of(const std::optional<double>& softmax_scale, int64_t head_dim) {
  const double scale = softmax_scale.value_or(std::pow(static_cast<double>(head_dim), -0.5));
  require(scale > 0 && scale <= FLT_MAX);
  return static_cast<float>(scale);
}

// Returns the minimal number of rows per thread.
inline int64_t grain(int64_t width) {
  constexpr int64_t kElements = 1 << 15;
  return std::max<int64_t>(kElements / std::max<int64_t>(width, 1), 1);
}

}  // namespace kernels
