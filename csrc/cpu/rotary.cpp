// The rotary embedding on the CPU; see mistral_kernels/ops/rotary.py.
#include "kernels/rotary.h"

#include "operator.h"

namespace kernels {
namespace {

using TwoTensors = std::tuple<Tensor, Tensor>;

// The checked tables and positions of a call.
struct Angles {
  Tensor cos, sin, positions;
  Rotary arguments{};

  // `like` is q or k.
  Angles(const Tensor& like, const Tensor& cos_table, const Tensor& sin_table,
         const Tensor& positions_of, bool interleaved) {
    Rotary& r = arguments;
    r.dtype = required_dtype(like);
    require(like.dim() >= 2);
    const auto sizes = like.sizes(), tokens = positions_of.sizes();
    require(std::equal(sizes.begin(), sizes.end() - 2, tokens.begin(), tokens.end()));
    r.wide_positions = positions_of.scalar_type() == ScalarType::Long;
    require(is_on_cpu(positions_of, r.wide_positions ? ScalarType::Long : ScalarType::Int));
    require(sin_table.scalar_type() == cos_table.scalar_type());
    positions = as_contiguous(positions_of);
    r.head_dim = sizes.back();
    r.interleaved = interleaved;
    cos = table(cos_table, cos_table, r.head_dim);
    sin = table(sin_table, cos_table, r.head_dim);
    r.cos = static_cast<const float*>(cos.data_ptr());
    r.sin = static_cast<const float*>(sin.data_ptr());
    r.cos_stride = cos.stride(0);
    r.sin_stride = sin.stride(0);
    r.positions = positions.data_ptr();
    for (int64_t token = 0; token < positions.numel(); ++token) {
      const int64_t position = r.position_of(token);
      require(position >= 0 && position < cos.size(0));
    }
  }

  // Returns a checked table as float32 with contiguous rows.
  static Tensor table(const Tensor& x, const Tensor& cos, int64_t head_dim) {
    require(x.is_cpu() && (dtype_of(x) || x.scalar_type() == ScalarType::Double));
    require(x.dim() == 2 && x.size(0) == cos.size(0) && 2 * x.size(1) == head_dim);
    const bool is_float = x.scalar_type() == ScalarType::Float;
    const Tensor floats = is_float ? x : torch::stable::to(x, ScalarType::Float);
    return floats.size(1) <= 1 || floats.stride(1) == 1 ? floats : as_contiguous(floats);
  }

  void run() const {
    const auto kernel = KERNEL(rotary);
    const Rotary& r = arguments;
    torch::stable::parallel_for(0, positions.numel(), grain((r.q.heads + r.k.heads) * r.head_dim),
                                [&](int64_t begin, int64_t end) { kernel(r, begin, end); });
  }
};

// Requires that x has the dtype, the token dimensions and the head_dim of `like`.
void require_heads(const Tensor& x, const Tensor& like) {
  require(is_on_cpu(x, like.scalar_type()) && x.dim() == like.dim());
  const auto sizes = x.sizes(), others = like.sizes();
  require(sizes.back() == others.back() &&
          std::equal(sizes.begin(), sizes.end() - 2, others.begin()));
}

Heads heads_of(const Parts& x) { return {x.x.data_ptr(), 0, x.outer_stride, x.inner_stride}; }

int64_t count_heads(const Tensor& x) { return x.size(x.dim() - 2); }

TwoTensors rotate(const OptionalTensor& q, const OptionalTensor& k, const Tensor& cos,
                  const Tensor& sin, const Tensor& positions, bool interleaved, bool inverse) {
  require(q || k);
  const Tensor& like = q ? *q : *k;
  Angles angles(like, cos, sin, positions, interleaved);
  Rotary& r = angles.arguments;
  r.inverse = inverse;
  std::optional<Parts> read[2];
  const auto prepare = [&](const OptionalTensor& x, std::optional<Parts>& parts, Rotated& rotated) {
    if (!x) return absent(cos.scalar_type(), cos);
    require_heads(*x, like);
    parts = parts_of(*x, 2);
    Tensor out = new_like(*x);
    rotated.heads = count_heads(*x);
    rotated.x = heads_of(*parts);
    rotated.out = {out.data_ptr(), 0, rotated.heads * r.head_dim, r.head_dim};
    return out;
  };
  Tensor q_out = prepare(q, read[0], r.q), k_out = prepare(k, read[1], r.k);
  angles.run();
  return {q_out, k_out};
}

// The memory of a tensor, in elements: `stride` between tokens, `row` spanned by one token, `end`
// spanned by all tokens.
struct Extent {
  int64_t stride, row, end;
};

// Returns the extent of x, which is rotated in place. Requires that x needs no copy and that no two
// of its elements share memory.
Extent extent_of(const Tensor& x, const std::optional<Parts>& parts, int64_t tokens) {
  if (x.numel() == 0) return {0, 0, 0};
  require(parts.has_value());
  const int64_t heads = count_heads(x);
  int64_t end = x.size(x.dim() - 1);
  const int64_t row = (heads - 1) * parts->inner_stride + end;
  std::pair<int64_t, int64_t> steps[] = {{parts->outer_stride, tokens},
                                         {parts->inner_stride, heads}};
  if (steps[1] < steps[0]) std::swap(steps[0], steps[1]);
  for (const auto& [stride, size] : steps) {
    require(size == 1 || stride >= end);
    end += (size - 1) * stride;
  }
  return {parts->outer_stride, row, end};
}

// Requires that q and k, which are rotated in place, do not overlap.
void require_no_overlap(const Tensor& q, const Extent& in_q, const Tensor& k, const Extent& in_k,
                        int64_t element_size) {
  if (!in_q.end || !in_k.end) return;
  const int64_t bytes = static_cast<char*>(k.data_ptr()) - static_cast<char*>(q.data_ptr());
  const int64_t ahead = bytes / element_size;
  if (ahead >= in_q.end || ahead <= -in_k.end) return;
  // In a fused projection the memory of q and k alternates, token by token.
  require(in_q.stride == in_k.stride && in_q.stride > 0);
  const int64_t offset = (ahead % in_q.stride + in_q.stride) % in_q.stride;
  require(in_q.row <= offset && offset <= in_q.stride - in_k.row);
}

void rotate_in_place(const Tensor& q, const Tensor& k, const Tensor& cos, const Tensor& sin,
                     const Tensor& positions, bool interleaved) {
  Angles angles(q, cos, sin, positions, interleaved);
  Rotary& r = angles.arguments;
  require_heads(q, q);
  require_heads(k, q);
  const auto q_parts = parts_without_copy(q, 2), k_parts = parts_without_copy(k, 2);
  const int64_t tokens = angles.positions.numel();
  const Extent in_q = extent_of(q, q_parts, tokens), in_k = extent_of(k, k_parts, tokens);
  require_no_overlap(q, in_q, k, in_k, size_of(r.dtype));
  const auto prepare = [&](const Tensor& x, const std::optional<Parts>& parts, Rotated& rotated) {
    if (x.numel() == 0) return;
    rotated.heads = count_heads(x);
    rotated.x = rotated.out = heads_of(*parts);
  };
  prepare(q, q_parts, r.q);
  prepare(k, k_parts, r.k);
  angles.run();
}

TwoTensors rotary(const OptionalTensor& q, const OptionalTensor& k, const Tensor& cos,
                  const Tensor& sin, const Tensor& positions, bool interleaved, bool inverse) {
  return run_or_call<TwoTensors>(
      "mistral_kernels::rotary_python",
      [&] { return rotate(q, k, cos, sin, positions, interleaved, inverse); }, q, k, cos, sin,
      positions, interleaved, inverse);
}

void rotary_in_place(const Tensor& q, const Tensor& k, const Tensor& cos, const Tensor& sin,
                     const Tensor& positions, bool interleaved) {
  run_or_call<void>("mistral_kernels::rotary__python",
                    [&] { rotate_in_place(q, k, cos, sin, positions, interleaved); }, q, k, cos,
                    sin, positions, interleaved);
}

}  // namespace
}  // namespace kernels

STABLE_TORCH_LIBRARY_IMPL(mistral_kernels, CPU, m) {
  m.impl("rotary", TORCH_BOX(&kernels::rotary));
  m.impl("rotary_", TORCH_BOX(&kernels::rotary_in_place));
}
