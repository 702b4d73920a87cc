// To be included before the headers of PyTorch's stable ABI: the checks in their inline functions
// fail as ours do, without streams; see check.h.
#pragma once

#include "check.h"

#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/shim_utils.h>

#undef STD_TORCH_CHECK
#define STD_TORCH_CHECK(condition, ...)                       \
  if (!(condition)) {                                         \
    ::kernels::check_failed("PyTorch expected ", #condition); \
  }

#undef TORCH_ERROR_CODE_CHECK
#define TORCH_ERROR_CODE_CHECK(call)           \
  if ((call) != TORCH_SUCCESS) {               \
    ::kernels::check_failed(#call, " failed"); \
  }
