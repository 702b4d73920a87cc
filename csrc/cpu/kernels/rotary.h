// The rotary embedding; see mistral_kernels/ops/rotary.py. Strides are in elements.
#pragma once

#include "../../dtype.h"
#include "../../heads.h"
#include "../instruction_sets.h"

namespace kernels {

// The heads of every token and their output. `out` may be `x`.
struct Rotated {
  Heads x, out;
  int64_t heads;
};

struct Rotary {
  Rotated q, k;  // either may have no heads
  const float *cos, *sin;
  int64_t cos_stride, sin_stride;  // between positions
  const void* positions;           // int32 or int64
  bool wide_positions, interleaved, inverse;
  int64_t head_dim;
  DType dtype;

  int64_t position_of(int64_t token) const {
    return wide_positions ? static_cast<const int64_t*>(positions)[token]
                          : static_cast<const int32_t*>(positions)[token];
  }
};

// Rotates tokens [begin, end).
FOR_EACH_INSTRUCTION_SET(void rotary(const Rotary&, int64_t begin, int64_t end))

}  // namespace kernels
