// Attention over whole sequences, in blocks that stay in a cache; see
// mistral_kernels/ops/attention.
#pragma once

#include "../../dtype.h"
#include "../../heads.h"
#include "../instruction_sets.h"

namespace kernels {

constexpr int kKeyBlock = 64;

struct Attention {
  Heads q, k, v, out;  // (batch, seqlen, heads, head_dim)
  float* lse;    // (batch, heads, seqlen_q), or null
  int64_t lse_stride;  // between heads
  char* packed;  // packed_bytes() for pack_keys to fill
  int64_t batch, seqlen_q, seqlen_k;
  int heads, kv_heads, head_dim;
  int64_t left, right;  // how far a query sees to either side of its place
  float scale, softcap;
  DType dtype;
};

struct Sizes {
  int64_t packed_bytes, scratch_bytes;   // of all keys and values; of each thread
  int64_t key_blocks, query_blocks;      // of one kv head of one sequence
};

FOR_EACH_INSTRUCTION_SET(Sizes sizes(const Attention&))

// Lays keys and values out as the products want them: blocks [begin, end) of batch * kv_heads *
// key_blocks.
FOR_EACH_INSTRUCTION_SET(void pack_keys(const Attention&, int64_t begin, int64_t end))

// Query blocks [begin, end) of batch * kv_heads * query_blocks.
FOR_EACH_INSTRUCTION_SET(
    void attend(const Attention&, char* scratch, int64_t begin, int64_t end))

}  // namespace kernels
