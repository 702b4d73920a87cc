// Attention over whole sequences on the CPU; see mistral_kernels/ops/attention.
#include "attention.h"

#include "buffer.h"
#include "kernels/attention.h"

#include <cstring>
#include <limits>

namespace kernels {
namespace {

using TwoTensors = std::tuple<Tensor, Tensor>;

// Packs the keys and values, then attends to them. The caller leaves `packed` null.
void run(Attention a) {
  const Sizes sizes = KERNEL(sizes)(a);
  const int64_t kv_heads = a.batch * a.kv_heads;
  const Buffer packed(sizes.packed_bytes);
  a.packed = packed.data();
  const auto pack = KERNEL(pack_keys);
  torch::stable::parallel_for(0, kv_heads * sizes.key_blocks, 2,
                              [&](int64_t begin, int64_t end) { pack(a, begin, end); });
  const auto attend = KERNEL(attend);
  torch::stable::parallel_for(0, kv_heads * sizes.query_blocks, 1, [&](int64_t begin, int64_t end) {
    const Buffer scratch(sizes.scratch_bytes);
    attend(a, scratch.data(), begin, end);
  });
}

// Runs each sequence separately. Tokens after the last sequence get an output of 0 and a
// log-sum-exp of -inf.
void run_packed(const Attention& a, const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k,
                int64_t max_seqlen_q, int64_t max_seqlen_k) {
  const int32_t* ends_q = checked_offsets(cu_seqlens_q, a.seqlen_q, max_seqlen_q);
  const int32_t* ends_k = checked_offsets(cu_seqlens_k, a.seqlen_k, max_seqlen_k);
  const int64_t batch = cu_seqlens_q.numel() - 1;
  for (int64_t i = 0; i < batch; ++i) {
    Attention one = a;
    one.seqlen_q = ends_q[i + 1] - ends_q[i];
    one.seqlen_k = ends_k[i + 1] - ends_k[i];
    one.q = from_token(a.q, ends_q[i], a.dtype);
    one.out = from_token(a.out, ends_q[i], a.dtype);
    one.k = from_token(a.k, ends_k[i], a.dtype);
    one.v = from_token(a.v, ends_k[i], a.dtype);
    if (a.lse) one.lse = a.lse + ends_q[i];
    if (a.slopes) one.slopes = a.slopes + i * a.slope_stride;
    run(one);
  }
  const int64_t end = ends_q[batch], rest = a.seqlen_q - end;
  if (rest == 0) return;
  std::memset(from_token(a.out, end, a.dtype).data, 0,
              rest * a.heads * a.head_dim * size_of(a.dtype));
  for (int64_t head = 0; a.lse && head < a.heads; ++head) {
    std::fill_n(a.lse + head * a.lse_stride + end, rest, -std::numeric_limits<float>::infinity());
  }
}

TwoTensors forward(const Tensor& q, const Tensor& k, const Tensor& v,
                   const OptionalTensor& cu_seqlens_q, const OptionalTensor& cu_seqlens_k,
                   int64_t max_seqlen_q, int64_t max_seqlen_k, std::optional<double> softmax_scale,
                   int64_t window_left, int64_t window_right, double softcap,
                   const OptionalTensor& alibi_slopes, bool return_lse) {
  const bool packed = cu_seqlens_q.has_value();
  const int64_t dim = packed ? 3 : 4;
  for (const Tensor* x : {&q, &k, &v}) {
    require(is_on_cpu(*x, q.scalar_type()) && x->dim() == dim &&
            x->size(dim - 1) == q.size(dim - 1));
  }
  require(same_shape(v, k) && (packed || (!cu_seqlens_k && k.size(0) == q.size(0))));
  require(softcap == 0 || (softcap >= FLT_MIN && softcap <= FLT_MAX));
  const int64_t heads = q.size(dim - 2), kv_heads = k.size(dim - 2), head_dim = q.size(dim - 1);
  Attention a{};
  a.dtype = required_dtype(q);
  require_heads(heads, kv_heads, head_dim);
  a.scale = scale_of(softmax_scale, head_dim);
  a.softcap = static_cast<float>(softcap);
  a.left = window_bound(window_left);
  a.right = window_bound(window_right);
  a.batch = packed ? 1 : q.size(0);
  a.seqlen_q = q.size(dim - 3);
  a.seqlen_k = k.size(dim - 3);
  a.heads = static_cast<int>(heads);
  a.kv_heads = static_cast<int>(kv_heads);
  a.head_dim = static_cast<int>(head_dim);
  const Tensor queries = with_unit_stride(q), keys = with_unit_stride(k),
               values = with_unit_stride(v);
  a.q = heads_of(queries);
  a.k = heads_of(keys);
  a.v = heads_of(values);
  OptionalTensor slopes;
  if (alibi_slopes) {
    const int64_t sequences = packed ? cu_seqlens_q->numel() - 1 : a.batch;
    slopes = slopes_of(*alibi_slopes, sequences, heads);
    a.slopes = static_cast<const float*>(slopes->data_ptr());
    a.slope_stride = slopes->dim() == 2 ? heads : 0;
  }
  Tensor out = new_like(q);
  a.out = heads_of(out);
  std::vector<int64_t> lse_sizes{heads, a.seqlen_q};
  if (!packed) lse_sizes.insert(lse_sizes.begin(), a.batch);
  Tensor lse = return_lse ? new_tensor(lse_sizes, ScalarType::Float, q)
                          : absent(ScalarType::Float, q);
  if (return_lse) a.lse = static_cast<float*>(lse.data_ptr());
  a.lse_stride = a.seqlen_q;
  if (packed) {
    const int64_t entries = cu_seqlens_q->numel();
    require(entries > 0);
    const Tensor ends_q = vector_of(*cu_seqlens_q, ScalarType::Int, entries);
    const Tensor ends_k =
        cu_seqlens_k ? vector_of(*cu_seqlens_k, ScalarType::Int, entries) : ends_q;
    run_packed(a, ends_q, ends_k, max_seqlen_q, max_seqlen_k);
  } else {
    run(a);
  }
  return {out, lse};
}

TwoTensors attention_forward(const Tensor& q, const Tensor& k, const Tensor& v,
                             const OptionalTensor& cu_seqlens_q, const OptionalTensor& cu_seqlens_k,
                             int64_t max_seqlen_q, int64_t max_seqlen_k,
                             std::optional<double> softmax_scale, int64_t window_left,
                             int64_t window_right, double softcap,
                             const OptionalTensor& alibi_slopes, bool return_lse) {
  const auto run = [&] {
    return forward(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale,
                   window_left, window_right, softcap, alibi_slopes, return_lse);
  };
  return run_or_call<TwoTensors>("mistral_kernels::attention_forward_python", run, q, k, v,
                                 cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
                                 softmax_scale, window_left, window_right, softcap, alibi_slopes,
                                 return_lse);
}

}  // namespace
}  // namespace kernels

STABLE_TORCH_LIBRARY_IMPL(mistral_kernels, CPU, m) {
  m.impl("attention_forward", TORCH_BOX(&kernels::attention_forward));
}
