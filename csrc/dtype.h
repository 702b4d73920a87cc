// The dtypes that the kernels support.
#pragma once

#include <cstdint>

enum class DType : int32_t { float32, float16, bfloat16 };

constexpr int size_of(DType dtype) { return dtype == DType::float32 ? 4 : 2; }
