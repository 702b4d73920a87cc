// Attention of one new token per sequence over its cache, on the CPU; see
// mistral_kernels/ops/attention.
#include "kernels/decode.h"

#include "buffer.h"
#include "operator.h"
#include "run.h"

namespace kernels {

void run(Decode d) {
  constexpr int64_t kBytes = 1 << 17;  // bytes read per thread, at least
  for (int64_t sequence = 0; sequence < d.batch; ++sequence) {
    const Span span = visible(d, sequence);
    d.splits = std::max(d.splits, (span.end - span.begin + kSplit - 1) / kSplit);
  }
  const auto attend = KERNEL(attend_splits), combine = KERNEL(combine_splits);
  const int64_t heads = d.batch * d.num_heads;
  const Buffer partials(heads * d.splits * partial_size(d.head_dim) *
                        static_cast<int64_t>(sizeof(float)));
  d.partials = reinterpret_cast<float*>(partials.data());
  const int64_t split_bytes = 2 * kSplit * d.head_dim * size_of(d.dtype);
  torch::stable::parallel_for(0, d.batch * d.splits * d.num_kv_heads, kBytes / split_bytes + 1,
                              [&](int64_t begin, int64_t end) { attend(d, begin, end); });
  const int64_t head_bytes = d.splits * d.head_dim * static_cast<int64_t>(sizeof(float));
  torch::stable::parallel_for(0, heads, kBytes / (head_bytes + 1) + 1,
                              [&](int64_t begin, int64_t end) { combine(d, begin, end); });
}

namespace {

using TwoTensors = std::tuple<Tensor, Tensor>;

// Requires valid index tensors, because they decide which memory is read.
void require_valid_indices(const Decode& d, int64_t cache_rows) {
  const auto require_row = [&](int64_t row) { require(row >= 0 && row < cache_rows); };
  for (int64_t sequence = 0; sequence < d.batch; ++sequence) {
    const int64_t length = d.lengths[sequence];
    require(length >= 0 && length + d.new_tokens <= INT32_MAX);
    require(!d.leftpad || d.leftpad[sequence] >= 0);
    if (!d.block_table) require_row(d.rows ? d.rows[sequence] : sequence);
    const Span span = visible(d, sequence);
    for (int64_t position = span.begin; d.block_table && position < span.end;) {
      const int64_t page = position % d.capacity / d.page_size;
      require_row(d.block_table[sequence * d.max_pages + page]);
      position += d.page_size - position % d.page_size;
    }
  }
}

// Attends with one token per sequence. q is (batch, heads, head_dim) if cu_seqlens is given,
// otherwise (batch, 1, heads, head_dim).
Tensor decode(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache, const Tensor& lengths,
              int64_t seqlen_new, const OptionalTensor& rows, const OptionalTensor& leftpad,
              const OptionalTensor& block_table, const OptionalTensor& cu_seqlens,
              std::optional<double> softmax_scale, int64_t window_left) {
  const int64_t dim = cu_seqlens ? 3 : 4;
  require(is_on_cpu(q, q.scalar_type()) && q.dim() == dim && (cu_seqlens || q.size(1) == 1));
  for (const Tensor* x : {&k_cache, &v_cache}) {
    require(is_on_cpu(*x, q.scalar_type()) && x->dim() == 4 && x->size(3) == q.size(dim - 1) &&
            (x->size(3) == 1 || x->stride(3) == 1));
  }
  require(same_shape(v_cache, k_cache) && !(rows && block_table));
  Decode d{};
  d.dtype = required_dtype(q);
  d.batch = q.size(0);
  d.num_heads = q.size(dim - 2);
  d.head_dim = q.size(dim - 1);
  d.num_kv_heads = k_cache.size(2);
  require_heads(d.num_heads, d.num_kv_heads, d.head_dim);
  d.scale = scale_of(softmax_scale, d.head_dim);
  d.window_left = window_left;
  const Tensor queries = with_unit_stride(q);
  d.q = queries.data_ptr();
  d.q_strides[0] = queries.stride(0);
  d.q_strides[1] = queries.stride(dim - 2);
  d.k_cache = k_cache.data_ptr();
  d.v_cache = v_cache.data_ptr();
  for (int i = 0; i < 3; ++i) {
    d.k_strides[i] = k_cache.stride(i);
    d.v_strides[i] = v_cache.stride(i);
  }
  std::vector<Tensor> indices;  // keeps the memory of the pointers below alive
  const auto int32s = [&](const Tensor& x) {
    indices.push_back(vector_of(x, ScalarType::Int, d.batch));
    return static_cast<const int32_t*>(indices.back().data_ptr());
  };
  d.lengths = int32s(lengths);
  if (rows) d.rows = int32s(*rows);
  if (leftpad) d.leftpad = int32s(*leftpad);
  d.new_tokens = cu_seqlens ? 1 : seqlen_new;
  d.capacity = d.page_size = k_cache.size(1);
  if (block_table) {
    require(is_on_cpu(*block_table, ScalarType::Int) && block_table->dim() == 2 &&
            block_table->size(0) == d.batch);
    indices.push_back(as_contiguous(*block_table));
    d.block_table = static_cast<const int32_t*>(indices.back().data_ptr());
    d.max_pages = block_table->size(1);
    d.capacity *= d.max_pages;
  }
  require(d.capacity > 0 && d.new_tokens >= 0 && d.new_tokens <= INT32_MAX);
  if (cu_seqlens) {
    const Tensor ends = vector_of(*cu_seqlens, ScalarType::Int, d.batch + 1);
    const auto* offsets = static_cast<const int32_t*>(ends.data_ptr());
    for (int64_t i = 0; i <= d.batch; ++i) require(offsets[i] == i);
  }
  require_valid_indices(d, k_cache.size(0));
  Tensor out = new_like(q);
  d.out = out.data_ptr();
  run(d);
  return out;
}

// Elements of `counters` per sequence and kv head. Only the GPU kernels use `counters`; see
// `num_counters` in mistral_kernels/ops/attention/kernels/decode.py.
constexpr int64_t kSplitTiles = 4;

// Supports decode steps whose new tokens are in the cache already, without softcap, ALiBi and
// log-sum-exp.
TwoTensors cached_attention(const Tensor& q, const OptionalTensor& k, const OptionalTensor& v,
                            const Tensor& k_cache, const Tensor& v_cache, const Tensor& lengths,
                            int64_t seqlen_new, const OptionalTensor& rows,
                            const OptionalTensor& leftpad, const OptionalTensor& block_table,
                            const OptionalTensor& cu_seqlens, int64_t max_seqlen_q,
                            std::optional<double> softmax_scale, int64_t window_left,
                            int64_t window_right, double softcap,
                            const OptionalTensor& alibi_slopes, bool return_lse, int64_t num_splits,
                            const OptionalTensor& counters) {
  const auto run = [&]() -> TwoTensors {
    require(!k && !v && !alibi_slopes && softcap == 0 && !return_lse && max_seqlen_q == 1);
    require(num_splits >= 0 && num_splits <= INT32_MAX);
    require(!counters || (is_on_cpu(*counters, ScalarType::Int) && k_cache.dim() == 4 &&
                          counters->numel() >= kSplitTiles * q.size(0) * k_cache.size(2)));
    return {decode(q, k_cache, v_cache, lengths, seqlen_new, rows, leftpad, block_table, cu_seqlens,
                   softmax_scale, window_left),
            absent(ScalarType::Float, q)};
  };
  return run_or_call<TwoTensors>("mistral_kernels::cached_attention_python", run, q, k, v, k_cache,
                                 v_cache, lengths, seqlen_new, rows, leftpad, block_table,
                                 cu_seqlens, max_seqlen_q, softmax_scale, window_left, window_right,
                                 softcap, alibi_slopes, return_lse, num_splits, counters);
}

}  // namespace
}  // namespace kernels

STABLE_TORCH_LIBRARY_IMPL(mistral_kernels, CPU, m) {
  m.impl("cached_attention", TORCH_BOX(&kernels::cached_attention));
}
