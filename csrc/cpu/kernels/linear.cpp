// A tile of outputs is formed for all rows before the next: the weight comes from memory once, and
// for further rows out of a cache.
#include "linear.h"

#include "dots.h"

namespace kernels::INSTRUCTION_SET {
namespace {

// Of a tile, so that its sums and factors stay in registers, of which AVX-512 and NEON have 32.
constexpr int kRows = kRegisters == 32 ? 4 : 2;

// A vector of outputs of a single row, one after the other: that is straight through memory, where
// processors fetch unasked and farther ahead than it pays to ask. (int8 is widened meanwhile, which
// leaves them less to wait for, and tiles are as fast.)
template <typename T>
void in_turn(const Linear& l, int64_t out) {
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

// Products of a weight in x's dtype.
template <int kOuts, int kTileRows, typename T>
INLINE void products_of(const T* weight, const Linear& l, int64_t row, Rows<T> x, char*,
                        float* products) {
  // Of the tiles that follow, a share as large as that of the rows is fetched meanwhile, into the
  // second of caches: what memory sends lasts from the first rows to the last. Processors forget
  // what is asked for faster than memory sends it, so that with more rows all is asked for again.
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

// Of int8, which the first rows widen: with `scratch`, for those after them too. These take longer
// than memory does, so that nothing has to be asked for again.
template <int kOuts, int kTileRows, typename T>
INLINE void products_of(const int8_t* weight, const Linear& l, int64_t row, Rows<T> x,
                        char* scratch, float* products) {
  constexpr int64_t kBytes = sizeof(Factor<T>);
  const int tiles_ahead = scratch ? 1 : 3;
  const int64_t steps = (l.in_features + Factor<T>::kSize - 1) / Factor<T>::kSize;
  const auto widened = [&](int i, int64_t first) {
    return scratch + (i * steps + first / Factor<T>::kSize) * kBytes;
  };
  const auto widen = [&](int i, int64_t first, int count) {
    const int8_t* from = weight + i * l.weight_stride + first;
    for (int tile = 1; tile <= tiles_ahead; ++tile) {
      __builtin_prefetch(from + tile * kOuts * l.weight_stride, 0, 2);
    }
    const Factor<T> factor = load_factor_of<T>(from, count);
    if (scratch) __builtin_memcpy(widened(i, first), &factor, kBytes);
    return factor;
  };
  const auto load = [&](int i, int64_t first, int) {
    return load_as<Factor<T>>(widened(i, first));
  };
  if (row == 0) return dots<kOuts, kTileRows, T>(widen, x, l.in_features, products);
  dots<kOuts, kTileRows, T>(load, x, l.in_features, products);
}

template <int kOuts, int kTileRows, typename T, typename W>
void tile(const Linear& l, char* scratch, int64_t row, int64_t out) {
  const W* weight = static_cast<const W*>(l.weight) + out * l.weight_stride;
  const T* x = static_cast<const T*>(l.x) + row * l.x_stride;
  // Whole vectors, which are scaled and rounded at once.
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

// `count` rows, at most kTileRows.
template <int kOuts, int kTileRows, typename T, typename W>
void rows(const Linear& l, char* scratch, int64_t row, int64_t count, int64_t out) {
  if constexpr (kTileRows > 1) {
    if (count < kTileRows) return rows<kOuts, kTileRows - 1, T, W>(l, scratch, row, count, out);
  }
  tile<kOuts, kTileRows, T, W>(l, scratch, row, out);
}

template <int kOuts, typename T, typename W>
void outputs(const Linear& l, char* scratch, int64_t out) {
  const int64_t tiles = (l.rows + kRows - 1) / kRows, base = l.rows / tiles, more = l.rows % tiles;
  if (tiles == 1) scratch = nullptr;
  for (int64_t i = 0, row = 0; i < tiles; ++i) {
    const int64_t count = base + (i < more);
    rows<kOuts, kRows, T, W>(l, scratch, row, count, out);
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
  // In tiles, the more rows of the weight are read side by side, the nearer to what memory can give;
  // but a tile of short ones is over too soon.
  if constexpr (kLanes == 16) {
    if (l.rows == 1) {
      for (; begin + kLanes <= end; begin += kLanes) in_turn<T>(l, begin);
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
