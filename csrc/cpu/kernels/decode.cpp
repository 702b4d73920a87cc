// All query heads of a kv head share one read of its keys and values. The keys of a sequence are
// divided into splits of a fixed size, whose results are combined in order. Results therefore do
// not depend on the number of threads or on the other sequences of the batch.
#include "decode.h"

#include "dots.h"

#include <type_traits>

namespace kernels::INSTRUCTION_SET {
namespace {

// Tile sizes, chosen so that accumulators and factors stay in registers.
constexpr int kHeads = 4, kKeys = kRegisters == 32 ? 4 : 2, kValueVecs = kKeys;
constexpr int kKeysOfBlock = 64;  // at most
constexpr int kKeysAhead = 12;    // distance of the second prefetch

// The result of a split for one query head. Weights are exp(score - max); `total` is their sum.
struct Partial {
  float max, total, weighted_values[];
};

INLINE Partial* partial(const Decode& d, int64_t sequence, int64_t split, int64_t head) {
  const int64_t index = (sequence * d.splits + split) * d.num_heads + head;
  return reinterpret_cast<Partial*>(d.partials + index * (2 + d.head_dim));
}

// One split of the keys of a sequence, for one kv head.
struct Item {
  int64_t sequence, split, kv_head;
  Span span;
};

INLINE Item item_at(const Decode& d, int64_t index) {
  const int64_t kv_head = index % d.num_kv_heads, split = index / d.num_kv_heads % d.splits;
  const int64_t sequence = index / d.num_kv_heads / d.splits;
  Span span = visible(d, sequence);
  span.begin += split * kSplit;
  if (span.end > span.begin + kSplit) span.end = span.begin + kSplit;
  return {sequence, split, kv_head, span};
}

// Keys or values in consecutive slots.
template <typename T>
struct Block {
  Rows<T> rows;
  int first, count;  // keys [first, first + count) of the item

  // Prefetches part of a row into L2. In L1 it would be evicted before it is used.
  INLINE void fetch(int row, int64_t begin, int64_t size) const {
    if (row >= count) return;
    const char* from = reinterpret_cast<const char*>(rows.data + row * rows.stride + begin);
    for (int64_t i = 0; i < size * static_cast<int64_t>(sizeof(T)); i += 64) {
      __builtin_prefetch(from + i, 0, 2);
    }
  }
};

template <typename T>
INLINE Block<T> block_at(const Decode& d, const Item& item, const void* cache,
                         const int64_t* strides, int64_t first) {
  const int64_t position = item.span.begin + first;
  if (position >= item.span.end) return {};
  const int64_t slot = position % d.capacity, in_page = slot % d.page_size;
  int64_t count = d.page_size - in_page;
  if (count > item.span.end - position) count = item.span.end - position;
  if (count > kKeysOfBlock) count = kKeysOfBlock;
  int64_t outer = d.rows ? d.rows[item.sequence] : item.sequence;
  if (d.block_table) outer = d.block_table[item.sequence * d.max_pages + slot / d.page_size];
  const T* data = static_cast<const T*>(cache) + outer * strides[0] + in_page * strides[1] +
                  item.kv_head * strides[2];
  return {{data, strides[1]}, static_cast<int>(first), static_cast<int>(count)};
}

// While `key` of `block` is processed, prefetches the same key of the next block, and once more the
// key kKeysAhead keys ahead, because the processor may have dropped its earlier prefetch.
template <typename T>
INLINE void fetch_ahead(Block<T> block, Block<T> next, int key, int64_t begin, int64_t size) {
  next.fetch(key, begin, size);
  block.fetch(key + kKeysAhead, begin, size);
}

// Calls body(block, next) for each block of an item. `next` is the block to prefetch: the following
// block of the item, or `after` for the last block.
template <typename T, typename Body>
INLINE void for_each_block(const Decode& d, const Item& item, const void* cache,
                           const int64_t* strides, Block<T> after, Body body) {
  Block<T> block = block_at<T>(d, item, cache, strides, 0);
  while (block.count > 0) {
    const Block<T> next = block_at<T>(d, item, cache, strides, block.first + block.count);
    body(block, next.count > 0 ? next : after);
    block = next;
  }
}

// The type of queries in the dot products. With 16 registers, keys and queries are multiplied as
// float32, and queries are converted once per item.
template <typename T>
using Query = std::conditional_t<kRegisters == 32, T, float>;

template <int kTileKeys, int kTileHeads, typename T>
INLINE void score_keys(const Decode& d, Rows<T> keys, Rows<Query<T>> queries, float* scores) {
  float products[kTileHeads * kTileKeys];
  const auto load_key = [&](int i, int64_t first, int count) {
    const T* from = keys.data + i * keys.stride + first;
    if constexpr (kRegisters == 32) return load_factor(from, count);
    else return Factor<float>{load(from, count)};
  };
  dots<kTileKeys, kTileHeads, Query<T>>(load_key, queries, d.head_dim, products);
  for (int head = 0; head < kTileHeads; ++head) {
    for (int key = 0; key < kTileKeys; ++key) {
      scores[head * kSplit + key] = products[head * kTileKeys + key];
    }
  }
}

// Replaces the scores of a head by its softmax weights, without the division by their sum.
INLINE void softmax_weights(float* scores, int count, float scale, Partial* result) {
  Vec largest = splat(-kInfinity), total = {};
  for (int i = count; i % kLanes; ++i) scores[i] = largest[0];
  for (int i = 0; i < count; i += kLanes) largest = max(largest, load(scores + i) * scale);
  result->max = max(largest);
  for (int i = 0; i < count; i += kLanes) {
    const Vec weight = exp(load(scores + i) * scale - result->max);
    store(scores + i, weight);
    total += weight;
  }
  result->total = sum(total);
}

// Adds the weighted values of a block to `sums`, for `size` channels from `begin` on, which fill
// kTileVecs vectors.
template <int kTileHeads, int kTileVecs, typename T>
INLINE void add_values(Block<T> block, Block<T> next, int64_t begin, int size, const float* weights,
                       float* sums, int64_t sums_stride) {
  Vec totals[kTileHeads][kTileVecs];
  const auto lanes_of = [&](int i) { return i + 1 < kTileVecs ? kLanes : size - i * kLanes; };
  for (int head = 0; head < kTileHeads; ++head) {
    for (int i = 0; i < kTileVecs; ++i) {
      totals[head][i] = load(sums + head * sums_stride + i * kLanes, lanes_of(i));
    }
  }
  const T* values = block.rows.data + begin;
  for (int key = 0; key < block.count; ++key, values += block.rows.stride) {
    fetch_ahead(block, next, key, begin, size);
    Vec value[kTileVecs];
    for (int i = 0; i < kTileVecs; ++i) value[i] = load(values + i * kLanes, lanes_of(i));
    for (int head = 0; head < kTileHeads; ++head) {
      const Vec weight = splat(weights[head * kSplit + key]);
      for (int i = 0; i < kTileVecs; ++i) {
        totals[head][i] = fma(weight, value[i], totals[head][i]);
      }
    }
  }
  for (int head = 0; head < kTileHeads; ++head) {
    for (int i = 0; i < kTileVecs; ++i) {
      store(sums + head * sums_stride + i * kLanes, totals[head][i], lanes_of(i));
    }
  }
}

// Computes an item for kTileHeads query heads, from `head` on. `after` is the first block of keys
// of the next item.
template <int kTileHeads, typename T>
void attend(const Decode& d, const Item& item, int64_t head, Block<T> after) {
  alignas(64) float scores[kTileHeads * kSplit];
  const T* q = static_cast<const T*>(d.q) + item.sequence * d.q_strides[0] + head * d.q_strides[1];
  const int64_t sums_stride = 2 + d.head_dim;
  float* sums = partial(d, item.sequence, item.split, head)->weighted_values;
  Rows<Query<T>> queries;
  if constexpr (kRegisters == 32) {
    queries = {q, d.q_strides[1]};
  } else {
    // The memory of the weighted values holds the converted queries until all keys have scores.
    queries = {sums, sums_stride};
    for (int i = 0; i < kTileHeads; ++i) {
      for_each_vector(d.head_dim, [&](int64_t first, int count) {
        const Vec channels = load(q + i * d.q_strides[1] + first, count);
        store(sums + i * sums_stride + first, channels, count);
      });
    }
  }
  const Block<T> values = block_at<T>(d, item, d.v_cache, d.v_strides, 0);
  for_each_block<T>(d, item, d.k_cache, d.k_strides, values, [&](Block<T> block, Block<T> next) {
    Rows<T> keys = block.rows;
    float* to = scores + block.first;
    int key = 0;
    for (; key + kKeys <= block.count; key += kKeys, keys.data += kKeys * keys.stride) {
      for (int i = 0; i < kKeys; ++i) fetch_ahead(block, next, key + i, 0, d.head_dim);
      score_keys<kKeys, kTileHeads>(d, keys, queries, to + key);
    }
    for (; key < block.count; ++key, keys.data += keys.stride) {
      for (int i = 0; i < kTileHeads; ++i) {
        const Rows<Query<T>> query = {queries.data + i * queries.stride, queries.stride};
        score_keys<1, 1>(d, keys, query, to + i * kSplit + key);
      }
    }
  });
  for (int i = 0; i < kTileHeads; ++i) {
    softmax_weights(scores + i * kSplit, static_cast<int>(item.span.end - item.span.begin), d.scale,
                    partial(d, item.sequence, item.split, head + i));
    __builtin_memset(sums + i * sums_stride, 0, d.head_dim * sizeof(float));
  }
  for_each_block<T>(d, item, d.v_cache, d.v_strides, after, [&](Block<T> block, Block<T> next) {
    constexpr int kSize = kValueVecs * kLanes;
    const float* weights = scores + block.first;
    int64_t begin = 0;
    for (; begin + kSize <= d.head_dim; begin += kSize) {
      add_values<kTileHeads, kValueVecs>(block, next, begin, kSize, weights, sums + begin,
                                         sums_stride);
    }
    for (; begin < d.head_dim; begin += kLanes) {
      const int64_t left = d.head_dim - begin;
      add_values<kTileHeads, 1>(block, next, begin, left < kLanes ? static_cast<int>(left) : kLanes,
                                weights, sums + begin, sums_stride);
    }
  });
}

template <typename T>
void attend_items(const Decode& d, int64_t begin, int64_t end) {
  const int64_t group = d.num_heads / d.num_kv_heads;
  for (int64_t i = begin; i < end; ++i) {
    const Item item = item_at(d, i);
    if (item.span.begin >= item.span.end) continue;
    const Block<T> after = i + 1 < end
                               ? block_at<T>(d, item_at(d, i + 1), d.k_cache, d.k_strides, 0)
                               : Block<T>{};
    int64_t head = item.kv_head * group;
    const int64_t stop = head + group;
    for (; head + kHeads <= stop; head += kHeads) attend<kHeads, T>(d, item, head, after);
    for (; head < stop; ++head) attend<1, T>(d, item, head, after);
  }
}

template <typename T>
void combine_items(const Decode& d, int64_t begin, int64_t end) {
  for (int64_t item = begin; item < end; ++item) {
    const int64_t head = item % d.num_heads, sequence = item / d.num_heads;
    const Span span = visible(d, sequence);
    const int64_t splits = (span.end - span.begin + kSplit - 1) / kSplit;
    float largest = -kInfinity, total = 0;
    for (int64_t split = 0; split < splits; ++split) {
      const float other = partial(d, sequence, split, head)->max;
      largest = other > largest ? other : largest;
    }
    const auto share = [&](int64_t split) {
      return exp(splat(partial(d, sequence, split, head)->max - largest));
    };
    for (int64_t split = 0; split < splits; ++split) {
      total += share(split)[0] * partial(d, sequence, split, head)->total;
    }
    T* out = static_cast<T*>(d.out) + item * d.head_dim;
    for_each_vector(d.head_dim, [&](int64_t channel, int lanes) {
      Vec result = {};
      for (int64_t split = 0; split < splits; ++split) {
        const float* values = partial(d, sequence, split, head)->weighted_values;
        result = fma(share(split), load(values + channel, lanes), result);
      }
      store(out + channel, splits ? result / total : result, lanes);
    });
  }
}

}  // namespace

void attend_splits(const Decode& d, int64_t begin, int64_t end) {
  with_type(d.dtype, [&](auto number) { attend_items<decltype(number)>(d, begin, end); });
}

void combine_splits(const Decode& d, int64_t begin, int64_t end) {
  with_type(d.dtype, [&](auto number) { combine_items<decltype(number)>(d, begin, end); });
}

}  // namespace kernels::INSTRUCTION_SET
