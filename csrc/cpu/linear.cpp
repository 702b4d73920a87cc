// The product of a few rows with a large weight on the CPU; see linear.py and linear_int8.py in
// mistral_kernels/ops.
#include "kernels/linear.h"

#include "buffer.h"
#include "operator.h"
#include "run.h"

namespace kernels {

void run(const Linear& l) {
  constexpr int64_t kBytes = 1 << 17;  // bytes read per thread, at least
  const auto kernel = KERNEL(linear);
  const int64_t row_bytes = l.in_features * (l.scales ? 1 : size_of(l.dtype));
  const int64_t scratch_bytes = KERNEL(linear_scratch_bytes)(l);
  torch::stable::parallel_for(
      0, l.rows ? l.out_features : 0, kBytes / (row_bytes + 1) + 1,
      [&](int64_t begin, int64_t end) {
        const Buffer scratch(scratch_bytes);
        kernel(l, scratch.data(), begin, end);
      });
}

namespace {

Tensor multiply(const Tensor& x, const Tensor& weight, const float* scales) {
  require(x.is_cpu() && weight.is_cpu() && x.dim() == 2 && weight.dim() == 2 &&
          x.size(1) == weight.size(1) && x.stride(1) == 1 && weight.stride(1) == 1);
  Linear l{};
  l.x = x.data_ptr();
  l.weight = weight.data_ptr();
  l.scales = scales;
  l.x_stride = x.stride(0);
  l.weight_stride = weight.stride(0);
  l.rows = x.size(0);
  l.in_features = x.size(1);
  l.out_features = weight.size(0);
  l.dtype = required_dtype(x);
  const int64_t sizes[] = {l.rows, l.out_features};
  Tensor y = new_tensor({sizes, 2}, x.scalar_type(), x);
  l.y = y.data_ptr();
  run(l);
  return y;
}

Tensor linear_operator(const Tensor& x, const Tensor& weight) {
  const auto run = [&] {
    require(weight.scalar_type() == x.scalar_type());
    return multiply(x, weight, nullptr);
  };
  return run_or_call<Tensor>("mistral_kernels::linear_python", run, x, weight);
}

Tensor linear_int8(const Tensor& x, const Tensor& weight, const Tensor& scales) {
  const auto run = [&] {
    require(weight.scalar_type() == ScalarType::Char && weight.dim() == 2);
    const Tensor row_scales = vector_of(scales, ScalarType::Float, weight.size(0));
    return multiply(x, weight, static_cast<const float*>(row_scales.data_ptr()));
  };
  return run_or_call<Tensor>("mistral_kernels::linear_int8_python", run, x, weight, scales);
}

}  // namespace
}  // namespace kernels

STABLE_TORCH_LIBRARY_IMPL(mistral_kernels, CPU, m) {
  m.impl("linear", TORCH_BOX(&kernels::linear_operator));
  m.impl("linear_int8", TORCH_BOX(&kernels::linear_int8));
}
