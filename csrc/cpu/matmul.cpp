// The product of two matrices with many rows on the CPU; see mistral_kernels/ops/matmul.py.
#include "kernels/matmul.h"

#include "buffer.h"
#include "operator.h"

namespace kernels {
namespace {

void run(const Matmul& m) {
  constexpr int64_t kWork = 1 << 18;  // multiplications per thread, at least
  const MatmulParts parts = KERNEL(matmul_parts)(m);
  const int64_t count = m.cols ? parts.row_blocks * parts.col_tiles : 0;
  const int64_t work = m.rows * m.cols * m.inner / (count + 1);  // per part
  const auto kernel = KERNEL(matmul);
  torch::stable::parallel_for(0, count, kWork / (work + 1) + 1, [&](int64_t begin, int64_t end) {
    const Buffer scratch(parts.scratch_bytes);
    kernel(m, scratch.data(), begin, end);
  });
}

// Requires a matrix with contiguous rows or columns.
Matrix matrix_of(const Tensor& x) {
  require(x.is_cpu() && x.dim() == 2);
  const bool has_rows = x.size(1) <= 1 || x.stride(1) == 1;
  require(has_rows || x.size(0) <= 1 || x.stride(0) == 1);
  return {x.data_ptr(), has_rows ? x.stride(0) : 1, has_rows ? 1 : x.stride(1)};
}

void multiply(const Tensor& c, const Tensor& a, const Tensor& b, const OptionalTensor& scales,
              bool accumulate) {
  Matmul m{};
  m.a = matrix_of(a);
  m.b = matrix_of(b);
  m.dtype = required_dtype(a);
  m.c_dtype = required_dtype(c);
  m.rows = a.size(0);
  m.inner = a.size(1);
  m.cols = b.size(1);
  require(b.size(0) == m.inner && b.scalar_type() == (scales ? ScalarType::Char : a.scalar_type()));
  require(c.is_cpu() && c.dim() == 2 && c.size(0) == m.rows && c.size(1) == m.cols);
  require(c.scalar_type() == a.scalar_type() || c.scalar_type() == ScalarType::Float);
  require((m.cols <= 1 || c.stride(1) == 1) && (m.rows <= 1 || c.stride(0) >= m.cols));
  std::optional<Tensor> factors;
  if (scales) {
    factors = vector_of(*scales, ScalarType::Float, m.cols);
    m.scales = static_cast<const float*>(factors->data_ptr());
  }
  m.c = c.data_ptr();
  m.c_stride = c.stride(0);
  m.accumulate = accumulate;
  run(m);
}

void matmul_operator(const Tensor& c, const Tensor& a, const Tensor& b,
                     const OptionalTensor& scales, bool accumulate) {
  const auto run = [&] { multiply(c, a, b, scales, accumulate); };
  run_or_call<void>("mistral_kernels::matmul__python", run, c, a, b, scales, accumulate);
}

}  // namespace
}  // namespace kernels

STABLE_TORCH_LIBRARY_IMPL(mistral_kernels, CPU, m) {
  m.impl("matmul_", TORCH_BOX(&kernels::matmul_operator));
}
