// What the bindings share.
#pragma once

#include "check.h"
#include "dtype.h"
#include "torch_checks.h"

#include <cstdint>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

// One more level of macros, so that their arguments are expanded.
#define LIBRARY(name, m) STABLE_TORCH_LIBRARY(name, m)
#define LIBRARY_FRAGMENT(name, m) STABLE_TORCH_LIBRARY_FRAGMENT(name, m)
#define LIBRARY_IMPL(name, key, m) STABLE_TORCH_LIBRARY_IMPL(name, key, m)

// Of a contiguous tensor on the CPU, of any shape.
template <typename T>
T* vector_data(const char* name, const torch::stable::Tensor& x,
               torch::headeronly::ScalarType dtype, int64_t size) {
  KERNELS_CHECK(x.is_cpu() && x.scalar_type() == dtype, name, " has the wrong device or dtype");
  KERNELS_CHECK(x.numel() == size && x.is_contiguous(), name, " must be contiguous, of ", size);
  return static_cast<T*>(x.data_ptr());
}

// Every query head reads the kv head of its group.
inline void check_heads(int64_t heads, int64_t kv_heads) {
  KERNELS_CHECK(kv_heads > 0 && heads > 0 && heads <= INT32_MAX && heads % kv_heads == 0,
                "the kv heads must divide the query heads, and both be positive, got ", kv_heads,
                " and ", heads);
}

inline DType dtype_of(const char* name, const torch::stable::Tensor& x) {
  using torch::headeronly::ScalarType;
  switch (x.scalar_type()) {
    case ScalarType::Float: return DType::float32;
    case ScalarType::Half: return DType::float16;
    case ScalarType::BFloat16: return DType::bfloat16;
    default: kernels::check_failed(name, " must be float32, float16 or bfloat16");
  }
}
