// Attention of one new token per sequence over its cache; see mistral_kernels/ops/attention.
#pragma once

#include "../../dtype.h"
#include "../instruction_sets.h"

namespace kernels {

struct Decode {
  const void *q, *k_cache, *v_cache;
  void* out;  // (batch, num_heads, head_dim), contiguous
  // In elements. q: between sequences, heads. Caches: between rows (or pages), slots, heads.
  int64_t q_strides[2], k_strides[3], v_strides[3];
  const int32_t *lengths, *rows, *leftpad;  // (batch,); the last two may be null
  const int32_t* block_table;               // (batch, max_pages), or null
  int64_t max_pages;
  int64_t new_tokens;  // tokens in the cache that `lengths` does not count yet
  int64_t batch, num_heads, num_kv_heads, head_dim;
  int64_t capacity, page_size;  // slots per sequence, contiguous slots per page
  int64_t window_left;          // -1: no limit
  float scale;
  DType dtype;
  int64_t splits;   // of the sequence with the most keys
  float* partials;  // (batch, splits, num_heads, partial_size(head_dim)), aligned to a cache line
};

// Keys per split. It is small so that the threads divide the keys of a sequence rather than its kv
// heads: the kv heads of a token are adjacent in memory, and the hardware prefetcher of one core
// would load those of other cores.
constexpr int kSplit = 256;

// Returns the size of a partial result, which fills whole cache lines.
inline int64_t partial_size(int64_t head_dim) { return 16 + (head_dim + 15) / 16 * 16; }

// The positions [begin, end) that the new token of a sequence attends to.
struct Span {
  int64_t begin, end;
};

inline Span visible(const Decode& d, int64_t sequence) {
  const int64_t end = d.lengths[sequence] + d.new_tokens;
  int64_t begin = end > d.capacity ? end - d.capacity : 0;
  if (d.window_left >= 0 && begin < end - 1 - d.window_left) begin = end - 1 - d.window_left;
  if (d.leftpad && begin < d.leftpad[sequence]) begin = d.leftpad[sequence];
  return {begin < end ? begin : end, end};
}

// Computes the partial results of items [begin, end). An item is one split of the keys of a
// sequence, for one kv head.
FOR_EACH_INSTRUCTION_SET(void attend_splits(const Decode&, int64_t begin, int64_t end))

// Computes the output of items [begin, end). An item is one query head of a sequence.
FOR_EACH_INSTRUCTION_SET(void combine_splits(const Decode&, int64_t begin, int64_t end))

}  // namespace kernels
