// A row is read from memory once, and from L1 after that.
#include "rms_norm.h"

#include "vector.h"

namespace kernels::INSTRUCTION_SET {
namespace {

// Returns the sum of the vectors term(first, count), whose lanes past the end are 0. Four
// accumulators hide the latency of the additions.
template <typename Term>
INLINE float sum_of(int64_t size, Term term) {
  Vec sums[4] = {};
  int64_t begin = 0;
  for (; begin + 4 * kLanes <= size; begin += 4 * kLanes) {
    for (int i = 0; i < 4; ++i) sums[i] += term(begin + i * kLanes, kLanes);
  }
  for_each_vector(size - begin, [&](int64_t i, int lanes) { sums[0] += term(begin + i, lanes); });
  return sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

// The first pass prefetches the memory that y is written to; the second pass prefetches the inputs
// of the next row. One row of prefetches per pass does not exceed the memory bandwidth.
template <typename T>
void norm_row(const RMSNorm& r, int64_t row) {
  const int64_t hidden = r.hidden;
  const T *x = static_cast<const T*>(r.x) + row * r.x_stride, *next = x + r.x_stride;
  const T *h = x, *next_residual = nullptr;
  T* y = static_cast<T*>(r.y) + row * hidden;
  float squares;
  if (r.residual) {
    const T* residual = static_cast<const T*>(r.residual) + row * r.residual_stride;
    next_residual = residual + r.residual_stride;
    T* sums = static_cast<T*>(r.h) + row * hidden;
    h = sums;
    squares = sum_of(hidden, [&](int64_t i, int lanes) {
      __builtin_prefetch(y + i, 1, 2);
      store(sums + i, load(x + i, lanes) + load(residual + i, lanes), lanes);
      const Vec z = load(sums + i, lanes);
      return z * z;
    });
  } else {
    squares = sum_of(hidden, [&](int64_t i, int lanes) {
      __builtin_prefetch(y + i, 1, 2);
      const Vec z = load(x + i, lanes);
      return z * z;
    });
  }
  const float rstd = 1.0f / __builtin_sqrtf(squares / hidden + r.eps);
  if (r.rstd) r.rstd[row] = rstd;
  const T* weight = static_cast<const T*>(r.weight);
  for_each_vector(hidden, [&](int64_t i, int lanes) {
    __builtin_prefetch(next + i, 0, 2);
    if (next_residual) __builtin_prefetch(next_residual + i, 0, 2);
    store(y + i, rounded<T>(load(h + i, lanes) * rstd) * load(weight + i, lanes), lanes);
  });
}

// Processes several rows at once, so that the partial sums of dweight are read and written once for
// all of them. Each pass prefetches as in the forward.
template <typename T, int Rows>
void backward_rows(const RMSNormBackward& r, int64_t row, float* partial) {
  const T *dy[Rows], *dh[Rows], *h[Rows], *weight = static_cast<const T*>(r.weight);
  T* dx[Rows];
  float rstd[Rows], mean[Rows];
  for (int j = 0; j < Rows; ++j, ++row) {
    dy[j] = static_cast<const T*>(r.dy) + row * r.dy_stride;
    dh[j] = static_cast<const T*>(r.dh) + row * r.dh_stride;
    h[j] = static_cast<const T*>(r.h) + row * r.h_stride;
    dx[j] = static_cast<T*>(r.dx) + row * r.hidden;
    rstd[j] = r.rstd[row];
    if (!r.dx) continue;
    mean[j] = sum_of(r.hidden, [&](int64_t i, int lanes) {
      __builtin_prefetch(dx[j] + i, 1, 2);
      return load(dy[j] + i, lanes) * load(weight + i, lanes) * (load(h[j] + i, lanes) * rstd[j]);
    });
    mean[j] /= r.hidden;
  }
  for_each_vector(r.hidden, [&](int64_t i, int lanes) {
    Vec total = {};
    for (int j = 0; j < Rows; ++j) {
      __builtin_prefetch(dy[j] + Rows * r.dy_stride + i, 0, 2);
      __builtin_prefetch(h[j] + Rows * r.h_stride + i, 0, 2);
      if (r.dh) __builtin_prefetch(dh[j] + Rows * r.dh_stride + i, 0, 2);
      const Vec dy_i = load(dy[j] + i, lanes), normed = load(h[j] + i, lanes) * rstd[j];
      total += dy_i * rounded<T>(normed);
      if (!r.dx) continue;
      Vec z = (dy_i * load(weight + i, lanes) - normed * mean[j]) * rstd[j];
      if (r.dh) z += load(dh[j] + i, lanes);
      store(dx[j] + i, z, lanes);
    }
    if (partial) store(partial + i, load(partial + i, lanes) + total, lanes);
  });
}

template <typename T>
void norm_rows(const RMSNorm& r, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) norm_row<T>(r, row);
}

template <typename T>
void backward_blocks(const RMSNormBackward& r, int64_t begin, int64_t end) {
  for (int64_t block = begin; block < end; ++block) {
    float* partial = r.partial ? r.partial + block * r.hidden : nullptr;
    if (partial) __builtin_memset(partial, 0, r.hidden * sizeof(float));
    int64_t row = block * r.rows_of_block;
    const int64_t last = row + r.rows_of_block < r.rows ? row + r.rows_of_block : r.rows;
    for (; row + 4 <= last; row += 4) backward_rows<T, 4>(r, row, partial);
    for (; row < last; ++row) backward_rows<T, 1>(r, row, partial);
  }
}

template <typename T>
void sum_partials(const RMSNormBackward& r, int64_t blocks, T* dweight, int64_t begin,
                  int64_t end) {
  for_each_vector(end - begin, [&](int64_t i, int lanes) {
    Vec total = {};
    for (int64_t block = 0; block < blocks; ++block) {
      total += load(r.partial + block * r.hidden + begin + i, lanes);
    }
    store(dweight + begin + i, total, lanes);
  });
}

}  // namespace

void rms_norm(const RMSNorm& r, int64_t begin, int64_t end) {
  with_type(r.dtype, [&](auto number) { norm_rows<decltype(number)>(r, begin, end); });
}

void rms_norm_backward(const RMSNormBackward& r, int64_t begin, int64_t end) {
  with_type(r.dtype, [&](auto number) { backward_blocks<decltype(number)>(r, begin, end); });
}

void rms_norm_dweight(const RMSNormBackward& r, int64_t blocks, void* dweight, int64_t begin,
                      int64_t end) {
  with_type(r.dtype, [&](auto number) {
    sum_partials(r, blocks, static_cast<decltype(number)*>(dweight), begin, end);
  });
}

}  // namespace kernels::INSTRUCTION_SET
