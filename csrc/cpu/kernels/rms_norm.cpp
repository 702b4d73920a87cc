// A row is read from memory once, and from L1 after that.
#include "rms_norm.h"

#include "vector.h"

namespace kernels::INSTRUCTION_SET {
namespace {

// Returns the sum of the vectors term(first, count), whose lanes past the end are 0. Four
// accumulators hide the latency of the additions. Prefetches `ahead`.
template <typename T, typename Term>
INLINE float sum_of(int64_t size, const T* ahead, Term term) {
  constexpr int kSize = 4 * kLanes;
  Vec sums[4] = {};
  int64_t begin = 0;
  for (; begin + kSize <= size; begin += kSize) {
    prefetch(ahead, begin, kSize);
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
    squares = sum_of(hidden, y, [&](int64_t i, int lanes) {
      const Vec sum = load(x + i, lanes) + load(residual + i, lanes), z = rounded<T>(sum);
      store(sums + i, sum, lanes);
      return z * z;
    });
  } else {
    squares = sum_of(hidden, y, [&](int64_t i, int lanes) {
      const Vec z = load(x + i, lanes);
      return z * z;
    });
  }
  const float rstd = 1.0f / __builtin_sqrtf(squares / hidden + r.eps);
  if (r.rstd) r.rstd[row] = rstd;
  const T* weight = static_cast<const T*>(r.weight);
  const auto scaled = [&](int64_t i, int lanes) {
    store(y + i, rounded<T>(load(h + i, lanes) * rstd) * load(weight + i, lanes), lanes);
  };
  for_each_vector(hidden, scaled, next, next_residual);
}

// Rows per update of the partial sums of dweight. On Zen 2, where 4 rows exceed L1, the backward in
// bfloat16 is twice as fast with 1 row as with 4.
#if defined(__AVX512F__)
constexpr int kRowsAtOnce = 4;
#else
constexpr int kRowsAtOnce = 1;
#endif

// One row of the backward. Pointers to absent tensors are null.
template <typename T>
struct BackwardRow {
  const T *dy, *dh, *h;
  T* dx;
  float rstd, mean;
};

// Computes kVectors vectors of columns of dx and dweight for `count` rows. A cache line is used
// completely before the next row: the lines of all rows are in the same sets of L1 if hidden is a
// power of 2.
template <int kVectors, typename T>
INLINE void backward_columns(const RMSNormBackward& r, const BackwardRow<T>* rows, int count,
                             int64_t begin, int lanes, float* partial) {
  const T* weight = static_cast<const T*>(r.weight);
  Vec totals[kVectors] = {};
  for (int j = 0; j < count; ++j) {
    const BackwardRow<T> row = rows[j];
    prefetch(row.dy, kRowsAtOnce * r.dy_stride + begin, kVectors * kLanes);
    prefetch(row.h, kRowsAtOnce * r.h_stride + begin, kVectors * kLanes);
    prefetch(row.dh, kRowsAtOnce * r.dh_stride + begin, kVectors * kLanes);
    for (int v = 0; v < kVectors; ++v) {
      const int64_t i = begin + v * kLanes;
      const Vec dy = load(row.dy + i, lanes), normed = load(row.h + i, lanes) * row.rstd;
      totals[v] += dy * rounded<T>(normed);
      if (!row.dx) continue;
      Vec dx = (dy * load(weight + i, lanes) - normed * row.mean) * row.rstd;
      if (row.dh) dx += load(row.dh + i, lanes);
      store(row.dx + i, dx, lanes);
    }
  }
  if (!partial) return;
  for (int v = 0; v < kVectors; ++v) {
    float* const sum = partial + begin + v * kLanes;
    store(sum, load(sum, lanes) + totals[v], lanes);
  }
}

// Computes up to kRowsAtOnce rows: the partial sums of dweight are read and written once for all of
// them. Each pass prefetches as in the forward.
template <typename T>
void backward_rows(const RMSNormBackward& r, int64_t first, int count, float* partial) {
  const T* weight = static_cast<const T*>(r.weight);
  BackwardRow<T> rows[kRowsAtOnce];
  for (int j = 0; j < count; ++j) {
    const int64_t row = first + j;
    const T* dy = static_cast<const T*>(r.dy) + row * r.dy_stride;
    const T* dh = r.dh ? static_cast<const T*>(r.dh) + row * r.dh_stride : nullptr;
    const T* h = static_cast<const T*>(r.h) + row * r.h_stride;
    T* dx = r.dx ? static_cast<T*>(r.dx) + row * r.hidden : nullptr;
    const float rstd = r.rstd[row];
    rows[j] = {dy, dh, h, dx, rstd, 0};
    if (!dx) continue;
    rows[j].mean = sum_of(r.hidden, dx, [&](int64_t i, int lanes) {
      return load(dy + i, lanes) * load(weight + i, lanes) * (load(h + i, lanes) * rstd);
    }) / r.hidden;
  }
  constexpr int kVectors = kLine<T> / kLanes;
  int64_t begin = 0;
  for (; begin + kLine<T> <= r.hidden; begin += kLine<T>) {
    backward_columns<kVectors>(r, rows, count, begin, kLanes, partial);
  }
  for_each_vector(r.hidden - begin, [&](int64_t i, int lanes) {
    backward_columns<1>(r, rows, count, begin + i, lanes, partial);
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
    for (; row < last; row += kRowsAtOnce) {
      const int count = last - row < kRowsAtOnce ? static_cast<int>(last - row) : kRowsAtOnce;
      backward_rows<T>(r, row, count, partial);
    }
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
