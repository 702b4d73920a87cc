// Attention of one new token a sequence over its cache; see mistral_kernels/ops/attention.
#pragma once

#include "../../dtype.h"
#include "../instruction_sets.h"

namespace kernels {

struct Decode {
  const void *q, *k_cache, *v_cache;
  void* out;  // (batch, num_heads, head_dim), contiguous
  // In elements: of q a sequence's and a head's; of a cache a row's or page's, a slot's, a head's.
  int64_t q_strides[2], k_strides[3], v_strides[3];
  const int32_t *lengths, *rows, *leftpad;  // (batch,); the last two may be null
  const int32_t* block_table;               // (batch, max_pages), or null
  int64_t max_pages;
  int64_t new_tokens;  // in the cache already, but not in `lengths`
  int64_t batch, num_heads, num_kv_heads, head_dim;
  int64_t capacity, page_size;  // slots of a sequence; those that follow one another
  int64_t window_left;          // -1: all
  float scale;
  DType dtype;
  int64_t splits;   // of the sequence with most keys
  float* partials;  // (batch, splits, num_heads, 2 + head_dim)
};

// Keys. So few that the threads of one sequence share its keys rather than its heads: those of a
// token lie side by side, and a processor fetches its neighbours unasked.
constexpr int kSplit = 256;

// The positions that a sequence's token sees.
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

// Partial results of items [begin, end), each a split of a sequence's keys and one of its kv heads.
FOR_EACH_INSTRUCTION_SET(void attend_splits(const Decode&, int64_t begin, int64_t end))

// The output of items [begin, end), each a head of a sequence's query.
FOR_EACH_INSTRUCTION_SET(void combine_splits(const Decode&, int64_t begin, int64_t end))

}  // namespace kernels
