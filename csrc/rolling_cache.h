// Writing new keys and values into a ring, and rotating queries and keys on the way: what the CUDA
// and the CPU kernel share. No torch headers here, so that the arithmetic can be run by itself.
#pragma once

#include "dtype.h"

#include <algorithm>
#include <cstdint>

#ifdef __CUDACC__
#define HOST_DEVICE __host__ __device__ __forceinline__
#else
#define HOST_DEVICE inline
#endif

namespace rolling_cache {

// (outer, token, head, head_dim), strides in bytes and the last dimension contiguous. Outer is the
// row or page of a cache; packed tensors have none. data is null where there is no tensor.
struct Heads {
  char* data;
  int64_t outer_stride, token_stride, head_stride;

  HOST_DEVICE char* at(int64_t outer, int64_t token, int64_t head) const {
    return data + outer * outer_stride + token * token_stride + head * head_stride;
  }
};

// The arguments of one update. The new token i of sequence b is token cu_seqlens[b] + i of q, k and
// v, has position lengths[b] + i, and its key and value belong into slot position % capacity.
struct Update {
  Heads q, k, v, q_out, k_cache, v_cache;     // without q nothing is rotated
  const float *cos, *sin;                     // (num_positions, head_dim / 2)
  int64_t cos_stride, sin_stride;             // of a position, in elements
  const int32_t *lengths, *cu_seqlens;        // (batch,), (batch + 1,)
  const int32_t *rows;                        // (batch,): the row of the caches; null: b itself
  const int32_t *block_table;                 // (batch, pages): the slots' pages; null: one row
  int64_t block_table_stride, batch, max_seqlen;
  uint32_t capacity, page_size;               // slots of a sequence, and of a page
  int32_t num_heads, num_kv_heads, head_dim;  // num_heads is 0 without q
  int32_t interleaved;                        // pairs are channels 2i, 2i + 1, not i, i + half
  DType dtype;

  HOST_DEVICE int element_size() const { return size_of(dtype); }
};

// Of `count` new tokens the last `capacity` are kept, so that no slot has two writers.
HOST_DEVICE bool is_kept(int64_t token, int64_t count, uint32_t capacity) {
  return count - token <= capacity;
}

struct Slot {
  int64_t outer, token;  // of the caches
};

// A position is the sum of two int32 that are not negative: it fits uint32, whose remainders are
// many times faster on a GPU than those of int64.
HOST_DEVICE Slot slot_of(const Update& u, int64_t sequence, uint32_t position) {
  const uint32_t slot = position % u.capacity;
  if (u.block_table) {
    const int32_t* pages = u.block_table + sequence * u.block_table_stride;
    return {pages[slot / u.page_size], slot % u.page_size};
  }
  return {u.rows ? u.rows[sequence] : sequence, slot};
}

struct Pair {
  float a, b;
};

// Each product and each sum is rounded on its own, so that every backend gives the same bits.
// Host code gets this from -ffp-contract=off.
HOST_DEVICE Pair rotate(Pair x, float cos, float sin) {
#ifdef __CUDA_ARCH__
  return {__fsub_rn(__fmul_rn(x.a, cos), __fmul_rn(x.b, sin)),
          __fadd_rn(__fmul_rn(x.b, cos), __fmul_rn(x.a, sin))};
#else
  return {x.a * cos - x.b * sin, x.b * cos + x.a * sin};
#endif
}

// How many bytes the GPU may move at once: 16 or 8 where every vector of every tensor is aligned
// to it and the vectors divide half a head; otherwise one element.
inline int access_bytes(const Update& u) {
  const int64_t half = u.head_dim / 2 * u.element_size();
  for (int bytes : {16, 8}) {
    // The angles of a vector of half-precision numbers are twice as many bytes; 16 will do.
    const int table_bytes = std::min(bytes / u.element_size() * 4, 16);
    uint64_t tables = 0, all = half;
    for (const Heads& x : {u.q, u.k, u.v, u.q_out, u.k_cache, u.v_cache}) {
      if (!x.data) continue;
      all |= reinterpret_cast<uintptr_t>(x.data) | x.outer_stride | x.token_stride | x.head_stride;
    }
    if (u.q.data) {
      tables |= reinterpret_cast<uintptr_t>(u.cos) | reinterpret_cast<uintptr_t>(u.sin);
      tables |= (u.cos_stride | u.sin_stride) * sizeof(float);
    }
    if (all % bytes == 0 && tables % table_bytes == 0) return bytes;
  }
  return u.element_size();
}

// Elements of each half of a head that one GPU thread takes. Two at least: an interleaved pair.
inline int vector_length(const Update& u) {
  return std::max(access_bytes(u) / u.element_size(), 2);
}

constexpr int kBlock = 128;  // threads

struct Launch {
  uint32_t grid_x, grid_y;
};

// grid.x: tokens of a sequence, their heads, vectors of half a head; grid.y: sequences. Loops of
// the kernel do what no grid can hold.
inline Launch launch_shape(const Update& u) {
  const int64_t heads = u.num_heads + 2 * int64_t{u.num_kv_heads};
  const int64_t threads = u.max_seqlen * heads * (u.head_dim / 2 / vector_length(u));
  return {static_cast<uint32_t>(std::min<int64_t>((threads + kBlock - 1) / kBlock, INT32_MAX)),
          static_cast<uint32_t>(std::min<int64_t>(u.batch, 65535))};
}

// Runs the update, on a CUDA stream or on the CPU. Returns what went wrong, or null.
const char* update(const Update& u, void* stream);

}  // namespace rolling_cache
