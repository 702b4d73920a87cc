// Writing new keys and values into a ring, and rotating queries and keys on the way: what the CUDA
// and the CPU kernel share; see mistral_kernels/ops/rolling_cache.py. No torch headers here, so that
// the arithmetic can be run by itself.
#pragma once

#include "dtype.h"
#include "heads.h"

#include <cstdint>

namespace kernels {

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

// Runs the update, on a CUDA stream or on the CPU. Returns what went wrong, or null.
const char* update(const Update& u, void* stream);

}  // namespace kernels
