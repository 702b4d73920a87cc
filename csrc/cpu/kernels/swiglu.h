// SwiGLU; see mistral_kernels/ops/swiglu.py. Strides are between rows, in elements.
#pragma once

#include "../../dtype.h"
#include "../instruction_sets.h"

namespace kernels {

struct SwiGLU {
  const void *dy, *gate, *up;
  void *y, *dgate, *dup;  // forward: y; backward: gradients, null if not requested
  int64_t cols, dy_stride, gate_stride, up_stride, gradient_stride;
  DType dtype;
};

// Compute elements [begin, end), counted row by row.
FOR_EACH_INSTRUCTION_SET(void swiglu(const SwiGLU&, int64_t begin, int64_t end))
FOR_EACH_INSTRUCTION_SET(void swiglu_backward(const SwiGLU&, int64_t begin, int64_t end))

}  // namespace kernels
