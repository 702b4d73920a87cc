// Attention over whole sequences, in blocks that fit in the CPU cache; see
// mistral_kernels/ops/attention.
#pragma once

#include "../../dtype.h"
#include "../../heads.h"
#include "../instruction_sets.h"

namespace kernels {

// The inputs of the forward and of the backward pass.
struct AttentionInputs {
  Heads q, k, v;  // (batch, seqlen, heads, head_dim)
  int64_t batch, seqlen_q, seqlen_k;
  int heads, kv_heads, head_dim;
  int64_t left, right;  // window: visible keys before and after the position of a query
  float scale, softcap;
  const float* slopes;   // of ALiBi: (batch, heads), or null
  int64_t slope_stride;  // between sequences
  int64_t lse_stride;    // of the log-sum-exp, between heads
  DType dtype;
};

struct Attention : AttentionInputs {
  Heads out;     // like q
  float* lse;    // (batch, heads, seqlen_q), or null
  char* packed;  // Sizes::packed_bytes bytes, filled by pack_keys

  // Returns whether the scores are scaled products, without softcap and ALiBi.
  __attribute__((always_inline)) bool is_plain() const { return softcap == 0 && !slopes; }
};

struct Sizes {
  int64_t packed_bytes;              // of all packed keys and values
  int64_t scratch_bytes;             // per thread
  int64_t key_blocks, query_blocks;  // per kv head and sequence
};

FOR_EACH_INSTRUCTION_SET(Sizes sizes(const Attention&))

// Packs keys and values into the layout of the matrix products: blocks [begin, end) of batch *
// kv_heads * key_blocks.
FOR_EACH_INSTRUCTION_SET(void pack_keys(const Attention&, int64_t begin, int64_t end))

// Computes query blocks [begin, end) of batch * kv_heads * query_blocks.
FOR_EACH_INSTRUCTION_SET(
    void attend(const Attention&, char* scratch, int64_t begin, int64_t end))

}  // namespace kernels
