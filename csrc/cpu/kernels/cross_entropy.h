// The cross-entropy loss, its gradient with respect to the logits, and the accumulation of
// gradients in float32; see mistral_kernels/ops/cross_entropy.py.
#pragma once

#include "../../dtype.h"
#include "../instruction_sets.h"

namespace kernels {

struct Softmax {
  void* logits;            // (rows, vocab); overwritten with the gradient
  int64_t stride, vocab;   // stride: between rows, in elements
  const int64_t* targets;  // (rows,)
  const float* scale;      // (1,): factor of the gradient
  float* losses;           // (rows,)
  int64_t ignore_index;
  float label_smoothing, z_loss, softcap;
  bool needs_gradient;
  DType dtype;
};

// Computes rows [begin, end): the losses, and the gradient if `needs_gradient`.
FOR_EACH_INSTRUCTION_SET(void softmax(const Softmax&, int64_t begin, int64_t end))

// Adds x to `sum`.
FOR_EACH_INSTRUCTION_SET(void accumulate(float* sum, const void* x, DType, int64_t size))

}  // namespace kernels
