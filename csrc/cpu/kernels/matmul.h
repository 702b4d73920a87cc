// The product of two matrices with many rows; see mistral_kernels/ops/matmul.py.
#pragma once

#include "../../dtype.h"
#include "../instruction_sets.h"

namespace kernels {

struct Matrix {
  const void* data;
  int64_t row_stride, col_stride;  // in elements; one of them is 1
};

struct Matmul {
  Matrix a, b;          // (rows, inner), (inner, cols)
  const float* scales;  // (cols,): factors of the columns of an int8 b; null: b has a's dtype
  void* c;              // (rows, cols)
  int64_t c_stride;     // between rows, in elements
  int64_t rows, inner, cols;
  DType dtype, c_dtype;
  bool accumulate;  // add the product to c
};

// The product is divided into row_blocks * col_tiles parts, row block by row block.
struct MatmulParts {
  int64_t row_blocks, col_tiles;
  int64_t scratch_bytes;  // per thread
};

FOR_EACH_INSTRUCTION_SET(MatmulParts matmul_parts(const Matmul&))

// Computes the parts [begin, end). `scratch` is aligned to a cache line.
FOR_EACH_INSTRUCTION_SET(
    void matmul(const Matmul&, char* scratch, int64_t begin, int64_t end))

}  // namespace kernels
