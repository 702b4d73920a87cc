// Numbers are converted to float32 block by block, in the layout of the tile product: a block of
// `a` stays in L2, a tile of `b` in L1, as in Goto and van de Geijn, "Anatomy of High-Performance
// Matrix Multiplication" (2008). The order of the sums depends on `inner` alone.
#include "matmul.h"

#include "products.h"

namespace kernels::INSTRUCTION_SET {
namespace {

constexpr int kInnerBlock = kCols > 32 ? 128 : 256;  // a tile of b has kInnerBlock * kCols floats
constexpr int kRowBlock = 40 * kRows;
constexpr int kColBlock = 256 / kCols * kCols;

// Converts a block of `rows` rows and `cols` columns. Rows of `to` begin `to_stride` numbers apart
// and are padded with zeros to whole vectors.
template <typename T>
void convert_block(const T* from, int64_t row_stride, int64_t col_stride, int rows, int cols,
                   float* to, int64_t to_stride) {
  if (col_stride == 1) {
    for (int row = 0; row < rows; ++row) {
      for_each_vector(cols, [&](int64_t col, int count) {
        store(to + row * to_stride + col, load(from + row * row_stride + col, count));
      });
    }
    return;
  }
  const auto convert_columns = [&](int row, int col, int row_count, int col_count)
                                   __attribute__((always_inline)) {
    Vec block[kLanes] = {};
    const T* x = from + col * col_stride + row;
    for (int i = 0; i < col_count; ++i, x += col_stride) block[i] = load(x, row_count);
    transpose(block);
    float* y = to + row * to_stride + col;
    for (int i = 0; i < row_count; ++i, y += to_stride) store(y, block[i]);
  };
  for (int row = 0; row < rows; row += kLanes) {
    const int row_count = rows - row < kLanes ? rows - row : kLanes;
    for (int col = 0; col < cols; col += kLanes) {
      const int col_count = cols - col < kLanes ? cols - col : kLanes;
      if (row_count == kLanes && col_count == kLanes) {
        convert_columns(row, col, kLanes, kLanes);
      } else {
        convert_columns(row, col, row_count, col_count);
      }
    }
  }
}

void convert_block(const Matrix& m, DType dtype, int64_t row, int64_t col, int rows, int cols,
                   float* to, int64_t to_stride) {
  const int64_t first = row * m.row_stride + col * m.col_stride;
  with_type(dtype, [&](auto number) {
    const auto* from = static_cast<const decltype(number)*>(m.data) + first;
    convert_block(from, m.row_stride, m.col_stride, rows, cols, to, to_stride);
  });
}

// Packs a tile of b: `inner` rows of kCols columns.
void pack_tile(const Matmul& m, int64_t row, int64_t col, int inner, int cols, float* to) {
  if (cols < kCols) __builtin_memset(to, 0, sizeof(float) * inner * kCols);
  if (!m.scales) return convert_block(m.b, m.dtype, row, col, inner, cols, to, kCols);
  const int64_t first = row * m.b.row_stride + col * m.b.col_stride;
  const auto* from = static_cast<const int8_t*>(m.b.data) + first;
  convert_block(from, m.b.row_stride, m.b.col_stride, inner, cols, to, kCols);
}

// Writes the sums of `count` columns of a row to c.
template <typename T>
void write_row(const Matmul& m, const float* sums, T* c, int64_t col, int count) {
  for_each_vector(count, [&](int64_t i, int lanes) {
    Vec x = load(sums + i);
    if (m.scales) x *= load(m.scales + col + i, lanes);
    if (m.accumulate) x += load(c + i, lanes);
    store(c + i, x, lanes);
  });
}

// Computes `rows` rows and `cols` columns.
void multiply_block(const Matmul& m, float* scratch, int64_t row, int rows, int64_t col, int cols) {
  float* const sums = scratch;
  float* const a = sums + kRowBlock * kColBlock;
  float* const b = a + kRowBlock * kInnerBlock;
  const int64_t blocks = m.inner ? ceil_div(m.inner, kInnerBlock) : 1;
  const int64_t step = ceil_div(ceil_div(m.inner, blocks), kLanes) * kLanes;
  int64_t first = 0;
  do {
    const int inner = static_cast<int>(m.inner - first < step ? m.inner - first : step);
    convert_block(m.a, m.dtype, row, first, rows, inner, a, kInnerBlock);
    for (int tile = 0; tile < cols; tile += kCols) {
      pack_tile(m, first, col + tile, inner, cols - tile < kCols ? cols - tile : kCols, b);
      multiply<SingleUnit>(a, kInnerBlock, rows, b, inner, sums + tile, kColBlock, first > 0);
    }
    first += step;
  } while (first < m.inner);
  with_type(m.c_dtype, [&](auto number) {
    auto* c = static_cast<decltype(number)*>(m.c) + row * m.c_stride + col;
    for (int i = 0; i < rows; ++i) {
      write_row(m, sums + i * kColBlock, c + i * m.c_stride, col, cols);
    }
  });
}

}  // namespace

MatmulParts matmul_parts(const Matmul& m) {
  constexpr int64_t kFloats = kRowBlock * kColBlock + (kRowBlock + kCols) * kInnerBlock;
  return {ceil_div(m.rows, kRowBlock), ceil_div(m.cols, kCols), kFloats * int64_t{sizeof(float)}};
}

void matmul(const Matmul& m, char* scratch, int64_t begin, int64_t end) {
  const MatmulParts parts = matmul_parts(m);
  // Row blocks have nearly the same number of rows, a multiple of kRows.
  const int64_t block_rows = ceil_div(ceil_div(m.rows, parts.row_blocks), kRows) * kRows;
  while (begin < end) {
    const int64_t block = begin / parts.col_tiles, tile = begin % parts.col_tiles;
    int64_t tiles = parts.col_tiles - tile;
    if (tiles > end - begin) tiles = end - begin;
    tiles = ceil_div(tiles, ceil_div(tiles, kColBlock / kCols));
    const int64_t row = block * block_rows, col = tile * kCols;
    const int64_t rows = m.rows - row < block_rows ? m.rows - row : block_rows;
    const int64_t cols = m.cols - col < tiles * kCols ? m.cols - col : tiles * kCols;
    if (rows > 0) {
      multiply_block(m, reinterpret_cast<float*>(scratch), row, static_cast<int>(rows), col,
                     static_cast<int>(cols));
    }
    begin += tiles;
  }
}

}  // namespace kernels::INSTRUCTION_SET
