// What both libraries have: whether their kernels serve. See operator.h.
#include "operator.h"

#ifdef KERNELS_FOR_CUDA
#define SERVE "serve_cuda"
#else
#define SERVE "serve_cpu"
#endif

namespace kernels {

bool serving = true;

namespace {
void serve(bool yes) { serving = yes; }
}  // namespace

}  // namespace kernels

STABLE_TORCH_LIBRARY_FRAGMENT(mistral_kernels, m) { m.def(SERVE "(bool yes) -> ()"); }

STABLE_TORCH_LIBRARY_IMPL(mistral_kernels, CompositeExplicitAutograd, m) {
  m.impl(SERVE, TORCH_BOX(&kernels::serve));
}
