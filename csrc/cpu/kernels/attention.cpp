// Flash attention (arXiv:2205.14135) for a CPU. The query heads of a kv head are rows of one query
// block, so that a block of keys and values is reused from the CPU cache for all of them. Key
// blocks outside the window are skipped.
#include "attention.h"

#include "products.h"

namespace kernels::INSTRUCTION_SET {
namespace {

constexpr int kBlockRows = 8 * kRows;  // or the number of query heads per kv head, if larger
constexpr int kMaxHeadDim = 256;

static_assert(kKeyBlock % kCols == 0, "kKeyBlock must be a multiple of kCols");

INLINE int64_t clamp(int64_t x, int64_t low, int64_t high) {
  return x < low ? low : x > high ? high : x;
}

// Sizes derived from the arguments of a call, in numbers unless the name contains `bytes`.
template <typename Unit>
struct Layout {
  using Number = typename Unit::Number;
  static constexpr int kSteps = kKeyBlock / Unit::kWidth;  // of the product of weights and values

  int group;    // query heads per kv head
  int queries;  // positions per query block
  int rows;     // rows per query block: queries * group
  int depth;    // head_dim, rounded up to whole units
  int width;    // head_dim, rounded up to whole tiles
  int64_t key_blocks, query_blocks;

  explicit Layout(const Attention& a)
      : group(a.heads / a.kv_heads),
        queries(group < kBlockRows ? kBlockRows / group : 1),
        rows(queries * group),
        depth(ceil_div(a.head_dim, Unit::kWidth) * Unit::kWidth),
        width(ceil_div(a.head_dim, kCols) * kCols),
        key_blocks(ceil_div(a.seqlen_k, kKeyBlock)),
        query_blocks(ceil_div(a.seqlen_q, queries)) {}

  int64_t block() const { return int64_t{kKeyBlock} * (depth + width); }

  Sizes sizes(const Attention& a) const {
    const int64_t row_bytes =
        (depth + kKeyBlock) * sizeof(Number) + (kKeyBlock + width) * 4 + sizeof(Vec) + 4;
    return {a.batch * a.kv_heads * key_blocks * block() * int64_t{sizeof(Number)}, rows * row_bytes,
            key_blocks, query_blocks};
  }
};

// Packs a block of keys as units [tile][step of head_dim][key], followed by its values as units
// [tile][step of keys][channel].
template <typename T, typename Unit>
void pack_block(const Attention& a, const Layout<Unit>& layout, int64_t index) {
  using Number = typename Unit::Number;
  const int64_t block = index % layout.key_blocks, head = index / layout.key_blocks % a.kv_heads;
  const int64_t batch = index / layout.key_blocks / a.kv_heads, first = block * kKeyBlock;
  auto* const keys = reinterpret_cast<Number*>(a.packed) + index * layout.block();
  auto* const values = keys + int64_t{kKeyBlock} * layout.depth;
  const int steps = layout.depth / Unit::kWidth;
  Number row[kMaxHeadDim + kCols];
  for (int key = 0; key < kKeyBlock; ++key) {
    const bool exists = first + key < a.seqlen_k;
    const int head_dim = exists ? a.head_dim : 0;
    const int64_t token = exists ? first + key : 0;
    convert(a.k.at<const T>(batch, token, head), head_dim, row, layout.depth);
    Number* to = keys + (int64_t{key / kCols} * steps * kCols + key % kCols) * Unit::kWidth;
    for (int step = 0; step < steps; ++step) {
      __builtin_memcpy(to, row + step * Unit::kWidth, sizeof(Number) * Unit::kWidth);
      to += kCols * Unit::kWidth;
    }
    convert(a.v.at<const T>(batch, token, head), head_dim, row, layout.width);
    for (int channel = 0; channel < layout.width; ++channel) {
      const int64_t unit =
          (int64_t{channel / kCols} * layout.kSteps + key / Unit::kWidth) * kCols + channel % kCols;
      values[unit * Unit::kWidth + key % Unit::kWidth] = row[channel];
    }
  }
}

// Computes the softmax weights of a row of scores; keys outside [begin, end) are masked. Updates
// row_max and row_sum. Returns the factor that rescales the sums of earlier blocks.
template <typename Unit>
INLINE float softmax_weights(const Attention& a, float* scores, typename Unit::Number* weights,
                             int begin, int end, float& row_max, Vec& row_sum) {
  Vec z[kKeyBlock / kLanes], largest = splat(-kInfinity);
  IntVec key;
  for (int i = 0; i < kLanes; ++i) key[i] = i;
  for (int i = 0; i < kKeyBlock / kLanes; ++i, key += kLanes) {
    z[i] = load(scores + i * kLanes) * a.scale;
    if (a.softcap > 0) z[i] = a.softcap * tanh(z[i] / a.softcap);
    if (begin > 0 || end < kKeyBlock) {
      z[i] = (key >= begin) & (key < end) ? z[i] : splat(-kInfinity);
    }
    largest = max(largest, z[i]);
  }
  const float before = row_max, found = max(largest);
  if (found > row_max) row_max = found;
  const float base = row_max == -kInfinity ? 0 : row_max;  // every key so far is masked
  Vec sum = {};
  for (int i = 0; i < kKeyBlock / kLanes; ++i) {
    const Vec weight = Unit::exponential(z[i] - base);
    sum += weight;
    store(weights + i * kLanes, weight);
  }
  if (row_max == before) {
    row_sum += sum;
    return 1;
  }
  const Vec rest = exp(splat(before - base));
  row_sum = row_sum * rest + sum;
  return rest[0];
}

template <typename T, typename Unit>
void attend_block(const Attention& a, const Layout<Unit>& layout, char* scratch, int64_t index) {
  using Number = typename Unit::Number;
  const int64_t block = index % layout.query_blocks, head = index / layout.query_blocks;
  const int64_t kv_head = head % a.kv_heads, batch = head / a.kv_heads;
  const int64_t first = block * layout.queries;
  const int rows = clamp(a.seqlen_q - first, 0, layout.queries) * layout.group;

  Vec* const row_sum = reinterpret_cast<Vec*>(scratch);
  float* const out = reinterpret_cast<float*>(row_sum + layout.rows);
  float* const scores = out + layout.rows * layout.width;
  float* const row_max = scores + layout.rows * kKeyBlock;
  Number* const queries = reinterpret_cast<Number*>(row_max + layout.rows);
  Number* const weights = queries + layout.rows * layout.depth;

  // Row r is query first + r / group of head kv_head * group + r % group.
  const auto query = [&](int row) { return first + row / layout.group; };
  const auto query_head = [&](int row) { return kv_head * layout.group + row % layout.group; };
  const int64_t offset = a.seqlen_k - a.seqlen_q;
  const auto begin_of = [&](int row) {
    return clamp(query(row) + offset - a.left, 0, a.seqlen_k);
  };
  const auto end_of = [&](int row) {
    return clamp(query(row) + offset + a.right + 1, 0, a.seqlen_k);
  };
  for (int row = 0; row < rows; ++row) {
    convert(a.q.at<const T>(batch, query(row), query_head(row)), a.head_dim,
            queries + row * layout.depth, layout.depth);
    row_max[row] = -kInfinity;
    row_sum[row] = Vec{};
  }
  __builtin_memset(out, 0, sizeof(float) * rows * layout.width);

  const auto* packed = reinterpret_cast<const Number*>(a.packed);
  packed += head * layout.key_blocks * layout.block();
  const int64_t last_block = ceil_div(end_of(rows - 1), kKeyBlock);
  for (int64_t key_block = begin_of(0) / kKeyBlock; key_block < last_block; ++key_block) {
    const Number* keys = packed + key_block * layout.block();
    const Number* values = keys + int64_t{kKeyBlock} * layout.depth;
    const int64_t first_key = key_block * kKeyBlock;
    for (int tile = 0; tile < kKeyBlock; tile += kCols) {
      multiply<Unit>(queries, layout.depth, rows, keys + tile * layout.depth,
                     layout.depth / Unit::kWidth, scores + tile, kKeyBlock, false);
    }
    for (int row = 0; row < rows; ++row) {
      const int begin = clamp(begin_of(row) - first_key, 0, kKeyBlock);
      const int end = clamp(end_of(row) - first_key, 0, kKeyBlock);
      const float rest =
          softmax_weights<Unit>(a, scores + row * kKeyBlock, weights + row * kKeyBlock, begin, end,
                                row_max[row], row_sum[row]);
      if (rest == 1) continue;
      float* const sums = out + row * layout.width;
      for (int i = 0; i < layout.width; i += kLanes) store(sums + i, load(sums + i) * rest);
    }
    for (int tile = 0; tile < layout.width; tile += kCols) {
      multiply<Unit>(weights, kKeyBlock, rows, values + int64_t{tile} * kKeyBlock, layout.kSteps,
                     out + tile, layout.width, true);
    }
  }

  for (int row = 0; row < rows; ++row) {
    const float total = sum(row_sum[row]), inverse = total > 0 ? 1 / total : 0;
    T* const to = a.out.at<T>(batch, query(row), query_head(row));
    const float* const from = out + row * layout.width;
    for_each_vector(a.head_dim, [&](int64_t i, int count) {
      store(to + i, load(from + i, count) * inverse, count);
    });
    if (a.lse) {
      a.lse[(batch * a.heads + query_head(row)) * a.lse_stride + query(row)] =
          row_max[row] + __builtin_logf(total);
    }
  }
}

// Returns body(number, unit), called with values of the types for this dtype.
template <typename Body>
INLINE auto with_types(DType dtype, Body body) {
  return with_type(dtype, [&](auto number) { return body(number, unit_of(number)); });
}

}  // namespace

Sizes sizes(const Attention& a) {
  return with_types(a.dtype, [&](auto, auto unit) { return Layout<decltype(unit)>(a).sizes(a); });
}

void pack_keys(const Attention& a, int64_t begin, int64_t end) {
  with_types(a.dtype, [&](auto number, auto unit) {
    const Layout<decltype(unit)> layout(a);
    for (int64_t i = begin; i < end; ++i) pack_block<decltype(number)>(a, layout, i);
  });
}

void attend(const Attention& a, char* scratch, int64_t begin, int64_t end) {
  with_types(a.dtype, [&](auto number, auto unit) {
    const Layout<decltype(unit)> layout(a);
    for (int64_t i = begin; i < end; ++i) attend_block<decltype(number)>(a, layout, scratch, i);
  });
}

}  // namespace kernels::INSTRUCTION_SET
