// The dtypes that operators take.
#pragma once

#include <cstdint>

enum class DType : int32_t { float32, float16, bfloat16 };
