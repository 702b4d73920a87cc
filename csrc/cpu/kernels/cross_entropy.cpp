// A row of logits is read once for its loss and once more for its gradient. The second read is
// mostly served by the CPU cache.
#include "cross_entropy.h"

#include "vector.h"

namespace kernels::INSTRUCTION_SET {
namespace {

constexpr int kLogits = 512;  // logits per block; as float32 they fit in L1
constexpr float kLargest = 3.4028235e38f;

// Sums over a row of logits. Its log-sum-exp is max + log(exps). The two terms are kept apart,
// because adding a large `max` would round away log(exps).
struct Sums {
  float max, exps;  // exps: sum of exp(logit - max)
  float total;      // sum of the logits
};

INLINE Vec capped(Vec z, float softcap) {
  return softcap > 0 ? softcap * tanh(z / softcap) : z;
}

template <typename T>
Sums sums(const Softmax& s, const T* logits) {
  const float softcap = s.softcap;
  float row_max = -kLargest;
  Vec exps = {}, total = {};  // summed per block first, which reduces the rounding error
  for (int64_t begin = 0; begin < s.vocab; begin += kLogits) {
    const int count = s.vocab - begin < kLogits ? static_cast<int>(s.vocab - begin) : kLogits;
    float block[kLogits];
    Vec block_max = splat(-kInfinity), block_exps = {}, block_total = {};
    for_each_vector(count, [&](int64_t i, int lanes) {
      Vec z = capped(load(logits + begin + i, lanes), softcap);
      block_total += z;  // lanes past the end are 0
      for (int lane = lanes; lane < kLanes; ++lane) z[lane] = -kInfinity;
      block_max = max(block_max, z);
      store(block + i, z);
    });
    if (const float largest = max(block_max); largest > row_max) {
      exps *= exp(splat(row_max - largest));
      row_max = largest;
    }
    for (int i = 0; i < count; i += kLanes) {
      block_exps += exp_below_88<false>(load(block + i) - row_max);
    }
    exps += block_exps;
    total += block_total;
  }
  return {row_max, sum(exps), sum(total)};
}

template <typename T>
void softmax_row(const Softmax& s, T* logits, int64_t target, float* loss) {
  if (target == s.ignore_index) {
    *loss = 0;
    if (s.needs_gradient) __builtin_memset(logits, 0, s.vocab * sizeof(T));
    return;
  }
  const Sums row = sums(s, logits);
  const float log_exps = __builtin_logf(row.exps), lse = row.max + log_exps;
  const float smooth = s.label_smoothing / s.vocab, target_share = 1 - s.label_smoothing;
  const Vec target_logit = load(logits + target, 1);
  *loss = log_exps + target_share * (row.max - capped(target_logit, s.softcap)[0]);
  if (smooth > 0) *loss += s.label_smoothing * (row.max - row.total / s.vocab);  // total may be inf
  *loss += s.z_loss * lse * lse;
  if (!s.needs_gradient) return;

  const float slope = (1 + 2 * s.z_loss * lse) / row.exps;
  // Copies: a store might change s or *s.scale, so they would be read for each vector.
  const float scale = *s.scale, softcap = s.softcap, row_max = row.max;
  const auto gradient = [=](Vec z, float share) {
    Vec cap_slope = splat(scale);
    if (softcap > 0) {
      const Vec t = tanh(z / softcap);
      z = softcap * t;
      cap_slope *= 1.0f - t * t;
    }
    return (exp_below_88<false>(z - row_max) * slope - share) * cap_slope;
  };
  for_each_vector(s.vocab, [&](int64_t i, int lanes) {
    store(logits + i, gradient(load(logits + i, lanes), smooth), lanes);
  });
  store(logits + target, gradient(target_logit, smooth + target_share), 1);
}

template <typename T>
void softmax_rows(const Softmax& s, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    T* logits = static_cast<T*>(s.logits) + row * s.stride;
    softmax_row(s, logits, s.targets[row], s.losses + row);
  }
}

template <typename T>
void accumulate_all(float* sum, const T* x, int64_t size) {
  for_each_vector(size, [&](int64_t i, int lanes) {
    store(sum + i, load(sum + i, lanes) + load(x + i, lanes), lanes);
  });
}

}  // namespace

void softmax(const Softmax& s, int64_t begin, int64_t end) {
  with_type(s.dtype, [&](auto number) { softmax_rows<decltype(number)>(s, begin, end); });
}

void accumulate(float* sum, const void* x, DType dtype, int64_t size) {
  with_type(dtype, [&](auto number) {
    accumulate_all(sum, static_cast<const decltype(number)*>(x), size);
  });
}

}  // namespace kernels::INSTRUCTION_SET
