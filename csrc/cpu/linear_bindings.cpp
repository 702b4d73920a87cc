// The product of a few rows and a large weight, as PyTorch sees it.
#include "../bindings.h"
#include "buffer.h"
#include "run.h"

#include <torch/csrc/stable/ops.h>

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kGrain = 1 << 17;  // bytes of memory to read, worth a thread

kernels::Linear product(const Tensor& x, const Tensor& weight, const Tensor& y) {
  KERNELS_CHECK(x.dim() == 2 && weight.dim() == 2 && x.size(1) == weight.size(1),
                "x and weight must be (rows, in_features) and (out_features, in_features)");
  KERNELS_CHECK(x.stride(1) == 1 && weight.stride(1) == 1,
                "x and weight must be contiguous in in_features");
  KERNELS_CHECK(
      y.dim() == 2 && y.size(0) == x.size(0) && y.size(1) == weight.size(0) && y.is_contiguous(),
      "y must be (rows, out_features), contiguous");
  kernels::Linear l{};
  l.x = x.data_ptr();
  l.weight = weight.data_ptr();
  l.y = y.data_ptr();
  l.x_stride = x.stride(0);
  l.weight_stride = weight.stride(0);
  l.rows = x.size(0);
  l.in_features = x.size(1);
  l.out_features = weight.size(0);
  l.dtype = dtype_of("x", x);
  return l;
}

void linear(const Tensor& x, const Tensor& weight, const Tensor& y) {
  for (const Tensor* other : {&weight, &y}) {
    KERNELS_CHECK(x.is_cpu() && other->is_cpu() && other->scalar_type() == x.scalar_type(),
                  "x, weight and y must be on the CPU, of one dtype");
  }
  run(product(x, weight, y));
}

void linear_int8(const Tensor& x, const Tensor& weight, const Tensor& scales, const Tensor& y) {
  KERNELS_CHECK(x.is_cpu() && y.is_cpu() && y.scalar_type() == x.scalar_type(),
                "x and y must be on the CPU, of one dtype");
  KERNELS_CHECK(weight.is_cpu() && weight.scalar_type() == ScalarType::Char,
                "weight must be on the CPU, int8");
  kernels::Linear l = product(x, weight, y);
  l.scales = vector_data<float>("scales", scales, ScalarType::Float, l.out_features);
  run(l);
}

}  // namespace

void kernels::run(const Linear& l) {
  const auto kernel = KERNEL(linear);
  const int64_t row_bytes = l.in_features * (l.scales ? 1 : size_of(l.dtype));
  const int64_t tile_bytes = kTileOuts * (l.in_features + 32) * sizeof(float);
  torch::stable::parallel_for(
      0, l.rows ? l.out_features : 0, kGrain / (row_bytes + 1) + 1,
      [&](int64_t begin, int64_t end) {
        const Buffer scratch(l.scales && l.rows > 1 ? tile_bytes : 0);
        kernel(l, scratch.data(), begin, end);
      });
}

LIBRARY_FRAGMENT(KERNELS_NAMESPACE, m) {
  m.def("linear(Tensor x, Tensor weight, Tensor(a!) y) -> ()");
  m.def("linear_int8(Tensor x, Tensor weight, Tensor scales, Tensor(a!) y) -> ()");
}

LIBRARY_IMPL(KERNELS_NAMESPACE, CPU, m) {
  m.impl("linear", TORCH_BOX(&linear));
  m.impl("linear_int8", TORCH_BOX(&linear_int8));
}
