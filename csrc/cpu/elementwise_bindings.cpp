// RMSNorm, SwiGLU and rotary embedding: each row, element or head by itself.
#include "../bindings.h"
#include "dispatch.h"
#include "kernels/rotary.h"
#include "run.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <tuple>
#include <utility>

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr int64_t kGrain = 1 << 15;  // elements, worth a thread

int64_t grain(int64_t width) { return std::max<int64_t>(kGrain / std::max<int64_t>(width, 1), 1); }

using Rows = std::pair<const void*, int64_t>;  // where they begin, and the stride between them

int64_t width_of(const Tensor& x) { return x.dim() ? x.size(x.dim() - 1) : 1; }

// Of as many elements as `like` has and of its dtype: contiguous, or (rows, width) with contiguous
// rows evenly spaced.
Rows rows(const char* name, const Tensor& x, const Tensor& like) {
  KERNELS_CHECK(x.is_cpu() && x.scalar_type() == like.scalar_type(), name,
                " has the wrong device or dtype");
  KERNELS_CHECK(x.numel() == like.numel() && width_of(x) == width_of(like), "the shape of ", name,
                " does not fit the other arguments");
  if (x.is_contiguous()) return {x.data_ptr(), width_of(x)};
  KERNELS_CHECK(x.dim() == 2 && x.stride(1) == 1, name,
                " must be contiguous, or (rows, width) with contiguous rows");
  return {x.data_ptr(), x.stride(0)};
}

Rows rows(const char* name, const OptionalTensor& x, const Tensor& like) {
  return x ? rows(name, *x, like) : Rows{};
}

void* output(const char* name, const OptionalTensor& x, const Tensor& like) {
  return x ? vector_data<void>(name, *x, like.scalar_type(), like.numel()) : nullptr;
}

void rms_norm(const Tensor& x, const OptionalTensor& residual, const Tensor& weight, double eps,
              const Tensor& y, const OptionalTensor& h, const OptionalTensor& rstd) {
  KERNELS_CHECK(residual.has_value() == h.has_value(), "residual and h go together");
  kernels::RMSNorm r{};
  r.hidden = width_of(x);
  r.dtype = dtype_of("x", x);
  std::tie(r.x, r.x_stride) = rows("x", x, x);
  std::tie(r.residual, r.residual_stride) = rows("residual", residual, x);
  r.weight = vector_data<void>("weight", weight, x.scalar_type(), r.hidden);
  r.y = output("y", y, x);
  r.h = output("h", h, x);
  if (x.numel() == 0) return;
  const int64_t count = x.numel() / r.hidden;
  if (rstd) r.rstd = vector_data<float>("rstd", *rstd, ScalarType::Float, count);
  r.eps = static_cast<float>(eps);
  run(r, count);
}

void rms_norm_backward(const Tensor& dy, const OptionalTensor& dh, const Tensor& h,
                       const Tensor& weight, const Tensor& rstd, const OptionalTensor& dx,
                       const OptionalTensor& dweight) {
  kernels::RMSNormBackward r{};
  r.hidden = width_of(h);
  r.dtype = dtype_of("h", h);
  std::tie(r.h, r.h_stride) = rows("h", h, h);
  std::tie(r.dy, r.dy_stride) = rows("dy", dy, h);
  std::tie(r.dh, r.dh_stride) = rows("dh", dh, h);
  r.weight = vector_data<void>("weight", weight, h.scalar_type(), r.hidden);
  r.dx = output("dx", dx, h);
  void* dweight_data = output("dweight", dweight, weight);
  r.rows = r.hidden ? h.numel() / r.hidden : 0;
  r.rstd = vector_data<float>("rstd", rstd, ScalarType::Float, r.rows);
  // Blocks are the same for any number of threads: enough for many, and sums of sums.
  r.rows_of_block = std::max<int64_t>(32, (r.rows + 127) / 128);
  const int64_t blocks = (r.rows + r.rows_of_block - 1) / r.rows_of_block;
  std::unique_ptr<float[]> partial(dweight ? new float[blocks * r.hidden] : nullptr);
  r.partial = partial.get();
  const auto kernel = KERNEL(rms_norm_backward);
  torch::stable::parallel_for(0, blocks, grain(r.rows_of_block * r.hidden),
                              [&](int64_t begin, int64_t end) { kernel(r, begin, end); });
  if (!dweight) return;
  const auto sum = KERNEL(rms_norm_dweight);
  torch::stable::parallel_for(
      0, r.hidden, grain(blocks),
      [&](int64_t begin, int64_t end) { sum(r, blocks, dweight_data, begin, end); });
}

// gate and up, or both in one: a row of gate, then one of up.
kernels::SwiGLU gated(const Tensor& gate, const OptionalTensor& up) {
  kernels::SwiGLU s{};
  s.dtype = dtype_of("gate", gate);
  std::tie(s.gate, s.gate_stride) = rows("gate", gate, gate);
  std::tie(s.up, s.up_stride) = rows("up", up, gate);
  s.gradient_stride = s.cols = width_of(gate);
  if (!up) {
    KERNELS_CHECK(s.cols % 2 == 0, "gate without up must have an even width, got ", s.cols);
    s.cols /= 2;
    s.up = static_cast<const char*>(s.gate) + s.cols * gate.element_size();
    s.up_stride = s.gate_stride;
  }
  return s;
}

void swiglu(const Tensor& gate, const OptionalTensor& up, const Tensor& y) {
  kernels::SwiGLU s = gated(gate, up);
  const int64_t size = up ? gate.numel() : gate.numel() / 2;
  s.y = vector_data<void>("y", y, gate.scalar_type(), size);
  run(s, size);
}

void swiglu_backward(const Tensor& dy, const Tensor& gate, const OptionalTensor& up,
                     const OptionalTensor& dgate, const OptionalTensor& dup) {
  kernels::SwiGLU s = gated(gate, up);
  KERNELS_CHECK(up || !dup, "dup goes with up");
  const int64_t size = up ? gate.numel() : gate.numel() / 2;
  std::tie(s.dy, s.dy_stride) = rows("dy", dy, dy);
  KERNELS_CHECK(
      dy.scalar_type() == gate.scalar_type() && dy.numel() == size && width_of(dy) == s.cols,
      "dy must have the dtype and shape of the output");
  s.dgate = output("dgate", dgate, gate);
  s.dup = output("dup", dup, gate);
  if (!up && s.dgate) s.dup = static_cast<char*>(s.dgate) + s.cols * gate.element_size();
  const auto kernel = KERNEL(swiglu_backward);
  torch::stable::parallel_for(0, size, kGrain,
                              [&](int64_t begin, int64_t end) { kernel(s, begin, end); });
}

// The strides of x's tokens and heads: contiguous, or (tokens, heads, head_dim) with contiguous
// heads.
std::pair<int64_t, int64_t> head_strides(const char* name, const Tensor& x, int64_t tokens,
                                         int64_t head_dim, const Tensor& like) {
  KERNELS_CHECK(x.is_cpu() && x.scalar_type() == like.scalar_type(), name,
                " has the wrong device or dtype");
  const int64_t dim = x.dim();
  KERNELS_CHECK(
      dim >= 2 && x.size(dim - 1) == head_dim && x.numel() == tokens * x.size(dim - 2) * head_dim,
      "the shape of ", name, " does not fit the other arguments");
  if (x.is_contiguous()) return {x.size(dim - 2) * head_dim, head_dim};
  KERNELS_CHECK(dim == 3 && x.stride(2) == 1, name,
                " must be contiguous, or (tokens, heads, head_dim) with contiguous heads");
  return {x.stride(0), x.stride(1)};
}

// x and out may be the same, or must lie apart.
void rotary(const OptionalTensor& q, const OptionalTensor& k, const OptionalTensor& q_out,
            const OptionalTensor& k_out, const Tensor& cos, const Tensor& sin,
            const Tensor& positions, bool interleaved, bool backwards) {
  KERNELS_CHECK(q || k, "q or k must be given");
  const Tensor& like = q ? *q : *k;
  kernels::Rotary r{};
  r.dtype = dtype_of("q", like);
  r.interleaved = interleaved;
  r.backwards = backwards;
  r.head_dim = 2 * width_of(cos);
  const int64_t tokens = positions.numel();
  const auto turned = [&](const char* name, const OptionalTensor& x, const OptionalTensor& out) {
    KERNELS_CHECK(x.has_value() == out.has_value(), name, " and its output go together");
    kernels::Turned t{};
    if (!x) return t;
    std::tie(t.x_token_stride, t.x_head_stride) = head_strides(name, *x, tokens, r.head_dim, like);
    std::tie(t.out_token_stride, t.out_head_stride) =
        head_strides("an output", *out, tokens, r.head_dim, like);
    KERNELS_CHECK(out->numel() == x->numel(), "an output has another shape than ", name);
    t.heads = x->size(x->dim() - 2);
    t.x = x->data_ptr();
    t.out = out->data_ptr();
    return t;
  };
  r.q = turned("q", q, q_out);
  r.k = turned("k", k, k_out);
  const auto table = [&](const char* name, const Tensor& x) {
    KERNELS_CHECK(x.is_cpu() && x.scalar_type() == ScalarType::Float && x.dim() == 2 &&
                      x.size(0) == cos.size(0) && x.size(1) == cos.size(1) &&
                      (x.size(1) <= 1 || x.stride(1) == 1),
                  name, " must be (positions, head_dim / 2) of float32 with contiguous rows");
    return static_cast<const float*>(x.data_ptr());
  };
  r.cos = table("cos", cos);
  r.sin = table("sin", sin);
  r.cos_stride = cos.stride(0);
  r.sin_stride = sin.stride(0);
  r.wide_positions = positions.scalar_type() == ScalarType::Long;
  r.positions = vector_data<void>(
      "positions", positions, r.wide_positions ? ScalarType::Long : ScalarType::Int, tokens);
  for (int64_t token = 0; token < tokens; ++token) {
    const int64_t position = r.wide_positions ? static_cast<const int64_t*>(r.positions)[token]
                                              : static_cast<const int32_t*>(r.positions)[token];
    KERNELS_CHECK(position >= 0 && position < cos.size(0), "positions must lie in the tables' [0, ",
                  cos.size(0), "), got ", position);
  }
  const auto kernel = KERNEL(rotary);
  torch::stable::parallel_for(0, tokens, grain((r.q.heads + r.k.heads) * r.head_dim),
                              [&](int64_t begin, int64_t end) { kernel(r, begin, end); });
}

}  // namespace

void kernels::run(const RMSNorm& r, int64_t rows) {
  const auto kernel = KERNEL(rms_norm);
  torch::stable::parallel_for(0, rows, grain(r.hidden),
                              [&](int64_t begin, int64_t end) { kernel(r, begin, end); });
}

void kernels::run(const SwiGLU& s, int64_t elements) {
  const auto kernel = KERNEL(swiglu);
  torch::stable::parallel_for(0, elements, kGrain,
                              [&](int64_t begin, int64_t end) { kernel(s, begin, end); });
}

LIBRARY_FRAGMENT(KERNELS_NAMESPACE, m) {
  m.def(
      "rms_norm(Tensor x, Tensor? residual, Tensor weight, float eps, Tensor(a!) y, "
      "Tensor(b!)? h, Tensor(c!)? rstd) -> ()");
  m.def(
      "rms_norm_backward(Tensor dy, Tensor? dh, Tensor h, Tensor weight, Tensor rstd, "
      "Tensor(a!)? dx, Tensor(b!)? dweight) -> ()");
  m.def("swiglu(Tensor gate, Tensor? up, Tensor(a!) y) -> ()");
  m.def(
      "swiglu_backward(Tensor dy, Tensor gate, Tensor? up, Tensor(a!)? dgate, Tensor(b!)? dup) "
      "-> ()");
  m.def(
      "rotary(Tensor? q, Tensor? k, Tensor(a!)? q_out, Tensor(b!)? k_out, Tensor cos, Tensor sin, "
      "Tensor positions, bool interleaved, bool backwards) -> ()");
}

LIBRARY_IMPL(KERNELS_NAMESPACE, CPU, m) {
  m.impl("rms_norm", TORCH_BOX(&rms_norm));
  m.impl("rms_norm_backward", TORCH_BOX(&rms_norm_backward));
  m.impl("swiglu", TORCH_BOX(&swiglu));
  m.impl("swiglu_backward", TORCH_BOX(&swiglu_backward));
  m.impl("rotary", TORCH_BOX(&rotary));
}
