// Backward pass of attention over whole sequences on the CPU; see mistral_kernels/ops/attention.
#include "kernels/attention_backward.h"

#include "attention.h"
#include "buffer.h"

#include <cstring>

namespace kernels {
namespace {

using ThreeTensors = std::tuple<Tensor, Tensor, Tensor>;

// Returns floor(x / y) for y > 0.
int64_t floor_div(int64_t x, int64_t y) { return x / y - (x % y < 0); }

// Returns whether exp(s - lse) is accurate. The rounding error of lse is the relative error of all
// weights of a row: at most 16 roundings of float32, or less than one of the 16-bit dtypes.
bool has_accurate_weights(const float* lse, int64_t size, DType dtype) {
  const float limit = dtype == DType::float32 ? 64 : 4096;
  return std::all_of(lse, lse + size,
                     [&](float x) { return std::isinf(x) || std::abs(x) <= limit; });
}

// Computes the gradients of a batch of sequences of equal lengths. The caller leaves the sums and
// `packed` null.
void run(AttentionBackward a) {
  const BackwardSizes sizes = KERNEL(backward_sizes)(a);
  const int64_t rows = a.batch * a.heads * a.seqlen_q, kv_heads = a.batch * a.kv_heads;
  const int64_t sum_bytes = sizes.width * static_cast<int64_t>(sizeof(float));
  const Buffer deltas(rows * static_cast<int64_t>(sizeof(float)));
  const Buffer packed(sizes.packed_bytes);
  const Buffer dq(a.dq.data ? rows * sum_bytes : 0);
  const Buffer dk(a.dk.data ? kv_heads * a.seqlen_k * sum_bytes : 0);
  const Buffer dv(a.dv.data ? kv_heads * a.seqlen_k * sum_bytes : 0);
  const auto sums = [](const Heads& to, const Buffer& buffer) {
    return to.data ? reinterpret_cast<float*>(buffer.data()) : nullptr;
  };
  a.deltas = reinterpret_cast<float*>(deltas.data());
  a.packed = packed.data();
  a.dq_sums = sums(a.dq, dq);
  a.dk_sums = sums(a.dk, dk);
  a.dv_sums = sums(a.dv, dv);
  const auto prepare_rows = KERNEL(prepare_rows), store_rows = KERNEL(store_rows);
  const auto prepare_keys = KERNEL(prepare_keys), store_keys = KERNEL(store_keys);
  torch::stable::parallel_for(0, rows, grain(a.head_dim),
                              [&](int64_t begin, int64_t end) { prepare_rows(a, begin, end); });
  torch::stable::parallel_for(0, kv_heads * sizes.key_chunks, 1,
                              [&](int64_t begin, int64_t end) { prepare_keys(a, begin, end); });

  // Chunks of queries see chunks of keys on these diagonals.
  const int64_t offset = a.seqlen_k - a.seqlen_q;
  const int64_t first = std::max(floor_div(offset - std::min(a.left, a.seqlen_k), sizes.chunk),
                                 1 - sizes.query_chunks);
  const int64_t last =
      std::min(floor_div(offset + std::min(a.right, a.seqlen_q) + sizes.chunk - 1, sizes.chunk),
               sizes.key_chunks - 1);
  const auto add_gradients = KERNEL(add_gradients);
  for (int64_t diagonal = first; diagonal <= last; ++diagonal) {
    const int64_t first_chunk = std::max<int64_t>(-diagonal, 0);
    const int64_t chunks = std::min(sizes.query_chunks, sizes.key_chunks - diagonal) - first_chunk;
    if (chunks <= 0) continue;
    torch::stable::parallel_for(0, kv_heads * chunks, 1, [&](int64_t begin, int64_t end) {
      const Buffer scratch(sizes.scratch_bytes);
      add_gradients(a, scratch.data(), diagonal, first_chunk, chunks, begin, end);
    });
  }

  torch::stable::parallel_for(0, rows, grain(a.head_dim),
                              [&](int64_t begin, int64_t end) { store_rows(a, begin, end); });
  torch::stable::parallel_for(0, kv_heads * a.seqlen_k, grain(a.head_dim),
                              [&](int64_t begin, int64_t end) { store_keys(a, begin, end); });
}

// Runs each sequence separately. The gradients of tokens after the last sequence are 0.
void run_packed(const AttentionBackward& a, const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k,
                int64_t max_seqlen_q, int64_t max_seqlen_k) {
  const int32_t* ends_q = checked_offsets(cu_seqlens_q, a.seqlen_q, max_seqlen_q);
  const int32_t* ends_k = checked_offsets(cu_seqlens_k, a.seqlen_k, max_seqlen_k);
  const int64_t batch = cu_seqlens_q.numel() - 1;
  for (int64_t i = 0; i < batch; ++i) {
    AttentionBackward one = a;
    one.seqlen_q = ends_q[i + 1] - ends_q[i];
    one.seqlen_k = ends_k[i + 1] - ends_k[i];
    for (Heads* heads : {&one.q, &one.out, &one.dout, &one.dq}) {
      if (heads->data) *heads = from_token(*heads, ends_q[i], a.dtype);
    }
    for (Heads* heads : {&one.k, &one.v, &one.dk, &one.dv}) {
      if (heads->data) *heads = from_token(*heads, ends_k[i], a.dtype);
    }
    one.lse = a.lse + ends_q[i];
    if (a.slopes) one.slopes = a.slopes + i * a.slope_stride;
    run(one);
  }
  const auto clear = [&](const Heads& heads, int64_t begin, int64_t end) {
    if (!heads.data) return;
    std::memset(from_token(heads, begin, a.dtype).data, 0,
                (end - begin) * heads.token_stride * size_of(a.dtype));
  };
  clear(a.dq, ends_q[batch], a.seqlen_q);
  clear(a.dk, ends_k[batch], a.seqlen_k);
  clear(a.dv, ends_k[batch], a.seqlen_k);
}

ThreeTensors backward(const Tensor& dout, const Tensor& q, const Tensor& k, const Tensor& v,
                      const Tensor& out, const Tensor& lse, const OptionalTensor& cu_seqlens_q,
                      const OptionalTensor& cu_seqlens_k, int64_t max_seqlen_q,
                      int64_t max_seqlen_k, std::optional<double> softmax_scale,
                      int64_t window_left, int64_t window_right, double softcap,
                      const OptionalTensor& alibi_slopes, bool needs_dq, bool needs_dk,
                      bool needs_dv) {
  AttentionBackward a{};
  const AttentionTensors tensors =
      set_inputs(a, q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, window_left, window_right,
                 softcap, alibi_slopes);
  for (const Tensor* x : {&dout, &out}) {
    require(is_on_cpu(*x, q.scalar_type()) && same_shape(*x, q));
  }
  const std::vector<int64_t> sizes = lse_sizes(a, tensors.ends_q.has_value());
  require(is_on_cpu(lse, ScalarType::Float) && lse.dim() == static_cast<int64_t>(sizes.size()) &&
          std::equal(sizes.begin(), sizes.end(), lse.sizes().begin()));
  const Tensor row_lse = as_contiguous(lse);
  a.lse = static_cast<const float*>(row_lse.data_ptr());
  require(has_accurate_weights(a.lse, row_lse.numel(), a.dtype));
  const Tensor outputs = with_unit_stride(out), gradients = with_unit_stride(dout);
  a.out = heads_of(outputs);
  a.dout = heads_of(gradients);
  const auto result = [&](const Tensor& like, bool needed, Heads& to) {
    if (!needed) return absent(like.scalar_type(), q);
    const Tensor x = new_like(like);
    to = heads_of(x);
    return x;
  };
  const Tensor dq = result(q, needs_dq, a.dq), dk = result(k, needs_dk, a.dk),
               dv = result(v, needs_dv, a.dv);
  if (tensors.ends_q) {
    run_packed(a, *tensors.ends_q, *tensors.ends_k, max_seqlen_q, max_seqlen_k);
  } else {
    run(a);
  }
  return {dq, dk, dv};
}

ThreeTensors attention_backward(
    const Tensor& dout, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out,
    const Tensor& lse, const OptionalTensor& cu_seqlens_q, const OptionalTensor& cu_seqlens_k,
    int64_t max_seqlen_q, int64_t max_seqlen_k, std::optional<double> softmax_scale,
    int64_t window_left, int64_t window_right, double softcap, const OptionalTensor& alibi_slopes,
    bool needs_dq, bool needs_dk, bool needs_dv) {
  const auto run = [&] {
    Tensor given = lse;
    if (lse.dim() == 1 && lse.numel() == 0) {
      // The caller did not request it in the forward pass.
      given = std::get<1>(call_python<std::tuple<Tensor, Tensor>>(
          "mistral_kernels::attention_forward", q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q,
          max_seqlen_k, softmax_scale, window_left, window_right, softcap, alibi_slopes, true));
    }
    return backward(dout, q, k, v, out, given, cu_seqlens_q, cu_seqlens_k, max_seqlen_q,
                    max_seqlen_k, softmax_scale, window_left, window_right, softcap, alibi_slopes,
                    needs_dq, needs_dk, needs_dv);
  };
  return run_or_call<ThreeTensors>("mistral_kernels::attention_backward_python", run, dout, q, k, v,
                                   out, lse, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
                                   softmax_scale, window_left, window_right, softcap, alibi_slopes,
                                   needs_dq, needs_dk, needs_dv);
}

}  // namespace
}  // namespace kernels

STABLE_TORCH_LIBRARY_IMPL(mistral_kernels, CPU, m) {
  m.impl("attention_backward", TORCH_BOX(&kernels::attention_backward));
}
