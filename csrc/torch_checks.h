// Include this file before the headers of PyTorch's stable ABI. It redefines the check macros of
// their inline functions, so that messages are built without C++ streams; see check.h.
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
