// Backward pass of flash attention (arXiv:2205.14135) for a CPU. With the weights p = exp(s - lse)
// of recomputed scores s, and for each block of queries and keys:
//
//     dv += p^T dout,   dp = dout v^T,   ds = p * (dp - rowsum(dout * out)),
//     dq += ds k,       dk += ds^T q
//
// The scores have the bits of the forward pass. The rounding error of s would otherwise be the
// relative error of p, even of a weight that is 1 because all others are 0.
#include "attention_backward.h"

#include "products.h"

namespace kernels::INSTRUCTION_SET {
namespace {

constexpr int kChunk = 192;
constexpr int kChunkRows = 48;  // queries per block of scores; the keys are those of the chunk

static_assert(kChunk % kCols == 0 && kChunkRows % kLanes == 0);

// Sizes in numbers unless the name contains `bytes`.
template <typename Unit>
struct BackwardLayout {
  using Number = typename Unit::Number;
  static constexpr bool kSameNumbers = Unit::kWidth == 1;  // rows of float32 have both uses

  int group;   // query heads per kv head
  int depth;   // head_dim, rounded up to whole units
  int width;   // head_dim, rounded up to whole tiles
  int stride;  // between rows of float32: an odd number of cache lines
  int64_t query_chunks, key_chunks;

  explicit BackwardLayout(const AttentionBackward& a)
      : group(a.heads / a.kv_heads),
        depth(ceil_div(a.head_dim, Unit::kWidth) * Unit::kWidth),
        width(ceil_div(a.head_dim, kCols) * kCols),
        stride(width | 16),
        query_chunks(ceil_div(a.seqlen_q, kChunk)),
        key_chunks(ceil_div(a.seqlen_k, kChunk)) {}

  // A packed chunk: keys and values as right matrices of the products with q and dout, and keys as
  // the right matrix of the product with ds.
  int64_t packed_bytes() const {
    return int64_t{kChunk} * (2 * depth * int64_t{sizeof(Number)} + width * 4);
  }

  int64_t row_bytes() const {
    return 2 * stride * 4 + (kSameNumbers ? 0 : 2 * depth * int64_t{sizeof(Number)});
  }

  BackwardSizes sizes(const AttentionBackward& a) const {
    return {width, a.batch * a.kv_heads * key_chunks * packed_bytes(),
            kChunkRows * (row_bytes() + 4 * kChunk * 4), kChunk, query_chunks,
            key_chunks};
  }
};

// Packs the keys [first, first + kChunk) of k or v as units [tile][step of head_dim][key].
template <typename T, typename Unit, typename Number = typename Unit::Number>
void pack_columns(const AttentionBackward& a, const Heads& from, int64_t batch, int64_t head,
                  int64_t first, int depth, Number* to) {
  const int steps = depth / Unit::kWidth;
  const int padded = ceil_div(steps, kLanes) * kLanes;
  alignas(64) Number rows[kLanes][kMaxHeadDim + kLanes * Unit::kWidth];
  for (int key = 0; key < kChunk; key += kLanes) {
    for (int i = 0; i < kLanes; ++i) {
      const bool exists = first + key + i < a.seqlen_k;
      convert(from.at<const T>(batch, exists ? first + key + i : 0, head),
              exists ? a.head_dim : 0, rows[i], padded * Unit::kWidth);
    }
    Number* const tile = to + (int64_t{key / kCols} * steps * kCols + key % kCols) * Unit::kWidth;
    for (int step = 0; step < steps; step += kLanes) {
      Vec block[kLanes];
      for (int i = 0; i < kLanes; ++i) block[i] = load_as<Vec>(rows[i] + step * Unit::kWidth);
      transpose(block);
      const int count = steps - step < kLanes ? steps - step : kLanes;
      for (int i = 0; i < count; ++i) {
        __builtin_memcpy(tile + int64_t{step + i} * kCols * Unit::kWidth, &block[i], sizeof(Vec));
      }
    }
  }
}

template <typename T, typename Unit>
void prepare_chunk(const AttentionBackward& a, const BackwardLayout<Unit>& layout, int64_t index) {
  using Number = typename Unit::Number;
  const int64_t chunk = index % layout.key_chunks, head = index / layout.key_chunks % a.kv_heads;
  const int64_t batch = index / layout.key_chunks / a.kv_heads, first = chunk * kChunk;
  auto* const keys = reinterpret_cast<Number*>(a.packed + index * layout.packed_bytes());
  auto* const values = keys + int64_t{kChunk} * layout.depth;
  pack_columns<T, Unit>(a, a.k, batch, head, first, layout.depth, keys);
  pack_columns<T, Unit>(a, a.v, batch, head, first, layout.depth, values);
  // Keys as units [tile of channels][key][channel].
  auto* const rows = reinterpret_cast<float*>(values + int64_t{kChunk} * layout.depth);
  const int count = clamp(a.seqlen_k - first, 0, kChunk);
  for (int key = 0; key < kChunk; ++key) {
    const T* const from = a.k.at<const T>(batch, key < count ? first + key : 0, head);
    for (int channel = 0; channel < layout.width; channel += kLanes) {
      const int channels = key < count ? clamp(a.head_dim - channel, 0, kLanes) : 0;
      float* const tile = rows + int64_t{channel / kCols} * kChunk * kCols;
      store(tile + key * kCols + channel % kCols, load(from + channel, channels));
    }
  }
  const int64_t from = ((batch * a.kv_heads + head) * a.seqlen_k + first) * layout.width;
  for (float* sums : {a.dk_sums, a.dv_sums}) {
    if (sums) __builtin_memset(sums + from, 0, sizeof(float) * count * layout.width);
  }
}

template <typename T>
void prepare_row(const AttentionBackward& a, int width, int64_t index) {
  const int64_t query = index % a.seqlen_q, head = index / a.seqlen_q % a.heads;
  const int64_t batch = index / a.seqlen_q / a.heads;
  const T* const out = a.out.at<const T>(batch, query, head);
  const T* const dout = a.dout.at<const T>(batch, query, head);
  Vec total = {};
  for_each_vector(a.head_dim, [&](int64_t i, int count) {
    total = fma(load(out + i, count), load(dout + i, count), total);
  });
  a.deltas[index] = sum(total);
  if (a.dq_sums) __builtin_memset(a.dq_sums + index * width, 0, sizeof(float) * width);
}

// The rows of a block: consecutive queries of one head.
struct RowBlock {
  int count;
  float slope;  // of ALiBi
  int32_t begin[kChunkRows], end[kChunkRows];  // visible keys, relative to the chunk of keys
  float lse[kChunkRows], delta[kChunkRows];
};

// Computes p and ds of the keys [begin, end) from the scores and dp. ds replaces dp; the transposed
// p and ds are stored as well. `distance` is the position of the first row minus the first key.
template <typename Unit, bool kMasked>
void differentiate_softmax(const AttentionBackward& a, const RowBlock& block, int64_t distance,
                           int begin, int end, const float* scores, float* dp, float* p_columns,
                           float* ds_columns) {
  IntVec lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  for (int row = 0; row < block.count; row += kLanes) {
    for (int key = begin; key < end; key += kLanes) {
      Vec p[kLanes], ds[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        if (row + i >= block.count) {
          p[i] = ds[i] = Vec{};
          continue;
        }
        const int64_t at = int64_t{row + i} * kChunk + key;
        Vec z = load(scores + at) * a.scale, slope = splat(1.0f);
        if (a.softcap > 0) {
          const Vec capped = tanh(z / a.softcap);
          z = a.softcap * capped;
          slope -= capped * capped;
        }
        if (a.slopes) {
          const IntVec keys = lane + static_cast<int32_t>(key - distance - row - i);
          z -= block.slope * abs(__builtin_convertvector(keys, Vec));
        }
        p[i] = Unit::exponential(z - block.lse[row + i]);
        ds[i] = p[i] * (load(dp + at) - block.delta[row + i]);
        if (a.softcap > 0) ds[i] *= slope;
        if (kMasked) {
          const IntVec keys = lane + key;
          const IntVec seen = (keys >= block.begin[row + i]) & (keys < block.end[row + i]);
          p[i] = seen ? p[i] : Vec{};
          ds[i] = seen ? ds[i] : Vec{};
        }
        store(dp + at, ds[i]);
      }
      transpose(p);
      transpose(ds);
      for (int i = 0; i < kLanes; ++i) {
        store(p_columns + int64_t{key + i} * kChunkRows + row, p[i]);
        store(ds_columns + int64_t{key + i} * kChunkRows + row, ds[i]);
      }
    }
  }
}

// Adds the products of one chunk of queries and one chunk of keys.
template <typename T, typename Unit>
void add_chunk(const AttentionBackward& a, const BackwardLayout<Unit>& layout, char* scratch,
               int64_t batch, int64_t kv_head, int64_t query_chunk, int64_t key_chunk) {
  using Number = typename Unit::Number;
  const int64_t first_key = key_chunk * kChunk;
  const int keys_in_chunk = clamp(a.seqlen_k - first_key, 0, kChunk);
  const int64_t kv_index = batch * a.kv_heads + kv_head;
  const char* const packed =
      a.packed + (kv_index * layout.key_chunks + key_chunk) * layout.packed_bytes();
  const auto* const keys = reinterpret_cast<const Number*>(packed);
  const auto* const values = keys + int64_t{kChunk} * layout.depth;
  const auto* const key_rows =
      reinterpret_cast<const float*>(values + int64_t{kChunk} * layout.depth);
  const int64_t kv_sums = (kv_index * a.seqlen_k + first_key) * layout.width;

  auto* const q_rows = reinterpret_cast<float*>(scratch);
  auto* const dout_rows = q_rows + kChunkRows * layout.stride;
  float* const scores = dout_rows + kChunkRows * layout.stride;
  float* const dp = scores + kChunkRows * kChunk;
  float* const p_columns = dp + kChunkRows * kChunk;
  float* const ds_columns = p_columns + kChunkRows * kChunk;
  // The left matrices of the products with keys and values: the rows themselves if these are
  // float32.
  constexpr bool kSameNumbers = BackwardLayout<Unit>::kSameNumbers;
  const int units_stride = kSameNumbers ? layout.stride : layout.depth;
  float* const after = ds_columns + kChunkRows * kChunk;
  auto* const q_units = reinterpret_cast<Number*>(kSameNumbers ? q_rows : after);
  auto* const dout_units = q_units + kChunkRows * units_stride;
  RowBlock block;

  const bool needs_ds = a.dq_sums || a.dk_sums;
  const int64_t last_row = clamp((query_chunk + 1) * kChunk, 0, a.seqlen_q);
  for (int64_t head = kv_head * layout.group; head < (kv_head + 1) * layout.group; ++head) {
    if (a.slopes) block.slope = a.slopes[batch * a.slope_stride + head];
    for (int64_t row = query_chunk * kChunk; row < last_row; row += kChunkRows) {
      block.count = clamp(last_row - row, 0, kChunkRows);
      const int64_t distance = row + a.seqlen_k - a.seqlen_q - first_key;
      const int first_seen = clamp(distance - a.left, 0, keys_in_chunk);
      const int last_seen = clamp(distance + block.count + a.right, 0, keys_in_chunk);
      if (first_seen >= last_seen) continue;
      // Whole tiles of keys that some row sees.
      const int begin = first_seen / kCols * kCols;
      const int end = ceil_div(last_seen, kCols) * kCols;
      bool is_masked = false;
      const int64_t index = (batch * a.heads + head) * a.seqlen_q + row;
      for (int i = 0; i < block.count; ++i) {
        block.begin[i] = clamp(distance + i - a.left, 0, keys_in_chunk);
        block.end[i] = clamp(distance + i + a.right + 1, 0, keys_in_chunk);
        is_masked |= block.begin[i] > begin || block.end[i] < end;
        const float lse = a.lse[(batch * a.heads + head) * a.lse_stride + row + i];
        block.lse[i] = lse == -kInfinity ? kInfinity : lse;  // a row that sees no key
        block.delta[i] = a.deltas[index + i];
        const T* const q = a.q.at<const T>(batch, row + i, head);
        const T* const dout = a.dout.at<const T>(batch, row + i, head);
        convert(q, a.head_dim, q_rows + i * layout.stride, layout.width);
        convert(dout, a.head_dim, dout_rows + i * layout.stride, layout.width);
        if constexpr (!kSameNumbers) {
          convert(q, a.head_dim, q_units + i * layout.depth, layout.depth);
          convert(dout, a.head_dim, dout_units + i * layout.depth, layout.depth);
        }
      }
      const auto multiply_by_keys = [&](const Number* units, const Number* columns, float* to) {
        for (int tile = begin; tile < end; tile += kCols) {
          multiply<Unit>(units, units_stride, block.count, columns + int64_t{tile} * layout.depth,
                         layout.depth / Unit::kWidth, to + tile, kChunk, false);
        }
      };
      multiply_by_keys(q_units, keys, scores);
      if (needs_ds) multiply_by_keys(dout_units, values, dp);
      const auto differentiate = is_masked ? differentiate_softmax<Unit, true>
                                           : differentiate_softmax<Unit, false>;
      differentiate(a, block, distance, begin, end, scores, dp, p_columns, ds_columns);
      const int seen = (last_seen < end ? last_seen : end) - begin;
      for (int tile = 0; a.dv_sums && tile < layout.width; tile += kCols) {
        multiply<SingleUnit>(p_columns + begin * kChunkRows, kChunkRows, seen, dout_rows + tile,
                             block.count, a.dv_sums + kv_sums + begin * layout.width + tile,
                             layout.width, true, layout.stride);
      }
      for (int tile = 0; a.dk_sums && tile < layout.width; tile += kCols) {
        multiply<SingleUnit>(ds_columns + begin * kChunkRows, kChunkRows, seen, q_rows + tile,
                             block.count, a.dk_sums + kv_sums + begin * layout.width + tile,
                             layout.width, true, layout.stride);
      }
      for (int tile = 0; a.dq_sums && tile < layout.width; tile += kCols) {
        multiply<SingleUnit>(dp + begin, kChunk, block.count,
                             key_rows + int64_t{tile} * kChunk + begin * kCols, end - begin,
                             a.dq_sums + index * layout.width + tile, layout.width, true);
      }
    }
  }
}

template <typename T>
void store_sums(const float* sums, float factor, int64_t tokens, int heads, int head_dim, int width,
                const Heads& to, int64_t begin, int64_t end) {
  if (!sums) return;
  for (int64_t index = begin; index < end; ++index) {
    T* const row = to.at<T>(index / tokens / heads, index % tokens, index / tokens % heads);
    const float* const from = sums + index * width;
    for_each_vector(head_dim, [&](int64_t i, int count) {
      store(row + i, load(from + i) * factor, count);
    });
  }
}

}  // namespace

BackwardSizes backward_sizes(const AttentionBackward& a) {
  return with_units(
      a.dtype, [&](auto, auto unit) { return BackwardLayout<decltype(unit)>(a).sizes(a); });
}

void prepare_rows(const AttentionBackward& a, int64_t begin, int64_t end) {
  with_units(a.dtype, [&](auto number, auto unit) {
    const BackwardLayout<decltype(unit)> layout(a);
    for (int64_t i = begin; i < end; ++i) prepare_row<decltype(number)>(a, layout.width, i);
  });
}

void prepare_keys(const AttentionBackward& a, int64_t begin, int64_t end) {
  with_units(a.dtype, [&](auto number, auto unit) {
    const BackwardLayout<decltype(unit)> layout(a);
    for (int64_t i = begin; i < end; ++i) prepare_chunk<decltype(number)>(a, layout, i);
  });
}

void add_gradients(const AttentionBackward& a, char* scratch, int64_t diagonal, int64_t first_chunk,
                   int64_t chunks, int64_t begin, int64_t end) {
  with_units(a.dtype, [&](auto number, auto unit) {
    const BackwardLayout<decltype(unit)> layout(a);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t head = i / chunks, chunk = first_chunk + i % chunks;
      add_chunk<decltype(number)>(a, layout, scratch, head / a.kv_heads, head % a.kv_heads, chunk,
                                  chunk + diagonal);
    }
  });
}

void store_rows(const AttentionBackward& a, int64_t begin, int64_t end) {
  with_units(a.dtype, [&](auto number, auto unit) {
    using T = decltype(number);
    const BackwardLayout<decltype(unit)> layout(a);
    store_sums<T>(a.dq_sums, a.scale, a.seqlen_q, a.heads, a.head_dim, layout.width, a.dq, begin,
                  end);
  });
}

void store_keys(const AttentionBackward& a, int64_t begin, int64_t end) {
  with_units(a.dtype, [&](auto number, auto unit) {
    using T = decltype(number);
    const BackwardLayout<decltype(unit)> layout(a);
    store_sums<T>(a.dk_sums, a.scale, a.seqlen_k, a.kv_heads, a.head_dim, layout.width, a.dk, begin,
                  end);
    store_sums<T>(a.dv_sums, 1, a.seqlen_k, a.kv_heads, a.head_dim, layout.width, a.dv, begin,
                  end);
  });
}

}  // namespace kernels::INSTRUCTION_SET
