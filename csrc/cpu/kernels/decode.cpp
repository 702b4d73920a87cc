// All query heads of a kv head share one read of its keys and values. The keys of a sequence are
// divided into splits of a fixed size, whose results are combined in order. Results therefore do
// not depend on the number of threads or on the other sequences of the batch.
#include "decode.h"

#include "dots.h"

#include <type_traits>

namespace kernels::INSTRUCTION_SET {
namespace {

// Tile sizes, chosen so that accumulators and factors stay in registers.
constexpr int kHeads = 4, kKeys = kRegisters == 32 ? 4 : 3, kValueVecs = kRegisters == 32 ? 4 : 2;

// Keys per block, at most. While a block is processed, the next one is prefetched. With 16
// registers, a block holds several kv heads, and blocks of 12 are slower on Zen 2: by 5 % in bf16,
// 15 % in float32.
constexpr int kKeysOfBlock = kRegisters == 32 ? 64 : 6;
constexpr int kKeysAhead = kRegisters == 32 ? 12 : 0;  // distance of a second prefetch, or 0

// Query heads per job, at most. With several kv heads per job, a core reads consecutive memory, and
// a block of keys or values fits into L1. With 32 registers, a job has one tile of heads.
constexpr int kHeadsOfJob = kRegisters == 32 ? kHeads : 32;

// A number as a type.
template <int kNumber>
struct Count {
  static constexpr int kCount = kNumber;
};

// The result of a split for one query head. Weights are exp(score - max); `total` is their sum.
struct Partial {
  float max, total;
  alignas(64) float weighted_values[];
};

INLINE Partial* partial(const Decode& d, int64_t sequence, int64_t split, int64_t head) {
  const int64_t index = (sequence * d.splits + split) * d.num_heads + head;
  return reinterpret_cast<Partial*>(d.partials + index * partial_size(d.head_dim));
}

// One split of the keys of a sequence, for the query heads [head, head_end).
struct Job {
  int64_t sequence, split, head, head_end;
  Span span;
};

// Returns the first job of items [item, end) that begins with this query head of its group.
INLINE Job job_at(const Decode& d, int64_t item, int64_t end, int64_t head_of_group) {
  const int64_t group = d.num_heads / d.num_kv_heads, kv_head = item % d.num_kv_heads;
  const int64_t split = item / d.num_kv_heads % d.splits;
  const int64_t sequence = item / d.num_kv_heads / d.splits;
  Span span = visible(d, sequence);
  span.begin += split * kSplit;
  if (span.end > span.begin + kSplit) span.end = span.begin + kSplit;
  int64_t heads = group - head_of_group;
  if (heads > kHeadsOfJob) {
    heads = kHeadsOfJob;
  } else if (kRegisters < 32 && head_of_group == 0) {
    int64_t kv_heads = kHeadsOfJob / group;
    if (kv_heads > d.num_kv_heads - kv_head) kv_heads = d.num_kv_heads - kv_head;
    if (kv_heads > end - item) kv_heads = end - item;
    heads = kv_heads * group;
  }
  const int64_t head = kv_head * group + head_of_group;
  return {sequence, split, head, head + heads, span};
}

// Keys or values in consecutive slots.
template <typename T>
struct Block {
  Rows<T> rows;
  int first, count;  // keys [first, first + count) of the job

  // Prefetches part of a row into L2. In L1 it would be evicted before it is used.
  INLINE void fetch(int row, int64_t begin, int64_t size) const {
    if (row >= count) return;
    const char* from = reinterpret_cast<const char*>(rows.data + row * rows.stride + begin);
    for (int64_t i = 0; i < size * static_cast<int64_t>(sizeof(T)); i += 64) {
      __builtin_prefetch(from + i, 0, 2);
    }
  }
};

// Returns the block that begins at key `first`, for the kv head of the job's first head.
template <typename T>
INLINE Block<T> block_at(const Decode& d, const Job& job, const void* cache, const int64_t* strides,
                         int64_t first) {
  const int64_t position = job.span.begin + first;
  if (position >= job.span.end) return {};
  const int64_t slot = position % d.capacity, in_page = slot % d.page_size;
  int64_t count = d.page_size - in_page;
  if (count > job.span.end - position) count = job.span.end - position;
  if (count > kKeysOfBlock) count = kKeysOfBlock;
  int64_t outer = d.rows ? d.rows[job.sequence] : job.sequence;
  if (d.block_table) outer = d.block_table[job.sequence * d.max_pages + slot / d.page_size];
  const int64_t kv_head = job.head / (d.num_heads / d.num_kv_heads);
  const T* data = static_cast<const T*>(cache) + outer * strides[0] + in_page * strides[1] +
                  kv_head * strides[2];
  return {{data, strides[1]}, static_cast<int>(first), static_cast<int>(count)};
}

// While `key` of `block` is processed, prefetches the same key of the next block. In long blocks,
// it also prefetches the key kKeysAhead keys ahead: the processor may have dropped earlier
// prefetches.
template <typename T>
INLINE void fetch_ahead(Block<T> block, Block<T> next, int key, int64_t begin, int64_t size) {
  next.fetch(key, begin, size);
  if (kKeysAhead) block.fetch(key + kKeysAhead, begin, size);
}

// Calls body(heads, head, block, next) for each block of a job and each tile of the job's heads.
// `heads` is the number of heads as a type, and `head` the first one. `next` is the block to
// prefetch: the following block of the job, or `after` for the last block.
template <typename T, typename Body>
INLINE void for_each_tile(const Decode& d, const Job& job, const void* cache,
                          const int64_t* strides, Block<T> after, Body body) {
  const int64_t group = d.num_heads / d.num_kv_heads;
  Block<T> block = block_at<T>(d, job, cache, strides, 0);
  while (block.count > 0) {
    const Block<T> following = block_at<T>(d, job, cache, strides, block.first + block.count);
    Block<T> tile = block, next = following.count > 0 ? following : after;
    int64_t head = job.head, end = head - head % group;
    while (head < job.head_end) {
      end += group;
      if (end > job.head_end) end = job.head_end;
      for (; head + kHeads <= end; head += kHeads) body(Count<kHeads>{}, head, tile, next);
      for (; head < end; ++head) body(Count<1>{}, head, tile, next);
      tile.rows.data += strides[2];
      next.rows.data += strides[2];
    }
    block = following;
  }
}

// The type of queries in the dot products. With 16 registers, keys and queries are multiplied as
// float32, and queries are converted once per job.
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

// `after` is the first block of keys of the next job.
template <typename T>
void attend(const Decode& d, const Job& job, Block<T> after) {
  alignas(64) float scores[kHeadsOfJob * kSplit];
  const auto scores_of = [&](int64_t head) { return scores + (head - job.head) * kSplit; };
  const auto partial_of = [&](int64_t head) { return partial(d, job.sequence, job.split, head); };
  const int64_t sums_stride = partial_size(d.head_dim);
  const T* q = static_cast<const T*>(d.q) + job.sequence * d.q_strides[0];
  const auto queries_of = [&](int64_t head) -> Rows<Query<T>> {
    if constexpr (kRegisters == 32) return {q + head * d.q_strides[1], d.q_strides[1]};
    // The memory of the weighted values holds the converted queries until all keys have scores.
    else return {partial_of(head)->weighted_values, sums_stride};
  };
  if constexpr (kRegisters < 32) {
    for (int64_t head = job.head; head < job.head_end; ++head) {
      for_each_vector(d.head_dim, [&](int64_t first, int count) {
        const Vec channels = load(q + head * d.q_strides[1] + first, count);
        store(partial_of(head)->weighted_values + first, channels, count);
      });
    }
  }
  const Block<T> values = block_at<T>(d, job, d.v_cache, d.v_strides, 0);
  for_each_tile<T>(
      d, job, d.k_cache, d.k_strides, values,
      [&](auto heads, int64_t head, Block<T> block, Block<T> next) {
        constexpr int kTileHeads = decltype(heads)::kCount;
        const Rows<Query<T>> queries = queries_of(head);
        Rows<T> keys = block.rows;
        float* to = scores_of(head) + block.first;
        int key = 0;
        for (; key + kKeys <= block.count; key += kKeys, keys.data += kKeys * keys.stride) {
          for (int i = 0; i < kKeys; ++i) fetch_ahead(block, next, key + i, 0, d.head_dim);
          score_keys<kKeys, kTileHeads>(d, keys, queries, to + key);
        }
        for (; key < block.count; ++key, keys.data += keys.stride) {
          score_keys<1, kTileHeads>(d, keys, queries, to + key);
        }
      });
  for (int64_t head = job.head; head < job.head_end; ++head) {
    softmax_weights(scores_of(head), static_cast<int>(job.span.end - job.span.begin), d.scale,
                    partial_of(head));
    __builtin_memset(partial_of(head)->weighted_values, 0, d.head_dim * sizeof(float));
  }
  for_each_tile<T>(
      d, job, d.v_cache, d.v_strides, after,
      [&](auto heads, int64_t head, Block<T> block, Block<T> next) {
        constexpr int kTileHeads = decltype(heads)::kCount, kSize = kValueVecs * kLanes;
        const float* weights = scores_of(head) + block.first;
        float* sums = partial_of(head)->weighted_values;
        int64_t begin = 0;
        for (; begin + kSize <= d.head_dim; begin += kSize) {
          add_values<kTileHeads, kValueVecs>(block, next, begin, kSize, weights, sums + begin,
                                             sums_stride);
        }
        for (; begin < d.head_dim; begin += kLanes) {
          const int64_t left = d.head_dim - begin;
          add_values<kTileHeads, 1>(block, next, begin,
                                    left < kLanes ? static_cast<int>(left) : kLanes, weights,
                                    sums + begin, sums_stride);
        }
      });
}

template <typename T>
void attend_items(const Decode& d, int64_t begin, int64_t end) {
  const int64_t group = d.num_heads / d.num_kv_heads;
  const int64_t first = begin * group, stop = end * group;
  for (int64_t i = first; i < stop;) {
    const Job job = job_at(d, i / group, end, i % group);
    i += job.head_end - job.head;
    if (job.span.begin >= job.span.end) continue;
    Block<T> after = {};
    if (i < stop) {
      after = block_at<T>(d, job_at(d, i / group, end, i % group), d.k_cache, d.k_strides, 0);
    }
    attend<T>(d, job, after);
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
