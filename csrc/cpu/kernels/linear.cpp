// A tile of outputs is formed for all rows before the next: the weight comes from memory once, and
// for further rows out of a cache.
#include "linear.h"

#include "dots.h"

namespace kernels::INSTRUCTION_SET {
namespace {

// Of a tile, so that its sums and factors stay in registers, of which AVX-512 and NEON have 32.
constexpr int kOuts = 4, kRows = kRegisters == 32 ? 4 : 2;
static_assert(kOuts <= kLanes);

template <int kTileOuts, int kTileRows, typename T>
void tile(const Linear& l, int64_t row, int64_t out) {
  const T* weight = static_cast<const T*>(l.weight) + out * l.weight_stride;
  const T* x = static_cast<const T*>(l.x) + row * l.x_stride;
  const int64_t ahead = row == 0 ? kTileOuts * l.weight_stride : 0;  // the next tile
  float products[kTileRows * kTileOuts];
  dots<kTileOuts, kTileRows, T>({weight, l.weight_stride}, {x, l.x_stride}, l.in_features, ahead,
                                products);
  for (int j = 0; j < kTileRows; ++j) {
    T* y = static_cast<T*>(l.y) + (row + j) * l.out_features + out;
    store(y, load(products + j * kTileOuts, kTileOuts), kTileOuts);
  }
}

// `count` rows, at most kTileRows.
template <int kTileOuts, int kTileRows, typename T>
void rows(const Linear& l, int64_t row, int64_t count, int64_t out) {
  if constexpr (kTileRows > 1) {
    if (count < kTileRows) return rows<kTileOuts, kTileRows - 1, T>(l, row, count, out);
  }
  tile<kTileOuts, kTileRows, T>(l, row, out);
}

template <int kTileOuts, typename T>
void outputs(const Linear& l, int64_t out) {
  const int64_t tiles = (l.rows + kRows - 1) / kRows, base = l.rows / tiles, more = l.rows % tiles;
  for (int64_t i = 0, row = 0; i < tiles; ++i) {
    const int64_t count = base + (i < more);
    rows<kTileOuts, kRows, T>(l, row, count, out);
    row += count;
  }
}

template <typename T>
void all_outputs(const Linear& l, int64_t begin, int64_t end) {
  for (; begin + kOuts <= end; begin += kOuts) outputs<kOuts, T>(l, begin);
  for (; begin < end; ++begin) outputs<1, T>(l, begin);
}

}  // namespace

void linear(const Linear& l, int64_t begin, int64_t end) {
  switch (l.dtype) {
    case DType::float32: return all_outputs<float>(l, begin, end);
    case DType::float16: return all_outputs<Half>(l, begin, end);
    case DType::bfloat16: return all_outputs<BFloat16>(l, begin, end);
  }
}

}  // namespace kernels::INSTRUCTION_SET
