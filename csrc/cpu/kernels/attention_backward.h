// Backward pass of attention over whole sequences; see attention.h.
//
// Queries and keys are divided into chunks of `chunk` tokens. A task computes the products of one
// chunk of queries and one chunk of keys of a kv head, and adds them to the sums of the gradients.
// The tasks of a diagonal, whose chunk of keys is `diagonal` chunks after the chunk of queries,
// write to different sums. They run at once, and the diagonals one after the other: every sum is
// computed in the same order with any number of threads.
#pragma once

#include "attention.h"

namespace kernels {

struct AttentionBackward : AttentionInputs {
  Heads out, dout;   // like q
  Heads dq, dk, dv;  // results; without data if not requested
  const float* lse;  // (batch, heads, seqlen_q)
  float* deltas;     // (batch, heads, seqlen_q): rowsum(dout * out)
  float *dq_sums, *dk_sums, *dv_sums;  // (batch, heads, seqlen, BackwardSizes::width), or null
  char* packed;  // BackwardSizes::packed_bytes bytes, filled by prepare_keys
};

struct BackwardSizes {
  int64_t width;          // head_dim, rounded up for the sums
  int64_t packed_bytes;   // of all packed keys and values
  int64_t scratch_bytes;  // per thread
  int64_t chunk, query_chunks, key_chunks;  // tokens per chunk, and chunks per kv head and sequence
};

FOR_EACH_INSTRUCTION_SET(BackwardSizes backward_sizes(const AttentionBackward&))

// Sets the sums to 0 and fills `deltas`: rows [begin, end) of batch * heads * seqlen_q.
FOR_EACH_INSTRUCTION_SET(void prepare_rows(const AttentionBackward&, int64_t begin, int64_t end))

// Sets the sums to 0 and fills `packed`: chunks [begin, end) of batch * kv_heads * key_chunks.
FOR_EACH_INSTRUCTION_SET(void prepare_keys(const AttentionBackward&, int64_t begin, int64_t end))

// Computes the tasks of chunks of queries [first_chunk, first_chunk + chunks) on a diagonal: tasks
// [begin, end) of batch * kv_heads * chunks.
FOR_EACH_INSTRUCTION_SET(void add_gradients(const AttentionBackward&, char* scratch,
                                            int64_t diagonal, int64_t first_chunk, int64_t chunks,
                                            int64_t begin, int64_t end))

// Stores the sums of dq, rows [begin, end) of batch * heads * seqlen_q.
FOR_EACH_INSTRUCTION_SET(void store_rows(const AttentionBackward&, int64_t begin, int64_t end))

// Stores the sums of dk and dv, rows [begin, end) of batch * kv_heads * seqlen_k.
FOR_EACH_INSTRUCTION_SET(void store_keys(const AttentionBackward&, int64_t begin, int64_t end))

}  // namespace kernels
