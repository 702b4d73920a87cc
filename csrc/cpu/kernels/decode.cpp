// The query heads of a kv head read its keys and values together, once. Keys are taken in splits of
// a fixed number, whose results are combined in order: nothing depends on threads or batch-mates.
#include "decode.h"

#include "dots.h"

namespace kernels::INSTRUCTION_SET {
namespace {

// Of a tile, so that its sums and factors stay in registers.
constexpr int kHeads = 4, kKeys = kRegisters == 32 ? 4 : 2, kVecs = kRegisters == 32 ? 4 : 2;
constexpr int kAhead = 64;  // keys to the one fetched into the second of caches

// Of a head and a split: softmax is weights / total, weights being exp(score - max).
struct Partial {
  float max, total, weighted_values[];
};

INLINE Partial* partial(const Decode& d, int64_t sequence, int64_t split, int64_t head) {
  const int64_t index = (sequence * d.splits + split) * d.num_heads + head;
  return reinterpret_cast<Partial*>(d.partials + index * (2 + d.head_dim));
}

// body(first, count, slot) for positions whose slots follow one another; `first` counts from 0.
template <typename Body>
INLINE void for_each_run(const Decode& d, int64_t sequence, Span span, Body body) {
  for (int64_t position = span.begin; position < span.end;) {
    const int64_t slot = position % d.capacity, in_page = slot % d.page_size;
    int64_t count = d.page_size - in_page;
    if (count > span.end - position) count = span.end - position;
    int64_t outer = d.rows ? d.rows[sequence] : sequence;
    if (d.block_table) outer = d.block_table[sequence * d.max_pages + slot / d.page_size];
    body(static_cast<int>(position - span.begin), static_cast<int>(count), outer, in_page);
    position += count;
  }
}

template <int kTileKeys, int kTileHeads, typename T>
INLINE void score_keys(const Decode& d, Rows<T> keys, Rows<T> queries, float* scores) {
  float products[kTileHeads * kTileKeys];
  const Ahead ahead{kAhead * keys.stride, 0, kTileKeys};
  dots<kTileKeys, kTileHeads, T>(keys, queries, d.head_dim, ahead, products);
  for (int head = 0; head < kTileHeads; ++head) {
    for (int key = 0; key < kTileKeys; ++key) {
      scores[head * kSplit + key] = products[head * kTileKeys + key] * d.scale;
    }
  }
}

// The scores of a head become weights.
INLINE void weigh(float* scores, int count, Partial* result) {
  Vec largest = splat(-__builtin_inff()), total = {};
  for (int i = count; i % kLanes; ++i) scores[i] = largest[0];
  for (int i = 0; i < count; i += kLanes) largest = max(largest, load(scores + i));
  result->max = max(largest);
  for (int i = 0; i < count; i += kLanes) {
    const Vec weight = exp(load(scores + i) - result->max);
    store(scores + i, weight);
    total += weight;
  }
  result->total = sum(total);
}

// Adds what `count` values weigh, in kTileVecs vectors of channels, the last of `lanes`.
template <int kTileHeads, int kTileVecs, typename T>
INLINE void add_values(Rows<T> values, int count, const float* weights, float* sums,
                       int64_t sums_stride, int lanes) {
  Vec totals[kTileHeads][kTileVecs];
  const auto lanes_of = [&](int i) { return i + 1 < kTileVecs ? kLanes : lanes; };
  for (int head = 0; head < kTileHeads; ++head) {
    for (int i = 0; i < kTileVecs; ++i) {
      totals[head][i] = load(sums + head * sums_stride + i * kLanes, lanes_of(i));
    }
  }
  for (int key = 0; key < count; ++key, values.data += values.stride) {
    Vec value[kTileVecs];
    for (int i = 0; i < kTileVecs; ++i) {
      value[i] = load(values.data + i * kLanes, lanes_of(i));
      __builtin_prefetch(values.data + i * kLanes + kAhead * values.stride, 0, 2);
    }
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

// One split of a sequence's keys, for query heads from `head` on, all of one kv head.
template <int kTileHeads, typename T>
void attend(const Decode& d, int64_t sequence, int64_t split, int64_t head) {
  const int64_t kv_head = head / (d.num_heads / d.num_kv_heads);
  Span span = visible(d, sequence);
  span.begin += split * kSplit;
  if (span.end > span.begin + kSplit) span.end = span.begin + kSplit;
  alignas(64) float scores[kTileHeads * kSplit];
  const Rows<T> queries = {
      static_cast<const T*>(d.q) + sequence * d.q_strides[0] + head * d.q_strides[1],
      d.q_strides[1]};
  for_each_run(d, sequence, span, [&](int first, int count, int64_t outer, int64_t slot) {
    const int64_t* strides = d.k_strides;
    Rows<T> keys = {static_cast<const T*>(d.k_cache) + outer * strides[0] + slot * strides[1] +
                        kv_head * strides[2],
                    strides[1]};
    int key = 0;
    for (; key + kKeys <= count; key += kKeys, keys.data += kKeys * keys.stride) {
      score_keys<kKeys, kTileHeads>(d, keys, queries, scores + first + key);
    }
    for (; key < count; ++key, keys.data += keys.stride) {
      for (int i = 0; i < kTileHeads; ++i) {
        const Rows<T> query = {queries.data + i * queries.stride, queries.stride};
        score_keys<1, 1>(d, keys, query, scores + i * kSplit + first + key);
      }
    }
  });
  const int64_t sums_stride = 2 + d.head_dim;
  Partial* results = partial(d, sequence, split, head);
  float* sums = results->weighted_values;
  for (int i = 0; i < kTileHeads; ++i) {
    weigh(scores + i * kSplit, static_cast<int>(span.end - span.begin),
          partial(d, sequence, split, head + i));
    __builtin_memset(sums + i * sums_stride, 0, d.head_dim * sizeof(float));
  }
  for_each_run(d, sequence, span, [&](int first, int count, int64_t outer, int64_t slot) {
    const int64_t* strides = d.v_strides;
    const T* values = static_cast<const T*>(d.v_cache) + outer * strides[0] + slot * strides[1] +
                      kv_head * strides[2];
    const float* weights = scores + first;
    int64_t channel = 0;
    for (; channel + kVecs * kLanes <= d.head_dim; channel += kVecs * kLanes) {
      add_values<kTileHeads, kVecs, T>({values + channel, strides[1]}, count, weights,
                                       sums + channel, sums_stride, kLanes);
    }
    for (; channel < d.head_dim; channel += kLanes) {
      const int64_t left = d.head_dim - channel;
      add_values<kTileHeads, 1, T>({values + channel, strides[1]}, count, weights, sums + channel,
                                   sums_stride, left < kLanes ? static_cast<int>(left) : kLanes);
    }
  });
}

template <typename T>
void attend_items(const Decode& d, int64_t begin, int64_t end) {
  const int64_t group = d.num_heads / d.num_kv_heads;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t kv_head = item % d.num_kv_heads, split = item / d.num_kv_heads % d.splits;
    const int64_t sequence = item / d.num_kv_heads / d.splits;
    const Span span = visible(d, sequence);
    if (span.begin + split * kSplit >= span.end) continue;
    int64_t head = kv_head * group;
    const int64_t stop = head + group;
    for (; head + kHeads <= stop; head += kHeads) attend<kHeads, T>(d, sequence, split, head);
    for (; head < stop; ++head) attend<1, T>(d, sequence, split, head);
  }
}

template <typename T>
void combine_items(const Decode& d, int64_t begin, int64_t end) {
  for (int64_t item = begin; item < end; ++item) {
    const int64_t head = item % d.num_heads, sequence = item / d.num_heads;
    const Span span = visible(d, sequence);
    const int64_t splits = (span.end - span.begin + kSplit - 1) / kSplit;
    float largest = -__builtin_inff(), total = 0;
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
  switch (d.dtype) {
    case DType::float32: return attend_items<float>(d, begin, end);
    case DType::float16: return attend_items<Half>(d, begin, end);
    case DType::bfloat16: return attend_items<BFloat16>(d, begin, end);
  }
}

void combine_splits(const Decode& d, int64_t begin, int64_t end) {
  switch (d.dtype) {
    case DType::float32: return combine_items<float>(d, begin, end);
    case DType::float16: return combine_items<Half>(d, begin, end);
    case DType::bfloat16: return combine_items<BFloat16>(d, begin, end);
  }
}

}  // namespace kernels::INSTRUCTION_SET
