// Argument checks that throw. Messages are built without C++ streams: if the linker puts a second
// libstdc++ into the library, beside PyTorch's, the two share stream locales, and writing a number
// to a stream corrupts the message or crashes.
#pragma once

#include <stdexcept>
#include <string>
#include <type_traits>

namespace kernels {

template <typename T>
std::string text_of(T part) {
  if constexpr (std::is_integral_v<T>) {
    return std::to_string(part);
  } else {
    return part;
  }
}

// `cold` makes the compiler treat failed checks as unlikely and keep them out of the hot code.
template <typename... T>
[[noreturn]] __attribute__((cold, noinline)) void check_failed(T... parts) {
  std::string message;
  ((message += text_of(parts)), ...);
  throw std::runtime_error(message);
}

}  // namespace kernels

// Throws a std::runtime_error unless the condition holds. The message is the concatenation of the
// further arguments, strings and integers, which are evaluated only then.
#define KERNELS_CHECK(condition, ...)                       \
  do {                                                      \
    if (!(condition)) ::kernels::check_failed(__VA_ARGS__); \
  } while (false)
