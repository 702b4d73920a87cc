// Flash attention (arXiv:2205.14135) for a CPU. The query heads of a kv head are rows of one query
// block, so that a block of keys and values is reused from the CPU cache for all of them. Rows are
// computed in groups of kRows, each with only the keys that the group sees.
#include "attention.h"

#include "products.h"

namespace kernels::INSTRUCTION_SET {
namespace {

constexpr int kKeyBlock = kLanes == 8 ? 128 : 64;
constexpr int kBlockRows = 8 * kRows;  // or the number of query heads per kv head, if larger

static_assert(kKeyBlock % kCols == 0, "kKeyBlock must be a multiple of kCols");
static_assert(kBlockRows % kLanes == 0, "kBlockRows must be a multiple of kLanes");

INLINE int64_t round_up(int64_t x, int64_t multiple) { return ceil_div(x, multiple) * multiple; }

struct Range {
  int64_t begin, end;
};

// Returns the keys that the query at `position` in the sequence of keys sees.
INLINE Range visible(const Attention& a, int64_t position) {
  return {clamp(position - a.left, 0, a.seqlen_k), clamp(position + a.right + 1, 0, a.seqlen_k)};
}

// Sizes derived from the arguments of a call, in numbers unless the name contains `bytes`.
template <typename Unit>
struct Layout {
  using Number = typename Unit::Number;

  int group;    // query heads per kv head
  int queries;  // positions per query block
  int rows;     // rows per query block: queries * group, rounded up to whole vectors
  int depth;    // head_dim, rounded up to whole units
  int width;    // head_dim, rounded up to whole tiles
  int64_t key_blocks, query_blocks;

  explicit Layout(const Attention& a)
      : group(a.heads / a.kv_heads),
        queries(group < kBlockRows ? kBlockRows / group : 1),
        rows(round_up(int64_t{queries} * group, kLanes)),
        depth(round_up(a.head_dim, kLanes * Unit::kWidth)),
        width(round_up(a.head_dim, kCols)),
        key_blocks(ceil_div(a.seqlen_k, kKeyBlock)),
        query_blocks(ceil_div(a.seqlen_q, queries)) {}

  int64_t block() const { return int64_t{kKeyBlock} * (depth + width); }

  Sizes sizes(const Attention& a) const {
    const int64_t row_bytes =
        sizeof(Vec) + sizeof(Range) + 4 * (width + kKeyBlock + 1) + depth * sizeof(Number);
    return {a.batch * a.kv_heads * key_blocks * block() * int64_t{sizeof(Number)}, rows * row_bytes,
            key_blocks, query_blocks};
  }
};

// A query block. Row r is query first + r / group of head first_head + r % group.
struct QueryBlock {
  const Attention& a;
  int64_t batch, first, first_head;
  int group, rows;
  Range* seen;  // keys that each row sees

  int64_t query(int row) const { return first + row / group; }
  int64_t head(int row) const { return first_head + row % group; }
  int64_t position(int row) const { return query(row) + a.seqlen_k - a.seqlen_q; }

  // Returns the number of rows in the group of kRows rows that begins at `row`.
  int group_rows(int row) const { return rows - row < kRows ? rows - row : kRows; }

  // Returns the keys that the group of `row` sees, relative to first_key, in whole vectors.
  Range keys(int row, int64_t first_key) const {
    row -= row % kRows;
    const int64_t begin = seen[row].begin - first_key;
    const int64_t end = seen[row + group_rows(row) - 1].end - first_key;
    return {clamp(begin, 0, kKeyBlock) / kLanes * kLanes,
            round_up(clamp(end, 0, kKeyBlock), kLanes)};
  }
};

// Returns kLanes units. The numbers of a unit are in Unit::kWidth rows.
template <typename Unit>
INLINE Vec load_units(const typename Unit::Number* x, int stride) {
  if constexpr (Unit::kWidth == 1) {
    return load(x);
  } else {
    return (Vec)(widened(load_as<ShortVec>(x)) | widened(load_as<ShortVec>(x + stride)) << 16);
  }
}

// Packs a block of keys as units [tile][step of head_dim][key], followed by its values as units
// [tile][step of keys][channel].
template <typename T, typename Unit>
void pack_block(const Attention& a, const Layout<Unit>& layout, int64_t index) {
  using Number = typename Unit::Number;
  constexpr int kWidth = Unit::kWidth;
  const int64_t block = index % layout.key_blocks, head = index / layout.key_blocks % a.kv_heads;
  const int64_t batch = index / layout.key_blocks / a.kv_heads, first = block * kKeyBlock;
  const int64_t offset = a.seqlen_k - a.seqlen_q;
  if (visible(a, offset).begin >= first + kKeyBlock) return;  // no query sees these keys
  if (visible(a, a.seqlen_k - 1).end <= first) return;
  auto* const keys = reinterpret_cast<Number*>(a.packed) + index * layout.block();
  auto* const values = keys + int64_t{kKeyBlock} * layout.depth;
  constexpr int kStride = kMaxHeadDim + kCols;
  Number rows[kLanes * kStride] = {};  // padded with zeros
  const auto convert_token = [&](const Heads& heads, int64_t token, Number* to) {
    if (token < a.seqlen_k) {
      convert(heads.at<const T>(batch, token, head), a.head_dim, to, a.head_dim);
    } else {
      __builtin_memset(to, 0, kStride * sizeof(Number));
    }
  };
  for (int key = 0; key < kKeyBlock; key += kLanes) {
    for (int i = 0; i < kLanes; ++i) convert_token(a.k, first + key + i, rows + i * kStride);
    Number* const tile = keys + int64_t{key / kCols} * kCols * layout.depth;
    Number* to = tile + key % kCols * kWidth;
    for (int channel = 0; channel < layout.depth; channel += kLanes * kWidth) {
      Vec x[kLanes];
      for (int i = 0; i < kLanes; ++i) x[i] = load_as<Vec>(rows + i * kStride + channel);
      transpose(x);
      for (const Vec& units : x) {
        __builtin_memcpy(to, &units, sizeof units);
        to += kCols * kWidth;
      }
    }
  }
  for (int key = 0; key < kKeyBlock; key += kWidth) {
    for (int i = 0; i < kWidth; ++i) convert_token(a.v, first + key + i, rows + i * kStride);
    for (int channel = 0; channel < layout.width; channel += kLanes) {
      const int64_t tile = channel / kCols * kCols;
      const Vec units = load_units<Unit>(rows + channel, kStride);
      Number* const to = values + tile * kKeyBlock + key * kCols + (channel - tile) * kWidth;
      __builtin_memcpy(to, &units, sizeof units);
    }
  }
}

// Applies the softcap, ALiBi and the mask to the scores of one row. Returns their maximum per lane.
INLINE Vec finish_scores(const QueryBlock& block, int row, int64_t first_key, Range keys,
                         float* scores) {
  const Attention& a = block.a;
  const Range seen = block.seen[row];
  const int begin = clamp(seen.begin - first_key, keys.begin, keys.end);
  const int end = clamp(seen.end - first_key, keys.begin, keys.end);
  Vec largest = splat(-kInfinity);
  if (a.is_plain() && begin == keys.begin && end == keys.end) {
    for (int i = begin; i < end; i += kLanes) largest = max(largest, load(scores + i));
    return largest;
  }
  const float slope = a.slopes ? a.slopes[block.batch * a.slope_stride + block.head(row)] : 0;
  const float position = block.position(row) - first_key;
  IntVec key;
  for (int i = 0; i < kLanes; ++i) key[i] = keys.begin + i;
  for (int i = keys.begin; i < keys.end; i += kLanes, key += kLanes) {
    Vec z = load(scores + i);
    if (!a.is_plain()) z *= a.scale;
    if (a.softcap > 0) z = a.softcap * tanh(z / a.softcap);
    if (a.slopes) z -= slope * abs(position - __builtin_convertvector(key, Vec));
    z = (key >= begin) & (key < end) ? z : splat(-kInfinity);
    store(scores + i, z);
    largest = max(largest, z);
  }
  return largest;
}

template <typename T, typename Unit>
void attend_block(const Attention& a, const Layout<Unit>& layout, char* scratch, int64_t index) {
  using Number = typename Unit::Number;
  const int64_t head = index / layout.query_blocks;
  // Blocks differ in their number of keys. Alternating between both ends of the sequence balances
  // the threads, which compute consecutive indices.
  const int64_t i = index % layout.query_blocks, last = layout.query_blocks - 1;
  const int64_t first = (i % 2 ? last - i / 2 : i / 2) * layout.queries;
  const QueryBlock block{a,
                         head / a.kv_heads,
                         first,
                         head % a.kv_heads * layout.group,
                         layout.group,
                         static_cast<int>(clamp(a.seqlen_q - first, 0, layout.queries)) *
                             layout.group,
                         reinterpret_cast<Range*>(scratch)};
  const int rows = block.rows;

  Vec* const row_sum = reinterpret_cast<Vec*>(block.seen + layout.rows);
  float* const out = reinterpret_cast<float*>(row_sum + layout.rows);
  float* const scores = out + layout.rows * layout.width;
  float* const row_max = scores + layout.rows * kKeyBlock;
  Number* const queries = reinterpret_cast<Number*>(row_max + layout.rows);
  // The weights of a row replace its scores.
  Number* const weights = reinterpret_cast<Number*>(scores);
  constexpr int kWeightStride = kKeyBlock * sizeof(float) / sizeof(Number);

  for (int row = 0; row < rows; ++row) {
    convert(a.q.at<const T>(block.batch, block.query(row), block.head(row)), a.head_dim,
            queries + row * layout.depth, layout.depth);
    block.seen[row] = visible(a, block.position(row));
  }
  for (int row = 0; row < layout.rows; ++row) {
    row_max[row] = -kInfinity;
    row_sum[row] = Vec{};
  }
  __builtin_memset(out, 0, sizeof(float) * rows * layout.width);

  const float scale = a.is_plain() ? a.scale : 1;
  const auto* packed = reinterpret_cast<const Number*>(a.packed);
  packed += head * layout.key_blocks * layout.block();
  const int64_t last_block = ceil_div(block.seen[rows - 1].end, kKeyBlock);
  int64_t key_block = block.seen[0].begin / kKeyBlock;
  for (; key_block < last_block; ++key_block) {
    const Number* keys = packed + key_block * layout.block();
    const Number* values = keys + int64_t{kKeyBlock} * layout.depth;
    const int64_t first_key = key_block * kKeyBlock;
    for (int tile = 0; tile < kKeyBlock; tile += kCols) {
      for (int row = 0; row < rows; row += kRows) {
        const Range seen = block.keys(row, first_key);
        if (seen.begin >= tile + kCols || seen.end <= tile) continue;
        multiply<Unit>(queries + row * layout.depth, layout.depth, block.group_rows(row),
                       keys + tile * layout.depth, layout.depth / Unit::kWidth,
                       scores + row * kKeyBlock + tile, kKeyBlock, false);
      }
    }
    for (int first_row = 0; first_row < rows; first_row += kLanes) {
      Vec largest[kLanes];
      const int count = rows - first_row < kLanes ? rows - first_row : kLanes;
      for (int i = 0; i < kLanes; ++i) largest[i] = splat(-kInfinity);
      for (int i = 0; i < count; ++i) {
        const int row = first_row + i;
        largest[i] = finish_scores(block, row, first_key, block.keys(row, first_key),
                                   scores + row * kKeyBlock);
      }
      transpose(largest);
      for (int i = 1; i < kLanes; ++i) largest[0] = max(largest[0], largest[i]);
      const Vec before = load(row_max + first_row), now = max(before, largest[0] * scale);
      const Vec base = now == splat(-kInfinity) ? Vec{} : now;  // every key so far is masked
      const Vec rest = exp(before - base);
      store(row_max + first_row, now);
      for (int i = 0; i < count; ++i) {
        const int row = first_row + i;
        const Range seen = block.keys(row, first_key);
        const float* const from = scores + row * kKeyBlock;
        Number* const to = weights + row * kWeightStride;
        Vec sum = row_sum[row] * rest[i];
        for (int j = seen.begin; j < seen.end; j += kLanes) {
          const Vec z = fma(load(from + j), splat(scale), splat(-base[i]));
          const Vec weight = exp_below_88<sizeof(T) == 2>(z);
          sum += weight;
          store(to + j, weight);
        }
        row_sum[row] = sum;
        if (rest[i] == 1) continue;
        float* const sums = out + row * layout.width;
        for (int j = 0; j < layout.width; j += kLanes) store(sums + j, load(sums + j) * rest[i]);
      }
    }
    for (int tile = 0; tile < layout.width; tile += kCols) {
      for (int row = 0; row < rows; row += kRows) {
        const Range seen = block.keys(row, first_key);
        if (seen.begin >= seen.end) continue;
        multiply<Unit>(weights + row * kWeightStride + seen.begin, kWeightStride,
                       block.group_rows(row), values + tile * kKeyBlock + seen.begin * kCols,
                       (seen.end - seen.begin) / Unit::kWidth, out + row * layout.width + tile,
                       layout.width, true);
      }
    }
  }

  for (int row = 0; row < rows; ++row) {
    const float total = sum(row_sum[row]), inverse = total > 0 ? 1 / total : 0;
    T* const to = a.out.at<T>(block.batch, block.query(row), block.head(row));
    const float* const from = out + row * layout.width;
    for_each_vector(a.head_dim, [&](int64_t i, int count) {
      store(to + i, load(from + i, count) * inverse, count);
    });
    if (a.lse) {
      a.lse[(block.batch * a.heads + block.head(row)) * a.lse_stride + block.query(row)] =
          row_max[row] + __builtin_logf(total);
    }
  }
}

}  // namespace

Sizes sizes(const Attention& a) {
  return with_units(a.dtype, [&](auto, auto unit) { return Layout<decltype(unit)>(a).sizes(a); });
}

void pack_keys(const Attention& a, int64_t begin, int64_t end) {
  with_units(a.dtype, [&](auto number, auto unit) {
    const Layout<decltype(unit)> layout(a);
    for (int64_t i = begin; i < end; ++i) pack_block<decltype(number)>(a, layout, i);
  });
}

void attend(const Attention& a, char* scratch, int64_t begin, int64_t end) {
  with_units(a.dtype, [&](auto number, auto unit) {
    const Layout<decltype(unit)> layout(a);
    for (int64_t i = begin; i < end; ++i) attend_block<decltype(number)>(a, layout, scratch, i);
  });
}

}  // namespace kernels::INSTRUCTION_SET
