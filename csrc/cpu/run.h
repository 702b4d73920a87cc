// Functions that run a kernel on PyTorch's threads, with arguments that have been checked.
#pragma once

#include "../rolling_cache.h"
#include "kernels/decode.h"
#include "kernels/linear.h"
#include "kernels/rms_norm.h"
#include "kernels/swiglu.h"

namespace kernels {

void run(const Linear&);
void run(const RMSNorm&, int64_t rows);
void run(const SwiGLU&, int64_t elements);

// The caller leaves `splits` and `partials` unset.
void run(Decode);

}  // namespace kernels
