// The arithmetic and the launch parameters of the update on a GPU, without CUDA headers.
#pragma once

#include "../rolling_cache.h"

#include <algorithm>

namespace kernels {

struct Pair {
  float a, b;
};

// Each product and each sum is rounded separately, so that results are bit-identical on every
// backend. Host code is compiled with -ffp-contract=off for the same reason.
HOST_DEVICE Pair rotate(Pair x, float cos, float sin) {
#ifdef __CUDA_ARCH__
  return {__fsub_rn(__fmul_rn(x.a, cos), __fmul_rn(x.b, sin)),
          __fadd_rn(__fmul_rn(x.b, cos), __fmul_rn(x.a, sin))};
#else
  return {x.a * cos - x.b * sin, x.b * cos + x.a * sin};
#endif
}

// Returns the bytes per memory access: 16 or 8 if every tensor is aligned to it and it divides the
// size of half a head; otherwise the size of one element.
inline int access_bytes(const Update& u) {
  const int64_t half = u.head_dim / 2 * size_of(u.dtype);
  for (int bytes : {16, 8}) {
    // Cosines are float32: a vector of 16-bit elements needs twice its bytes of cosines. Their
    // alignment need not exceed 16 bytes.
    const int table_bytes = std::min(bytes / size_of(u.dtype) * 4, 16);
    uint64_t tables = 0, all = half;
    for (const Heads& x : {u.q, u.k, u.v, u.q_out, u.k_cache, u.v_cache}) {
      if (!x.data) continue;
      all |= reinterpret_cast<uintptr_t>(x.data);
      all |= (x.outer_stride | x.token_stride | x.head_stride) * size_of(u.dtype);
    }
    if (u.q.data) {
      tables |= reinterpret_cast<uintptr_t>(u.cos) | reinterpret_cast<uintptr_t>(u.sin);
      tables |= (u.cos_stride | u.sin_stride) * sizeof(float);
    }
    if (all % bytes == 0 && tables % table_bytes == 0) return bytes;
  }
  return size_of(u.dtype);
}

// Returns the number of elements that a thread processes in each half of a head. It is at least 2,
// because an interleaved pair has 2 elements.
inline int vector_length(const Update& u) {
  return std::max(access_bytes(u) / size_of(u.dtype), 2);
}

constexpr int kBlock = 128;  // threads per block

struct Launch {
  uint32_t grid_x, grid_y;
};

// grid.x covers the tokens of a sequence, their heads, and the vectors of half a head; grid.y
// covers the sequences. The kernel loops over what exceeds the maximal grid size.
inline Launch launch_shape(const Update& u) {
  const int64_t heads = u.num_heads + 2 * int64_t{u.num_kv_heads};
  const int64_t threads = u.max_seqlen * heads * (u.head_dim / 2 / vector_length(u));
  return {static_cast<uint32_t>(std::min<int64_t>((threads + kBlock - 1) / kBlock, INT32_MAX)),
          static_cast<uint32_t>(std::min<int64_t>(u.batch, 65535))};
}

}  // namespace kernels
