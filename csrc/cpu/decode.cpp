// Attention of one token per sequence over a cache, on the CPU; see mistral_kernels/ops/attention.
#include "kernels/decode.h"

#include "operator.h"
#include "run.h"

#include <memory>

namespace kernels {

void run(Decode d) {
  constexpr int64_t kBytes = 1 << 17;  // of memory to read, worth a thread
  for (int64_t sequence = 0; sequence < d.batch; ++sequence) {
    const Span span = visible(d, sequence);
    d.splits = std::max(d.splits, (span.end - span.begin + kSplit - 1) / kSplit);
  }
  const auto attend = KERNEL(attend_splits), combine = KERNEL(combine_splits);
  const int64_t heads = d.batch * d.num_heads;
  const std::unique_ptr<float[]> partials(new float[heads * d.splits * (2 + d.head_dim)]);
  d.partials = partials.get();
  const int64_t split_bytes = 2 * kSplit * d.head_dim * size_of(d.dtype);
  torch::stable::parallel_for(0, d.batch * d.splits * d.num_kv_heads, kBytes / split_bytes + 1,
                              [&](int64_t begin, int64_t end) { attend(d, begin, end); });
  const int64_t head_bytes = d.splits * d.head_dim * static_cast<int64_t>(sizeof(float));
  torch::stable::parallel_for(0, heads, kBytes / (head_bytes + 1) + 1,
                              [&](int64_t begin, int64_t end) { combine(d, begin, end); });
}

namespace {

const int32_t* int32s(const char* name, const OptionalTensor& x, int64_t size) {
  return x ? vector_data<int32_t>(name, *x, ScalarType::Int, size) : nullptr;
}

void decode_attention(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
                      const Tensor& lengths, int64_t new_tokens, const OptionalTensor& rows,
                      const OptionalTensor& leftpad, const OptionalTensor& block_table,
                      int64_t window_left, double scale, const Tensor& out) {
  KERNELS_CHECK(k_cache.dim() == 4 && v_cache.dim() == 4 && q.dim() == 3,
                "q must have 3 dimensions, k_cache and v_cache 4");
  Decode d{};
  d.batch = q.size(0);
  d.num_heads = q.size(1);
  d.head_dim = q.size(2);
  d.num_kv_heads = k_cache.size(2);
  for (const Tensor* x : {&q, &k_cache, &v_cache, &out}) {
    KERNELS_CHECK(x->is_cpu() && x->scalar_type() == q.scalar_type() &&
                      x->stride(x->dim() - 1) == 1 && x->size(x->dim() - 1) == d.head_dim,
                  "q, k_cache, v_cache and out must be on the CPU, of one dtype and head_dim, "
                  "contiguous in it");
  }
  for (int i = 0; i < 3; ++i) {
    KERNELS_CHECK(v_cache.size(i) == k_cache.size(i), "v_cache must have k_cache's shape");
    d.k_strides[i] = k_cache.stride(i);
    d.v_strides[i] = v_cache.stride(i);
  }
  check_heads(d.num_heads, d.num_kv_heads);
  KERNELS_CHECK(d.head_dim > 0, "head_dim must be positive");
  KERNELS_CHECK(new_tokens >= 0 && new_tokens <= INT32_MAX, "new_tokens must lie in [0, 2^31), got ",
                new_tokens);
  KERNELS_CHECK(out.numel() == q.numel() && out.is_contiguous(), "out must be q's, contiguous");
  d.q = q.data_ptr();
  d.k_cache = k_cache.data_ptr();
  d.v_cache = v_cache.data_ptr();
  d.out = out.data_ptr();
  d.q_strides[0] = q.stride(0);
  d.q_strides[1] = q.stride(1);
  d.lengths = int32s("lengths", lengths, d.batch);
  d.rows = int32s("rows", rows, d.batch);
  d.leftpad = int32s("leftpad", leftpad, d.batch);
  d.new_tokens = new_tokens;
  d.capacity = d.page_size = k_cache.size(1);
  if (block_table) {
    KERNELS_CHECK(block_table->dim() == 2, "block_table must be (batch, max_pages)");
    d.max_pages = block_table->size(1);
    d.block_table = int32s("block_table", block_table, d.batch * d.max_pages);
    d.capacity *= d.max_pages;
  }
  KERNELS_CHECK(d.capacity > 0, "the caches have no slots");
  d.window_left = window_left;
  d.scale = static_cast<float>(scale);
  d.dtype = checked_dtype("q", q);
  for (int64_t sequence = 0; sequence < d.batch; ++sequence) {
    KERNELS_CHECK(d.lengths[sequence] >= 0, "lengths must be >= 0, got ", d.lengths[sequence]);
    KERNELS_CHECK(!d.leftpad || d.leftpad[sequence] >= 0, "leftpad must be >= 0, got ",
                  d.leftpad[sequence]);
    const Span span = visible(d, sequence);
    const auto check = [&](const char* name, int64_t outer) {
      KERNELS_CHECK(outer >= 0 && outer < k_cache.size(0), name, " must lie in [0, ",
                    k_cache.size(0), "), got ", outer);
    };
    if (!block_table) check("rows", rows ? d.rows[sequence] : sequence);
    for (int64_t position = span.begin; block_table && position < span.end;) {
      const int64_t page = position % d.capacity / d.page_size;
      check("block_table", d.block_table[sequence * d.max_pages + page]);
      position += d.page_size - position % d.page_size;
    }
  }
  run(d);
}

}  // namespace
}  // namespace kernels

STABLE_TORCH_LIBRARY_FRAGMENT(mistral_kernels, m) {
  m.def(
      "decode_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor lengths, int new_tokens, "
      "Tensor? rows, Tensor? leftpad, Tensor? block_table, int window_left, float scale, "
      "Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(mistral_kernels, CPU, m) {
  m.impl("decode_attention", TORCH_BOX(&kernels::decode_attention));
}
