// The product of a few rows and a large weight; see linear.py and linear_int8.py in
// mistral_kernels/ops.
#pragma once

#include "../../dtype.h"
#include "../instruction_sets.h"

namespace kernels {

struct Linear {
  const void *x, *weight;           // (rows, in_features), (out_features, in_features)
  const float* scales;              // (out_features,) of a weight of int8; null: it has x's dtype
  void* y;                          // (rows, out_features), contiguous
  int64_t x_stride, weight_stride;  // of a row, in elements
  int64_t rows, in_features, out_features;
  DType dtype;
};

constexpr int kTileOuts = 4;  // of int8: every row is formed before the next tile

// Outputs [begin, end) of all rows. Of int8 and several rows, `scratch` has to hold a tile as
// float32, each output's rounded up to 32, on a line of the caches.
FOR_EACH_INSTRUCTION_SET(void linear(const Linear&, char* scratch, int64_t begin, int64_t end))

}  // namespace kernels
