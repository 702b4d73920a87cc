// A tile of outputs is computed for all rows of x before the next tile. The weight is read from
// memory once; for further rows of x it is read from the CPU cache.
#include "linear.h"

#include "dots.h"

namespace kernels::INSTRUCTION_SET {
namespace {

// Rows of x per tile, chosen so that the accumulators and the loaded values of x and the weight
// (`Factor`) stay in registers.
constexpr int kRowsPerTile = kRegisters == 32 ? 4 : 2;

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
  const T* x = static_cast<const T*>(l.x) + row * l.x_stride;
  // The size is rounded up to whole vectors, which are rounded to T at once.
  constexpr int kSize = (kTileRows * kOuts + kLanes - 1) / kLanes * kLanes;
  float products[kSize] = {};
  T results[kSize];
  products_of<kOuts, kTileRows>(weight, l, row, Rows<T>{x, l.x_stride}, scratch, products);
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

// Computes kOuts outputs for all rows of x, in tiles of nearly equal numbers of rows.
template <int kOuts, typename T, typename W>
void outputs(const Linear& l, char* scratch, int64_t out) {
  const int64_t tiles = (l.rows + kRowsPerTile - 1) / kRowsPerTile;
  const int64_t base = l.rows / tiles, more = l.rows % tiles;
  if (tiles == 1) scratch = nullptr;
  for (int64_t i = 0, row = 0; i < tiles; ++i) {
    const int64_t count = base + (i < more);
    rows<kOuts, kRowsPerTile, T, W>(l, scratch, row, count, out);
    row += count;
  }
}

template <int kOuts, typename T, typename W>
void all_outputs(const Linear& l, char* scratch, int64_t begin, int64_t end) {
  for (; begin + kOuts <= end; begin += kOuts) outputs<kOuts, T, W>(l, scratch, begin);
  for (; begin < end; ++begin) outputs<1, T, W>(l, scratch, begin);
}

template <typename T>
void multiply(const Linear& l, char* scratch, int64_t begin, int64_t end) {
  if (l.scales) return all_outputs<kTileOuts, T, int8_t>(l, scratch, begin, end);
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

void linear(const Linear& l, char* scratch, int64_t begin, int64_t end) {
  with_type(l.dtype, [&](auto number) { multiply<decltype(number)>(l, scratch, begin, end); });
}

}  // namespace kernels::INSTRUCTION_SET
