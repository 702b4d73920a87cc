// RMSNorm on the CPU; see mistral_kernels/ops/rms_norm.py.
#include "kernels/rms_norm.h"

#include "operator.h"
#include "run.h"

#include <cmath>
#include <memory>

namespace kernels {

void run(const RMSNorm& r, int64_t rows) {
  const auto kernel = KERNEL(rms_norm);
  torch::stable::parallel_for(0, rows, grain(r.hidden),
                              [&](int64_t begin, int64_t end) { kernel(r, begin, end); });
}

namespace {

using TwoTensors = std::tuple<Tensor, Tensor>;
using ThreeTensors = std::tuple<Tensor, Tensor, Tensor>;

// Returns the shape of x without its last dimension.
torch::headeronly::IntHeaderOnlyArrayRef row_sizes(const Tensor& x) {
  require(x.dim() > 0);
  return {x.sizes().data(), static_cast<size_t>(x.dim() - 1)};
}

ThreeTensors forward(const Tensor& x, const Tensor& weight, const OptionalTensor& residual,
                     double eps, bool save_rstd) {
  require(eps >= 0 && std::isfinite(eps));
  const auto outer = row_sizes(x);
  RMSNorm r{};
  r.dtype = required_dtype(x);
  r.hidden = width_of(x);
  r.eps = static_cast<float>(eps);
  const Parts rows = rows_like(x, x);
  r.x = rows.x.data_ptr();
  r.x_stride = rows.outer_stride;
  std::optional<Parts> residual_rows;
  if (residual) {
    residual_rows = rows_like(*residual, x);
    r.residual = residual_rows->x.data_ptr();
    r.residual_stride = residual_rows->outer_stride;
  }
  const Tensor scale = vector_of(weight, x.scalar_type(), r.hidden);
  r.weight = scale.data_ptr();
  Tensor y = new_like(x), h = residual ? new_like(x) : absent(x.scalar_type(), x);
  Tensor rstd = save_rstd ? new_tensor(outer, ScalarType::Float, x) : absent(ScalarType::Float, x);
  r.y = y.data_ptr();
  if (residual) r.h = h.data_ptr();
  if (save_rstd) r.rstd = static_cast<float*>(rstd.data_ptr());
  if (x.numel()) run(r, x.numel() / r.hidden);
  return {y, h, rstd};
}

TwoTensors backward(const Tensor& dy, const OptionalTensor& dh, const Tensor& h,
                    const Tensor& weight, const Tensor& rstd, bool needs_dx, bool needs_dweight) {
  const auto outer = row_sizes(h);
  RMSNormBackward r{};
  r.dtype = required_dtype(h);
  r.hidden = width_of(h);
  const Parts h_rows = rows_like(h, h), dy_rows = rows_like(dy, h);
  r.h = h_rows.x.data_ptr();
  r.h_stride = h_rows.outer_stride;
  r.dy = dy_rows.x.data_ptr();
  r.dy_stride = dy_rows.outer_stride;
  std::optional<Parts> dh_rows;
  if (dh) {
    dh_rows = rows_like(*dh, h);
    r.dh = dh_rows->x.data_ptr();
    r.dh_stride = dh_rows->outer_stride;
  }
  const Tensor scale = vector_of(weight, h.scalar_type(), r.hidden);
  r.weight = scale.data_ptr();
  const auto sizes = rstd.sizes();
  require(is_on_cpu(rstd, ScalarType::Float) &&
          std::equal(sizes.begin(), sizes.end(), outer.begin(), outer.end()));
  const Tensor rstds = as_contiguous(rstd);
  r.rstd = static_cast<const float*>(rstds.data_ptr());
  r.rows = r.hidden ? rstd.numel() : 0;
  Tensor dx = needs_dx ? new_like(h) : absent(h.scalar_type(), h);
  Tensor dweight = needs_dweight ? new_like(weight) : absent(h.scalar_type(), h);
  if (needs_dx) r.dx = dx.data_ptr();
  // The size of a block does not depend on the number of threads, so results do not. At most 128
  // blocks suffice for many threads, and summing per block first reduces the rounding error.
  r.rows_of_block = std::max<int64_t>(32, (r.rows + 127) / 128);
  const int64_t blocks = (r.rows + r.rows_of_block - 1) / r.rows_of_block;
  const std::unique_ptr<float[]> partial(needs_dweight ? new float[blocks * r.hidden] : nullptr);
  r.partial = partial.get();
  const auto kernel = KERNEL(rms_norm_backward);
  torch::stable::parallel_for(0, blocks, grain(r.rows_of_block * r.hidden),
                              [&](int64_t begin, int64_t end) { kernel(r, begin, end); });
  if (!needs_dweight) return {dx, dweight};
  void* const sums = dweight.data_ptr();
  const auto sum = KERNEL(rms_norm_dweight);
  torch::stable::parallel_for(
      0, r.hidden, grain(blocks),
      [&](int64_t begin, int64_t end) { sum(r, blocks, sums, begin, end); });
  return {dx, dweight};
}

ThreeTensors rms_norm_forward(const Tensor& x, const Tensor& weight, const OptionalTensor& residual,
                              double eps, bool save_rstd) {
  return run_or_call<ThreeTensors>(
      "mistral_kernels::rms_norm_forward_python",
      [&] { return forward(x, weight, residual, eps, save_rstd); }, x, weight, residual, eps,
      save_rstd);
}

TwoTensors rms_norm_backward(const Tensor& dy, const OptionalTensor& dh, const Tensor& h,
                             const Tensor& weight, const Tensor& rstd, bool needs_dx,
                             bool needs_dweight) {
  return run_or_call<TwoTensors>(
      "mistral_kernels::rms_norm_backward_python",
      [&] { return backward(dy, dh, h, weight, rstd, needs_dx, needs_dweight); }, dy, dh, h, weight,
      rstd, needs_dx, needs_dweight);
}

}  // namespace
}  // namespace kernels

STABLE_TORCH_LIBRARY_IMPL(mistral_kernels, CPU, m) {
  m.impl("rms_norm_forward", TORCH_BOX(&kernels::rms_norm_forward));
  m.impl("rms_norm_backward", TORCH_BOX(&kernels::rms_norm_backward));
}
