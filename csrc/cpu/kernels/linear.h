// The product of a few rows and a large weight; see mistral_kernels/ops/linear.py.
#pragma once

#include "../../dtype.h"
#include "../dispatch.h"

namespace kernels {

struct Linear {
  const void *x, *weight;           // (rows, in_features), (out_features, in_features)
  void* y;                          // (rows, out_features), contiguous
  int64_t x_stride, weight_stride;  // of a row, in elements
  int64_t rows, in_features, out_features;
  DType dtype;
};

// Outputs [begin, end) of all rows.
FOR_EACH_INSTRUCTION_SET(void linear(const Linear&, int64_t begin, int64_t end))

}  // namespace kernels
