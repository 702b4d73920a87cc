// The operators that the CPU library alone has.
#include "../bindings.h"
#include "dispatch.h"
#include "kernels/cross_entropy.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kGrain = 1 << 15;  // elements, worth a thread

void softmax(const Tensor& logits, const Tensor& targets, const Tensor& scale,
             const Tensor& losses, int64_t ignore_index, double label_smoothing, double z_loss,
             double softcap, bool needs_gradient) {
  KERNELS_CHECK(logits.dim() == 2 && logits.size(1) > 0 && logits.stride(1) == 1,
                "logits must be (rows, vocab), contiguous in vocab");
  const int64_t rows = logits.size(0), vocab = logits.size(1);
  kernels::Softmax s{};
  s.logits = logits.data_ptr();
  s.stride = logits.stride(0);
  s.vocab = vocab;
  s.targets = vector_data<int64_t>("targets", targets, ScalarType::Long, rows);
  s.scale = vector_data<float>("scale", scale, ScalarType::Float, 1);
  s.losses = vector_data<float>("losses", losses, ScalarType::Float, rows);
  s.ignore_index = ignore_index;
  s.label_smoothing = static_cast<float>(label_smoothing);
  s.z_loss = static_cast<float>(z_loss);
  s.softcap = static_cast<float>(softcap);
  s.needs_gradient = needs_gradient;
  s.dtype = dtype_of("logits", logits);
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t target = s.targets[row];
    KERNELS_CHECK((target >= 0 && target < vocab) || target == ignore_index,
                  "targets must lie in [0, ", vocab, ") or be ", ignore_index, ", got ", target);
  }
  const auto kernel = KERNEL(softmax);
  torch::stable::parallel_for(0, rows, std::max<int64_t>(kGrain / vocab, 1),
                              [&](int64_t begin, int64_t end) { kernel(s, begin, end); });
}

void accumulate(const Tensor& sum, const Tensor& x) {
  const int64_t size = x.numel(), element_size = x.element_size();
  float* sum_data = vector_data<float>("sum", sum, ScalarType::Float, size);
  const DType dtype = dtype_of("x", x);
  const char* data = vector_data<char>("x", x, x.scalar_type(), size);
  const auto kernel = KERNEL(accumulate);
  torch::stable::parallel_for(0, size, kGrain, [&](int64_t begin, int64_t end) {
    kernel(sum_data + begin, data + begin * element_size, dtype, end - begin);
  });
}

}  // namespace

LIBRARY_FRAGMENT(KERNELS_NAMESPACE, m) {
  m.def("instruction_sets() -> str");
  m.def("use_instruction_set(str name) -> ()");
  m.def(
      "softmax(Tensor(a!) logits, Tensor targets, Tensor scale, Tensor(b!) losses, "
      "int ignore_index, float label_smoothing, float z_loss, float softcap, bool needs_gradient) "
      "-> ()");
  m.def("accumulate(Tensor(a!) sum, Tensor x) -> ()");
}

LIBRARY_IMPL(KERNELS_NAMESPACE, CompositeExplicitAutograd, m) {
  m.impl("instruction_sets", TORCH_BOX(&kernels::instruction_sets));
  m.impl("use_instruction_set", TORCH_BOX(&kernels::use_instruction_set));
}

LIBRARY_IMPL(KERNELS_NAMESPACE, CPU, m) {
  m.impl("softmax", TORCH_BOX(&softmax));
  m.impl("accumulate", TORCH_BOX(&accumulate));
}
