// The operators enable_cpu and enable_cuda, which enable and disable the kernels of this library.
#include "operator.h"

#ifdef KERNELS_FOR_CUDA
#define ENABLE_OPERATOR "enable_cuda"
#else
#define ENABLE_OPERATOR "enable_cpu"
#endif

namespace kernels {

bool kernels_enabled = true;

namespace {
void enable_kernels(bool yes) { kernels_enabled = yes; }
}  // namespace

}  // namespace kernels

STABLE_TORCH_LIBRARY_FRAGMENT(mistral_kernels, m) { m.def(ENABLE_OPERATOR "(bool yes) -> ()"); }

STABLE_TORCH_LIBRARY_IMPL(mistral_kernels, CompositeExplicitAutograd, m) {
  m.impl(ENABLE_OPERATOR, TORCH_BOX(&kernels::enable_kernels));
}
