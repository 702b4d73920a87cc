// SwiGLU on the CPU; see mistral_kernels/ops/swiglu.py.
#include "kernels/swiglu.h"

#include "operator.h"
#include "run.h"

namespace kernels {

void run(const SwiGLU& s, int64_t elements) {
  const auto kernel = KERNEL(swiglu);
  torch::stable::parallel_for(0, elements, grain(1),
                              [&](int64_t begin, int64_t end) { kernel(s, begin, end); });
}

namespace {

using TwoTensors = std::tuple<Tensor, Tensor>;

// The inputs: `gate` and `up`, or one tensor whose rows are a row of gate and then a row of up.
struct Inputs {
  Parts gate;
  std::optional<Parts> up;
  std::vector<int64_t> output_sizes;

  Inputs(const Tensor& gate, const OptionalTensor& up)
      : gate(rows_like(gate, gate)), output_sizes(gate.sizes().begin(), gate.sizes().end()) {
    if (up) {
      this->up = rows_like(*up, gate);
      return;
    }
    require(gate.dim() && width_of(gate) % 2 == 0);
    output_sizes.back() /= 2;
  }

  SwiGLU arguments() const {
    SwiGLU s{};
    s.dtype = required_dtype(gate.x);
    s.gate = gate.x.data_ptr();
    s.gate_stride = gate.outer_stride;
    s.gradient_stride = width_of(gate.x);
    s.cols = output_sizes.empty() ? 1 : output_sizes.back();
    s.up = up ? up->x.data_ptr() : static_cast<const char*>(s.gate) + s.cols * size_of(s.dtype);
    s.up_stride = up ? up->outer_stride : s.gate_stride;
    return s;
  }
};

Tensor forward(const Tensor& gate, const OptionalTensor& up) {
  const Inputs inputs(gate, up);
  SwiGLU s = inputs.arguments();
  Tensor y = new_tensor(inputs.output_sizes, gate.scalar_type(), gate);
  s.y = y.data_ptr();
  run(s, y.numel());
  return y;
}

TwoTensors backward(const Tensor& dy, const Tensor& gate, const OptionalTensor& up,
                    bool needs_dgate, bool needs_dup) {
  const Inputs inputs(gate, up);
  SwiGLU s = inputs.arguments();
  const auto sizes = dy.sizes();
  require(is_on_cpu(dy, gate.scalar_type()) &&
          std::equal(sizes.begin(), sizes.end(), inputs.output_sizes.begin(),
                     inputs.output_sizes.end()));
  const Parts rows = parts_of(dy, 1);
  s.dy = rows.x.data_ptr();
  s.dy_stride = rows.outer_stride;
  needs_dup = needs_dup && up;
  Tensor dgate = needs_dgate ? new_like(gate) : absent(gate.scalar_type(), gate);
  Tensor dup = needs_dup ? new_like(gate) : absent(gate.scalar_type(), gate);
  if (needs_dgate) s.dgate = dgate.data_ptr();
  if (needs_dup) s.dup = dup.data_ptr();
  if (needs_dgate && !up) s.dup = static_cast<char*>(s.dgate) + s.cols * size_of(s.dtype);
  const auto kernel = KERNEL(swiglu_backward);
  torch::stable::parallel_for(0, dy.numel(), grain(1),
                              [&](int64_t begin, int64_t end) { kernel(s, begin, end); });
  return {dgate, dup};
}

Tensor swiglu_forward(const Tensor& gate, const OptionalTensor& up) {
  return run_or_call<Tensor>("mistral_kernels::swiglu_forward_python",
                             [&] { return forward(gate, up); }, gate, up);
}

TwoTensors swiglu_backward(const Tensor& dy, const Tensor& gate, const OptionalTensor& up,
                           bool needs_dgate, bool needs_dup) {
  return run_or_call<TwoTensors>(
      "mistral_kernels::swiglu_backward_python",
      [&] { return backward(dy, gate, up, needs_dgate, needs_dup); }, dy, gate, up, needs_dgate,
      needs_dup);
}

}  // namespace
}  // namespace kernels

STABLE_TORCH_LIBRARY_IMPL(mistral_kernels, CPU, m) {
  m.impl("swiglu_forward", TORCH_BOX(&kernels::swiglu_forward));
  m.impl("swiglu_backward", TORCH_BOX(&kernels::swiglu_backward));
}
