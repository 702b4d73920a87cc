// Definitions shared by the CUDA and CPU kernels that append keys and values to a ring buffer and
// rotate queries and keys; see mistral_kernels/ops/rolling_cache.py. It includes no torch headers,
// so that tests can compile the arithmetic alone.
#pragma once

#include "dtype.h"
#include "heads.h"

#include <cstdint>

namespace kernels {

// The arguments of one update. New token i of sequence b is token cu_seqlens[b] + i of q, k and v.
// Its position is lengths[b] + i, and its key and value are written to slot position % capacity.
struct Update {
  Heads q, k, v, q_out, k_cache, v_cache;     // q.data null: nothing is rotated
  const float *cos, *sin;                     // (num_positions, head_dim / 2)
  int64_t cos_stride, sin_stride;             // between positions, in elements
  const int32_t *lengths, *cu_seqlens;        // (batch,), (batch + 1,)
  const int32_t *rows;                        // (batch,): row of the caches; null: row b
  const int32_t *block_table;                 // (batch, pages): page numbers; null: not paged
  int64_t block_table_stride, batch, max_seqlen;
  uint32_t capacity, page_size;               // slots per sequence, slots per page
  int32_t num_heads, num_kv_heads, head_dim;  // num_heads is 0 without q
  int32_t interleaved;                        // pairs (2i, 2i + 1); otherwise (i, i + head_dim / 2)
  DType dtype;
};

// Only the last `capacity` of `count` new tokens are written, so that no slot has two writers.
HOST_DEVICE bool is_kept(int64_t token, int64_t count, uint32_t capacity) {
  return count - token <= capacity;
}

struct Slot {
  int64_t outer, token;  // indices into the caches
};

// A position is the sum of two non-negative int32 values, so it fits in uint32. A uint32 remainder
// is many times faster on a GPU than an int64 remainder.
HOST_DEVICE Slot slot_of(const Update& u, int64_t sequence, uint32_t position) {
  const uint32_t slot = position % u.capacity;
  if (u.block_table) {
    const int32_t* pages = u.block_table + sequence * u.block_table_stride;
    return {pages[slot / u.page_size], slot % u.page_size};
  }
  return {u.rows ? u.rows[sequence] : sequence, slot};
}

// Runs the update on a CUDA stream or on the CPU. Returns an error message, or null.
const char* update(const Update& u, void* stream);

}  // namespace kernels
