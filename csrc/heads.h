// The layout of a tensor of heads, on the CPU and the GPU. Functions here are always inlined: the
// kernels are compiled for several instruction sets, which must not share code.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define HOST_DEVICE __host__ __device__ __forceinline__
#else
#define HOST_DEVICE __attribute__((always_inline)) inline
#endif

// A tensor (outer, token, head, head_dim). Strides are in elements; the last dimension is
// contiguous. The outer index is a sequence, or a row or page of a cache; packed tensors have no
// outer dimension. `data` is null if the tensor is absent.
struct Heads {
  void* data;
  int64_t outer_stride, token_stride, head_stride;

  template <typename T>
  HOST_DEVICE T* at(int64_t outer, int64_t token, int64_t head) const {
    return static_cast<T*>(data) + outer * outer_stride + token * token_stride + head * head_stride;
  }
};
