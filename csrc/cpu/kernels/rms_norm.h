// RMSNorm; see mistral_kernels/ops/rms_norm.py. Strides are between rows, in elements. Pointers to
// absent tensors are null.
#pragma once

#include "../../dtype.h"
#include "../instruction_sets.h"

namespace kernels {

struct RMSNorm {
  const void *x, *residual, *weight;
  void *y, *h;
  float* rstd;
  int64_t x_stride, residual_stride, hidden;
  float eps;
  DType dtype;
};

struct RMSNormBackward {
  const void *dy, *dh, *h, *weight;
  const float* rstd;
  void* dx;
  float* partial;  // (blocks, hidden)
  int64_t dy_stride, dh_stride, h_stride, rows, rows_of_block, hidden;
  DType dtype;
};

// Computes rows [begin, end).
FOR_EACH_INSTRUCTION_SET(void rms_norm(const RMSNorm&, int64_t begin, int64_t end))

// Computes blocks [begin, end) of rows_of_block rows. Each block writes one row of `partial`.
FOR_EACH_INSTRUCTION_SET(void rms_norm_backward(const RMSNormBackward&, int64_t begin, int64_t end))

// Computes columns [begin, end) of dweight: the sum of the rows of `partial`.
FOR_EACH_INSTRUCTION_SET(void rms_norm_dweight(const RMSNormBackward&, int64_t blocks,
                                               void* dweight, int64_t begin, int64_t end))

}  // namespace kernels
