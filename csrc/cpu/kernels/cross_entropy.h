// What lies between the products of linear_cross_entropy; see mistral_kernels/ops/cross_entropy.py.
#pragma once

#include "../../dtype.h"
#include "../instruction_sets.h"

namespace kernels {

struct Softmax {
  void* logits;            // (rows, vocab); becomes its own gradient
  int64_t stride, vocab;   // stride: of a row, in elements
  const int64_t* targets;  // (rows,)
  const float* scale;      // (1,): of the gradient
  float* losses;           // (rows,)
  int64_t ignore_index;
  float label_smoothing, z_loss, softcap;
  bool needs_gradient;
  DType dtype;
};

FOR_EACH_INSTRUCTION_SET(void softmax(const Softmax&, int64_t begin, int64_t end))

// sum += x.
FOR_EACH_INSTRUCTION_SET(void accumulate(float* sum, const void* x, DType, int64_t size))

}  // namespace kernels
