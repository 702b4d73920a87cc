// The product of a few rows with a large weight; see linear.py and linear_int8.py in
// mistral_kernels/ops.
#pragma once

#include "../../dtype.h"
#include "../instruction_sets.h"

namespace kernels {

struct Linear {
  const void *x, *weight;           // (rows, in_features), (out_features, in_features)
  const float* scales;              // (out_features,) of an int8 weight; null: weight has x's dtype
  void* y;                          // (rows, out_features), contiguous
  int64_t x_stride, weight_stride;  // between rows, in elements
  int64_t rows, in_features, out_features;
  DType dtype;
};

// Returns the size of the scratch memory of linear().
FOR_EACH_INSTRUCTION_SET(int64_t linear_scratch_bytes(const Linear&))

// Computes outputs [begin, end) of all rows of x. `scratch` is aligned to a cache line.
FOR_EACH_INSTRUCTION_SET(void linear(const Linear&, char* scratch, int64_t begin, int64_t end))

}  // namespace kernels
