#include "swiglu.h"

#include "vector.h"

namespace kernels::INSTRUCTION_SET {
namespace {

constexpr int kNumbersAhead = 2048;  // distance of the prefetches

// Returns 1 + e^-gate. The argument's type T is the dtype that results are rounded to; for 16-bit
// dtypes an approximate exponential is sufficient.
INLINE Vec inverse_sigmoid(const float*, Vec gate) { return 1.0f + exp(-gate); }
template <typename T>
INLINE Vec inverse_sigmoid(const T*, Vec gate) {
  return 1.0f + rough_exp(-gate);
}

// Calls body(row, first, count) for the part of elements [begin, end) in each row.
template <typename Body>
INLINE void for_each_row(int64_t cols, int64_t begin, int64_t end, Body body) {
  int64_t row = begin / cols, first = begin % cols;
  for (int64_t left = end - begin; left > 0; ++row) {
    const int64_t count = cols - first < left ? cols - first : left;
    body(row, first, count);
    left -= count;
    first = 0;
  }
}

template <typename T>
void forward(const SwiGLU& s, int64_t begin, int64_t end) {
  for_each_row(s.cols, begin, end, [&](int64_t row, int64_t first, int64_t count) {
    const T* gate = static_cast<const T*>(s.gate) + row * s.gate_stride + first;
    const T* up = static_cast<const T*>(s.up) + row * s.up_stride + first;
    T* y = static_cast<T*>(s.y) + row * s.cols + first;
    const auto multiply = [&](int64_t i, int lanes) {
      const Vec g = load(gate + i, lanes);
      store(y + i, g / inverse_sigmoid(y, g) * load(up + i, lanes), lanes);
    };
    for_each_vector(count, multiply, gate + kNumbersAhead, up + kNumbersAhead);
  });
}

template <typename T>
void backward(const SwiGLU& s, int64_t begin, int64_t end) {
  for_each_row(s.cols, begin, end, [&](int64_t row, int64_t first, int64_t count) {
    const T* dy = static_cast<const T*>(s.dy) + row * s.dy_stride + first;
    const T* gate = static_cast<const T*>(s.gate) + row * s.gate_stride + first;
    const T* up = static_cast<const T*>(s.up) + row * s.up_stride + first;
    const int64_t to = row * s.gradient_stride + first;
    T* dgate = s.dgate ? static_cast<T*>(s.dgate) + to : nullptr;
    T* dup = s.dup ? static_cast<T*>(s.dup) + to : nullptr;
    const auto differentiate = [&](int64_t i, int lanes) {
      const Vec g = load(gate + i, lanes), dy_i = load(dy + i, lanes);
      const Vec sigmoid = 1.0f / inverse_sigmoid(dy, g);
      if (dup) store(dup + i, dy_i * (g * sigmoid), lanes);
      if (dgate) {
        const Vec slope = sigmoid * (1.0f + g * (1.0f - sigmoid));
        store(dgate + i, dy_i * load(up + i, lanes) * slope, lanes);
      }
    };
    for_each_vector(count, differentiate, dy + kNumbersAhead, gate + kNumbersAhead,
                    up + kNumbersAhead);
  });
}

}  // namespace

void swiglu(const SwiGLU& s, int64_t begin, int64_t end) {
  with_type(s.dtype, [&](auto number) { forward<decltype(number)>(s, begin, end); });
}

void swiglu_backward(const SwiGLU& s, int64_t begin, int64_t end) {
  with_type(s.dtype, [&](auto number) { backward<decltype(number)>(s, begin, end); });
}

}  // namespace kernels::INSTRUCTION_SET
