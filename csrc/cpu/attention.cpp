// Attention over whole sequences on the CPU; see mistral_kernels/ops/attention.
#include "kernels/attention.h"

#include "buffer.h"
#include "operator.h"

namespace kernels {
namespace {

constexpr int64_t kFarthest = int64_t{1} << 62;  // positions can be added to it

Heads heads(const char* name, const Tensor& x, const Tensor& like, int64_t batch,
            int64_t seqlen, int64_t num_heads) {
  KERNELS_CHECK(x.is_cpu() && x.scalar_type() == like.scalar_type() && x.dim() == 4 &&
                    x.size(0) == batch && x.size(1) == seqlen && x.size(2) == num_heads &&
                    x.size(3) == like.size(3) && (x.size(3) == 1 || x.stride(3) == 1),
                name, " has the wrong device, dtype, shape or strides");
  return {x.data_ptr(), x.stride(0), x.stride(1), x.stride(2)};
}

void attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out,
               const OptionalTensor& lse, int64_t left, int64_t right, double scale,
               double softcap) {
  KERNELS_CHECK(q.dim() == 4 && k.dim() == 4, "q and k must have 4 dimensions");
  Attention a{};
  a.batch = q.size(0);
  a.seqlen_q = q.size(1);
  a.seqlen_k = k.size(1);
  a.heads = static_cast<int>(q.size(2));
  a.kv_heads = static_cast<int>(k.size(2));
  a.head_dim = static_cast<int>(q.size(3));
  KERNELS_CHECK(a.head_dim > 0 && a.head_dim <= 256, "head_dim must lie in [1, 256]");
  check_heads(q.size(2), k.size(2));
  KERNELS_CHECK(left >= 0 && right >= 0, "left and right must be >= 0");
  a.q = heads("q", q, q, a.batch, a.seqlen_q, a.heads);
  a.k = heads("k", k, q, a.batch, a.seqlen_k, a.kv_heads);
  a.v = heads("v", v, q, a.batch, a.seqlen_k, a.kv_heads);
  a.out = heads("out", out, q, a.batch, a.seqlen_q, a.heads);
  if (lse) {
    KERNELS_CHECK(lse->is_cpu() && lse->scalar_type() == ScalarType::Float &&
                      lse->is_contiguous() && lse->numel() == a.batch * a.heads * a.seqlen_q,
                  "lse must be contiguous float32 of (batch, heads, seqlen_q)");
    a.lse = static_cast<float*>(lse->data_ptr());
  }
  a.left = std::min(left, kFarthest);
  a.right = std::min(right, kFarthest);
  a.scale = static_cast<float>(scale);
  a.softcap = static_cast<float>(softcap);
  a.dtype = checked_dtype("q", q);

  const Sizes sizes = KERNEL(sizes)(a);
  const int64_t kv_heads = a.batch * a.kv_heads;
  const Buffer packed(sizes.packed_bytes);
  a.packed = packed.data();
  const auto pack = KERNEL(pack_keys);
  torch::stable::parallel_for(0, kv_heads * sizes.key_blocks, 8,
                              [&](int64_t begin, int64_t end) { pack(a, begin, end); });
  const auto attend = KERNEL(attend);
  torch::stable::parallel_for(0, kv_heads * sizes.query_blocks, 1, [&](int64_t begin, int64_t end) {
    const Buffer scratch(sizes.scratch_bytes);
    attend(a, scratch.data(), begin, end);
  });
}

}  // namespace
}  // namespace kernels

STABLE_TORCH_LIBRARY_FRAGMENT(mistral_kernels, m) {
  m.def(
      "attention(Tensor q, Tensor k, Tensor v, Tensor(a!) out, Tensor(b!)? lse, int left, "
      "int right, float scale, float softcap) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(mistral_kernels, CPU, m) {
  m.impl("attention", TORCH_BOX(&kernels::attention));
}
