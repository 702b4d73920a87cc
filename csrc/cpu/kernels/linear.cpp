// A tile of outputs is computed for all rows of x before the next tile. The weight is read from
// memory once; for further rows of x it is read from the CPU cache.
#include "linear.h"

#include "dots.h"

namespace kernels::INSTRUCTION_SET {
namespace {

// Rows of x per tile, chosen so that the accumulators and the loaded values of x and the weight
// stay in registers: 4 x 4 or more of 32 registers, 4 x 3 of 16.
constexpr int kRowsPerTile = 4;
constexpr int kInt8Outs = 4;  // outputs per tile of an int8 weight, with 32 registers

// With 16 registers, x is converted to float32 once per call, and multiplied with the weight in
// steps of two vectors.
constexpr bool kConvertsX = kRegisters == 16;
constexpr int kStep = 2 * kLanes;

INLINE int64_t steps_of(const Linear& l) { return (l.in_features + kStep - 1) / kStep; }

// Calls body(row, count) for tiles of nearly equal numbers of rows of x, at most kRowsPerTile.
template <typename Body>
INLINE void for_each_row_tile(const Linear& l, Body body) {
  const int64_t tiles = (l.rows + kRowsPerTile - 1) / kRowsPerTile;
  const int64_t base = l.rows / tiles, more = l.rows % tiles;
  for (int64_t i = 0, row = 0; i < tiles; ++i) {
    const int64_t count = base + (i < more);
    body(row, count);
    row += count;
  }
}

// Converts x. The rows of a tile are interleaved, one step of each row; the last step is padded
// with zeros.
template <typename T>
void convert_x(const Linear& l, float* to) {
  for_each_row_tile(l, [&](int64_t row, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
      float* out = to + row * steps_of(l) * kStep + i * kStep;
      const T* x = static_cast<const T*>(l.x) + (row + i) * l.x_stride;
      for (int64_t first = 0; first < l.in_features; first += kStep, out += count * kStep) {
        for (int lane = 0; lane < kStep; lane += kLanes) {
          const int64_t left = l.in_features - first - lane;
          const int lanes = left >= kLanes ? kLanes : left > 0 ? static_cast<int>(left) : 0;
          store(out + lane, load(x + first + lane, lanes));
        }
      }
    }
  });
}

template <typename W>
INLINE Vec load_weight(const W* x) {
  return load(x);
}

// The shuffle of load() needs a register for its indices, and all 16 are in use.
INLINE Vec load_weight(const BFloat16* x) { return (Vec)(widened(load_as<ShortVec>(x)) << 16); }

// Dot products of a tile with converted rows of x.
template <int kOuts, int kTileRows, typename W>
INLINE void products_of(const W* weight, const Linear& l, int64_t row, const float* x,
                        float* products) {
  // Each call prefetches a share of the next tile, proportional to its share of the rows of x. On
  // Zen 2, the hardware prefetcher alone is faster for few float32 rows, by 24 to 39 %; a single
  // bfloat16 row gains 28 % from the prefetches.
  const bool prefetch = sizeof(W) <= 2 || l.rows > 2 * static_cast<int>(sizeof(W));
  const int64_t tile_bytes = kOuts * l.weight_stride * sizeof(W);
  const char* ahead = reinterpret_cast<const char*>(weight);
  ahead += tile_bytes + tile_bytes * row / l.rows;
  const int64_t ahead_step = kOuts * kStep * sizeof(W) * kTileRows / l.rows;
  x += row * steps_of(l) * kStep;
  Vec totals[kTileRows * kOuts] = {};
  // Adds the products of a step, which begins `stride` elements after that of the previous output.
  const auto add = [&](const W* step, int64_t stride) __attribute__((always_inline)) {
    for (int lane = 0; lane < kStep; lane += kLanes) {
      Vec factors[kOuts];
      for (int i = 0; i < kOuts; ++i) factors[i] = load_weight(step + i * stride + lane);
      for (int j = 0; j < kTileRows; ++j) {
        const Vec factor = load(x + j * kStep + lane);
        for (int i = 0; i < kOuts; ++i) {
          totals[j * kOuts + i] = fma(factors[i], factor, totals[j * kOuts + i]);
        }
      }
    }
    x += kTileRows * kStep;
  };
  int64_t first = 0;
  for (; first + kStep <= l.in_features; first += kStep) {
    if (prefetch) {
      for (int64_t line = 0; line < ahead_step; line += 64) {
        __builtin_prefetch(ahead + line, 0, 2);
      }
    }
    ahead += ahead_step;
    add(weight + first, l.weight_stride);
  }
  if (first < l.in_features) {
    W steps[kOuts][kStep] = {};
    for (int i = 0; i < kOuts; ++i) {
      __builtin_memcpy(steps[i], weight + i * l.weight_stride + first,
                       (l.in_features - first) * sizeof(W));
    }
    add(steps[0], kStep);
  }
  sums(totals, products);
}

// Computes kLanes outputs for a single row of x, one output after the other. The weight is read
// sequentially, where the hardware prefetcher is faster than software prefetches. (For int8
// weights, tiles are as fast: the conversion hides part of the memory latency.)
template <typename T>
void one_row(const Linear& l, int64_t out) {
  const Rows<T> x{static_cast<const T*>(l.x), 0};
  Vec totals[kLanes] = {};
  for (int i = 0; i < kLanes; ++i) {
    const T* weight = static_cast<const T*>(l.weight) + (out + i) * l.weight_stride;
    const auto load_weight = [&](int, int64_t first, int count) {
      return load_factor(weight + first, count);
    };
    add_products<1, 1, T>(load_weight, x, l.in_features, totals + i);
  }
  float products[kLanes];
  sums(totals, products);
  store(static_cast<T*>(l.y) + out, load(products));
}

// Dot products with a weight in the dtype of x.
template <int kOuts, int kTileRows, typename T>
INLINE void products_of(const T* weight, const Linear& l, int64_t row, Rows<T> x, char*,
                        float* products) {
  // Each call prefetches a share of the next tiles of the weight into L2, proportional to its share
  // of the rows of x, so that memory is read steadily. With kTilesAhead > 1 a tile is prefetched
  // repeatedly, because the processor may drop early prefetches.
  constexpr int kTilesAhead = kOuts < 8 ? 3 : 1;
  const auto share = [&](int64_t end) { return static_cast<int>(kOuts * end / l.rows); };
  const int begin = share(row), end = share(row + kTileRows);
  const auto load_weight = [&](int i, int64_t first, int count) {
    const T* from = weight + i * l.weight_stride + first;
    if (begin <= i && i < end) {
      for (int tile = 1; tile <= kTilesAhead; ++tile) {
        __builtin_prefetch(from + tile * kOuts * l.weight_stride, 0, 2);
      }
    }
    return load_factor(from, count);
  };
  dots<kOuts, kTileRows, T>(load_weight, x, l.in_features, products);
}

// Dot products with an int8 weight. The first rows of x convert the int8 tile to the dtype of the
// product. With `scratch`, the converted tile is stored and further rows reuse it. Computing a tile
// then takes longer than reading it from memory, so prefetching one tile ahead is enough.
template <int kOuts, int kTileRows, typename T>
INLINE void products_of(const int8_t* weight, const Linear& l, int64_t row, Rows<T> x,
                        char* scratch, float* products) {
  constexpr int64_t kBytes = sizeof(Factor<T>);
  const int tiles_ahead = scratch ? 1 : 3;
  const int64_t steps = (l.in_features + Factor<T>::kSize - 1) / Factor<T>::kSize;
  const auto converted = [&](int i, int64_t first) {
    return scratch + (i * steps + first / Factor<T>::kSize) * kBytes;
  };
  const auto convert = [&](int i, int64_t first, int count) {
    const int8_t* from = weight + i * l.weight_stride + first;
    for (int tile = 1; tile <= tiles_ahead; ++tile) {
      __builtin_prefetch(from + tile * kOuts * l.weight_stride, 0, 2);
    }
    const Factor<T> factor = load_factor_of<T>(from, count);
    if (scratch) __builtin_memcpy(converted(i, first), &factor, kBytes);
    return factor;
  };
  const auto load = [&](int i, int64_t first, int) {
    return load_as<Factor<T>>(converted(i, first));
  };
  if (row == 0) return dots<kOuts, kTileRows, T>(convert, x, l.in_features, products);
  dots<kOuts, kTileRows, T>(load, x, l.in_features, products);
}

template <int kOuts, int kTileRows, typename T, typename W>
void tile(const Linear& l, char* scratch, int64_t row, int64_t out) {
  const W* weight = static_cast<const W*>(l.weight) + out * l.weight_stride;
  // The size is rounded up to whole vectors, which are rounded to T at once.
  constexpr int kSize = (kTileRows * kOuts + kLanes - 1) / kLanes * kLanes;
  float products[kSize] = {};
  T results[kSize];
  if constexpr (kConvertsX) {
    const auto* converted = reinterpret_cast<const float*>(scratch);
    products_of<kOuts, kTileRows>(weight, l, row, converted, products);
  } else {
    const T* x = static_cast<const T*>(l.x) + row * l.x_stride;
    products_of<kOuts, kTileRows>(weight, l, row, Rows<T>{x, l.x_stride}, scratch, products);
  }
  if (l.scales) {
    for (int j = 0; j < kTileRows; ++j) {
      for (int i = 0; i < kOuts; ++i) products[j * kOuts + i] *= l.scales[out + i];
    }
  }
  for (int i = 0; i < kSize; i += kLanes) store(results + i, load(products + i));
  for (int j = 0; j < kTileRows; ++j) {
    T* y = static_cast<T*>(l.y) + (row + j) * l.out_features + out;
    __builtin_memcpy(y, results + j * kOuts, kOuts * sizeof(T));
  }
}

// Computes a tile of `count` rows of x, at most kTileRows.
template <int kOuts, int kTileRows, typename T, typename W>
void rows(const Linear& l, char* scratch, int64_t row, int64_t count, int64_t out) {
  if constexpr (kTileRows > 1) {
    if (count < kTileRows) return rows<kOuts, kTileRows - 1, T, W>(l, scratch, row, count, out);
  }
  tile<kOuts, kTileRows, T, W>(l, scratch, row, out);
}

// Computes kOuts outputs for all rows of x.
template <int kOuts, typename T, typename W>
void outputs(const Linear& l, char* scratch, int64_t out) {
  for_each_row_tile(l, [&](int64_t row, int64_t count) {
    rows<kOuts, kRowsPerTile, T, W>(l, scratch, row, count, out);
  });
}

template <int kOuts, typename T, typename W>
void all_outputs(const Linear& l, char* scratch, int64_t begin, int64_t end) {
  for (; begin + kOuts <= end; begin += kOuts) outputs<kOuts, T, W>(l, scratch, begin);
  for (; begin < end; ++begin) outputs<1, T, W>(l, scratch, begin);
}

template <typename T, typename W>
void multiply_converted(const Linear& l, char* scratch, int64_t begin, int64_t end) {
  convert_x<T>(l, reinterpret_cast<float*>(scratch));
  if (l.rows == 1) {  // 4 streams of the weight use more of the memory bandwidth than 1 or 2
    for (; begin + 4 <= end; begin += 4) tile<4, 1, T, W>(l, scratch, 0, begin);
  }
  all_outputs<3, T, W>(l, scratch, begin, end);
}

template <typename T>
void multiply(const Linear& l, char* scratch, int64_t begin, int64_t end) {
  if (l.scales) {
    if (l.rows <= kRowsPerTile) scratch = nullptr;
    return all_outputs<kInt8Outs, T, int8_t>(l, scratch, begin, end);
  }
  // More weight rows per tile use more of the memory bandwidth, unless the rows are short.
  if constexpr (kLanes == 16) {
    if (l.rows == 1) {
      for (; begin + kLanes <= end; begin += kLanes) one_row<T>(l, begin);
    } else if (l.in_features * static_cast<int64_t>(sizeof(T)) >= 3072) {
      if (l.rows == 2) return all_outputs<8, T, T>(l, scratch, begin, end);
      return all_outputs<6, T, T>(l, scratch, begin, end);
    }
  }
  all_outputs<4, T, T>(l, scratch, begin, end);
}

}  // namespace

int64_t linear_scratch_bytes(const Linear& l) {
  if (kConvertsX) return l.rows * steps_of(l) * kStep * sizeof(float);
  const bool converts_weight = l.scales && l.rows > kRowsPerTile;
  return converts_weight ? kInt8Outs * (l.in_features + 32) * sizeof(float) : 0;
}

void linear(const Linear& l, char* scratch, int64_t begin, int64_t end) {
  with_type(l.dtype, [&](auto number) {
    using T = decltype(number);
    if constexpr (!kConvertsX) {
      multiply<T>(l, scratch, begin, end);
    } else if (l.scales) {
      multiply_converted<T, int8_t>(l, scratch, begin, end);
    } else {
      multiply_converted<T, T>(l, scratch, begin, end);
    }
  });
}

}  // namespace kernels::INSTRUCTION_SET
