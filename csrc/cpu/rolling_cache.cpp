// The update of a rolling cache on the CPU, in one pass over the new tokens.
#include "kernels/rolling_cache.h"

#include "operator.h"

namespace kernels {

const char* update(const Update& u, void*) {
  const int64_t token_bytes =
      (u.num_heads + 2 * int64_t{u.num_kv_heads}) * u.head_dim * size_of(u.dtype);
  // The minimal number of tokens per thread.
  const int64_t grain = std::max<int64_t>((int64_t{1} << 17) / token_bytes, 1);
  const int32_t *offsets = u.cu_seqlens, *last = offsets + u.batch;
  const auto kernel = KERNEL(update_tokens);
  torch::stable::parallel_for(0, *last, grain, [&](int64_t begin, int64_t end) {
    // The sequence of token `begin` is the last sequence that starts at or before it.
    int64_t sequence = std::upper_bound(offsets, last, begin) - offsets - 1;
    for (; begin < end; ++sequence) {
      const int64_t stop = std::min<int64_t>(end, offsets[sequence + 1]);
      kernel(u, sequence, begin, stop);
      begin = stop;
    }
  });
  return nullptr;
}

}  // namespace kernels
