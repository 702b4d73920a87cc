// See mistral_kernels/ops/rotary.py. Strides are in elements.
#pragma once

#include "../../dtype.h"
#include "../dispatch.h"

namespace kernels {

// The heads of every token, and where they go: elsewhere, or to where they are.
struct Turned {
  const void* x;
  void* out;
  int64_t heads, x_token_stride, x_head_stride, out_token_stride, out_head_stride;
};

struct Rotary {
  Turned q, k;  // either may have no heads
  const float *cos, *sin;
  int64_t cos_stride, sin_stride;  // of a position
  const void* positions;           // int32 or int64
  bool wide_positions, interleaved, backwards;
  int64_t head_dim;
  DType dtype;
};

// Tokens [begin, end).
FOR_EACH_INSTRUCTION_SET(void rotary(const Rotary&, int64_t begin, int64_t end))

}  // namespace kernels
