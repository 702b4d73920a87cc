// Checks of what the operators are given. A message is put together without streams: a libstdc++
// that the linker took into the library is a second one beside PyTorch's, the two mix up the
// locales of their streams, and a number written to one then spoils the message or crashes.
#pragma once

#include <stdexcept>
#include <string>
#include <type_traits>

namespace kernels {

template <typename T>
std::string text_of(T word) {
  if constexpr (std::is_integral_v<T>) {
    return std::to_string(word);
  } else {
    return word;
  }
}

// Out of the way of the code that checks, where the compiler takes calls of it to be unlikely.
template <typename... T>
[[noreturn]] __attribute__((cold, noinline)) void check_failed(T... words) {
  std::string message;
  ((message += text_of(words)), ...);
  throw std::runtime_error(message);
}

}  // namespace kernels

// Throws the words, strings and integers, as a std::runtime_error; they are computed only then.
#define KERNELS_CHECK(condition, ...)                       \
  do {                                                      \
    if (!(condition)) ::kernels::check_failed(__VA_ARGS__); \
  } while (false)
