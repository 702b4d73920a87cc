// Attention over whole sequences on the CPU; see mistral_kernels/ops/attention.
#include "attention.h"

#include "buffer.h"

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
  Attention a{};
  const AttentionTensors tensors =
      set_inputs(a, q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, window_left, window_right,
                 softcap, alibi_slopes);
  Tensor out = new_like(q);
  a.out = heads_of(out);
  Tensor lse = absent(ScalarType::Float, q);
  if (return_lse) {
    lse = new_tensor(lse_sizes(a, tensors.ends_q.has_value()), ScalarType::Float, q);
    a.lse = static_cast<float*>(lse.data_ptr());
  }
  if (tensors.ends_q) {
    run_packed(a, *tensors.ends_q, *tensors.ends_k, max_seqlen_q, max_seqlen_k);
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
