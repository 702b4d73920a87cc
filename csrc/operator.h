// Helpers to register an operator. Python declares each operator in mistral_kernels/ops: its
// schema, its argument checks and its implementation in Python, which is the operator
// `<name>_python`. This library registers the operator's kernel for KERNELS_DEVICE. A call with
// arguments that the kernel does not support calls `<name>_python`, which computes the result in
// Python or raises the error. The conditions here therefore need no messages, but they must cover
// everything that a kernel relies on.
#pragma once

#include "check.h"
#include "dtype.h"
#include "torch_checks.h"

#include <algorithm>
#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

// A second macro level, so that the arguments are expanded.
#define LIBRARY_IMPL(name, key, m) STABLE_TORCH_LIBRARY_IMPL(name, key, m)

namespace kernels {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// False while MISTRAL_KERNELS_BACKEND selects another backend for this device.
extern bool kernels_enabled;

struct Unsupported {};

// Falls back to Python unless the condition holds. Call it before anything is written.
inline void require(bool condition) {
  if (__builtin_expect(!condition, 0)) throw Unsupported{};
}

template <typename Result>
struct Results {
  static constexpr size_t kCount = 1;
  static Result from(const StableIValue* stack) {
    return torch::stable::detail::to<Result>(stack[0]);
  }
};

template <>
struct Results<void> {
  static constexpr size_t kCount = 0;
  static void from(const StableIValue*) {}
};

template <typename... T>
struct Results<std::tuple<T...>> {
  static constexpr size_t kCount = sizeof...(T);
  template <size_t... I>
  static std::tuple<T...> from_each(const StableIValue* stack, std::index_sequence<I...>) {
    return {torch::stable::detail::to<T>(stack[I])...};
  }
  static std::tuple<T...> from(const StableIValue* stack) {
    return from_each(stack, std::index_sequence_for<T...>{});
  }
};

// Calls an operator that Python implements. A Python exception becomes a runtime_error with the
// same message.
template <typename Result, typename... Arguments>
Result call_python(const char* name, const Arguments&... arguments) {
  constexpr size_t kSize = std::max(sizeof...(Arguments), Results<Result>::kCount);
  std::array<StableIValue, kSize> stack{torch::stable::detail::from(arguments)...};
  if (torch_call_dispatcher(name, "", stack.data(), TORCH_ABI_VERSION) != TORCH_SUCCESS) {
    std::array<StableIValue, 1> message{};
    TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("mistral_kernels::python_error", "",
                                                 message.data(), TORCH_ABI_VERSION));
    check_failed(torch::stable::detail::to<std::string>(message[0]));
  }
  return Results<Result>::from(stack.data());
}

// Returns an uninitialized contiguous tensor on the device of `like`.
inline Tensor new_tensor(torch::headeronly::IntHeaderOnlyArrayRef sizes, ScalarType dtype,
                         const Tensor& like) {
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t i = sizes.size(); i-- > 0; stride *= std::max<int64_t>(sizes[i], 1)) {
    strides[i] = stride;
  }
#ifdef KERNELS_FOR_CUDA
  const int32_t device_type = aoti_torch_device_type_cuda();
#else
  const int32_t device_type = aoti_torch_device_type_cpu();
#endif
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      sizes.size(), sizes.data(), strides.data(), static_cast<int32_t>(dtype), device_type,
      like.get_device_index(), &handle));
  return Tensor(handle);
}

inline Tensor new_like(const Tensor& x) { return new_tensor(x.sizes(), x.scalar_type(), x); }

// Returns an empty tensor: the placeholder of a result that the caller did not request.
inline Tensor absent(ScalarType dtype, const Tensor& like) {
  return new_tensor(std::vector<int64_t>{0}, dtype, like);
}

// Returns the result of run(). If the kernels are disabled or run() does not support the arguments,
// calls the operator `name` instead.
template <typename Result, typename Run, typename... Arguments>
Result run_or_call(const char* name, Run run, const Arguments&... arguments) {
  if (kernels_enabled) {
    try {
      return run();
    } catch (const Unsupported&) {
    }
  }
  return call_python<Result>(name, arguments...);
}

inline std::optional<DType> dtype_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return DType::float32;
    case ScalarType::Half: return DType::float16;
    case ScalarType::BFloat16: return DType::bfloat16;
    default: return std::nullopt;
  }
}

inline DType required_dtype(const Tensor& x) {
  const auto dtype = dtype_of(x);
  require(dtype.has_value());
  return *dtype;
}

}  // namespace kernels
