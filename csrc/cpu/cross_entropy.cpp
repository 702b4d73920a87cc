// Operators of linear_cross_entropy on the CPU: the loss and gradient of logits, and the
// accumulation of gradients in float32; see mistral_kernels/ops/cross_entropy.py.
#include "kernels/cross_entropy.h"

#include "operator.h"

#include <limits>

namespace kernels {
namespace {

constexpr double kSmallest = std::numeric_limits<float>::min();
constexpr double kLargest = std::numeric_limits<float>::max();

Tensor losses_and_gradient(const Tensor& logits, const Tensor& targets, const Tensor& scale,
                           int64_t ignore_index, double label_smoothing, double z_loss,
                           double softcap, bool needs_gradient) {
  Softmax s{};
  s.dtype = required_dtype(logits);
  require(logits.is_cpu() && logits.dim() == 2 && logits.size(1) > 0);
  const int64_t rows = logits.size(0), vocab = logits.size(1);
  require((vocab == 1 || logits.stride(1) == 1) && (rows <= 1 || logits.stride(0) >= vocab));
  require(is_on_cpu(scale, ScalarType::Float) && scale.dim() == 0);
  require(label_smoothing >= 0 && label_smoothing <= 1 && z_loss >= 0 && z_loss <= kLargest);
  require(softcap == 0 || (softcap >= kSmallest && softcap <= kLargest));
  const Tensor classes = vector_of(targets, ScalarType::Long, rows);
  s.logits = logits.data_ptr();
  s.stride = logits.stride(0);
  s.vocab = vocab;
  s.targets = static_cast<const int64_t*>(classes.data_ptr());
  s.scale = static_cast<const float*>(scale.data_ptr());
  s.ignore_index = ignore_index;
  s.label_smoothing = static_cast<float>(label_smoothing);
  s.z_loss = static_cast<float>(z_loss);
  s.softcap = static_cast<float>(softcap);
  s.needs_gradient = needs_gradient;
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t target = s.targets[row];
    require((target >= 0 && target < vocab) || target == ignore_index);
  }
  Tensor losses = new_tensor({&rows, 1}, ScalarType::Float, logits);
  s.losses = static_cast<float*>(losses.data_ptr());
  const auto kernel = KERNEL(softmax);
  torch::stable::parallel_for(0, rows, grain(vocab),
                              [&](int64_t begin, int64_t end) { kernel(s, begin, end); });
  return losses;
}

Tensor cross_entropy(const Tensor& logits, const Tensor& targets, const Tensor& scale,
                     int64_t ignore_index, double label_smoothing, double z_loss, double softcap,
                     bool needs_gradient) {
  const auto run = [&] {
    return losses_and_gradient(logits, targets, scale, ignore_index, label_smoothing, z_loss,
                               softcap, needs_gradient);
  };
  return run_or_call<Tensor>("mistral_kernels::cross_entropy__python", run, logits, targets, scale,
                             ignore_index, label_smoothing, z_loss, softcap, needs_gradient);
}

void accumulate_operator(const Tensor& total, const Tensor& x) {
  const auto run = [&] {
    const DType dtype = required_dtype(x);
    require(x.is_cpu() && x.is_contiguous() && is_on_cpu(total, ScalarType::Float) &&
            total.is_contiguous() && same_shape(total, x));
    float* const to = static_cast<float*>(total.data_ptr());
    const char* const from = static_cast<const char*>(x.data_ptr());
    const auto kernel = KERNEL(accumulate);
    torch::stable::parallel_for(0, x.numel(), grain(1), [&](int64_t begin, int64_t end) {
      kernel(to + begin, from + begin * size_of(dtype), dtype, end - begin);
    });
  };
  run_or_call<void>("mistral_kernels::accumulate__python", run, total, x);
}

}  // namespace
}  // namespace kernels

STABLE_TORCH_LIBRARY_IMPL(mistral_kernels, CPU, m) {
  m.impl("cross_entropy_", TORCH_BOX(&kernels::cross_entropy));
  m.impl("accumulate_", TORCH_BOX(&kernels::accumulate_operator));
}
