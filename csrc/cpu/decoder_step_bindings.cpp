// A step of the decoder, of one token a sequence, in one call of the kernels that its operators
// call one by one; see mistral_kernels/ops/decoder_step.py.
#include "../bindings.h"
#include "buffer.h"
#include "run.h"

#include <cmath>
#include <cstring>
#include <optional>
#include <vector>

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// One layer's, in the order of `Decoder.weights` in Python.
struct Weights {
  const OptionalTensor* all;

  static constexpr size_t kCount = 10;
  const Tensor& input_norm() const { return at(0); }
  const Tensor& qkv() const { return at(1); }
  const OptionalTensor& qkv_scales() const { return all[2]; }
  const Tensor& o() const { return at(3); }
  const OptionalTensor& o_scales() const { return all[4]; }
  const Tensor& mlp_norm() const { return at(5); }
  const Tensor& gate_up() const { return at(6); }
  const OptionalTensor& gate_up_scales() const { return all[7]; }
  const Tensor& down() const { return at(8); }
  const OptionalTensor& down_scales() const { return all[9]; }

 private:
  const Tensor& at(int i) const {
    KERNELS_CHECK(all[i].has_value(), "of the weights only scales may be None");
    return *all[i];
  }
};

struct Sizes {
  int64_t rows, hidden, intermediate, heads, kv_heads, head_dim, capacity;
  ScalarType stored;
  DType dtype;

  int64_t q() const { return heads * head_dim; }
  int64_t kv() const { return kv_heads * head_dim; }
  int64_t qkv() const { return q() + 2 * kv(); }
  bool like(const Sizes& other) const {
    return intermediate == other.intermediate && heads == other.heads &&
           kv_heads == other.kv_heads && head_dim == other.head_dim;
  }
};

Sizes sizes_of(const Tensor& token_ids, const Tensor& embedding, const Weights& w,
               const Tensor& k_cache) {
  KERNELS_CHECK(
      embedding.dim() == 2 && k_cache.dim() == 4 && w.o().dim() == 2 && w.down().dim() == 2,
      "weights must have 2 dimensions, caches 4");
  Sizes s{};
  s.rows = token_ids.numel();
  s.hidden = embedding.size(1);
  s.intermediate = w.down().size(1);
  s.capacity = k_cache.size(1);
  s.kv_heads = k_cache.size(2);
  s.head_dim = k_cache.size(3);
  KERNELS_CHECK(
      s.head_dim > 0 && s.head_dim % 8 == 0 && s.kv_heads > 0 && w.o().size(1) % s.kv() == 0,
      "head_dim must be a multiple of 8, and k_cache's heads must divide q's");
  KERNELS_CHECK(k_cache.size(0) == s.rows && s.capacity > 0, "k_cache must hold ", s.rows,
                " sequences");
  s.heads = w.o().size(1) / s.head_dim;
  s.stored = embedding.scalar_type();
  s.dtype = dtype_of("embedding", embedding);
  return s;
}

// What one operator leaves for the next, of a layer and all after it.
struct Between {
  Buffer memory;
  char *embedded, *delta, *residual, *normed, *projected, *turned, *attended, *gates, *activated;

  explicit Between(const Sizes& s)
      : memory(s.rows * size_of(s.dtype) *
               (4 * s.hidden + s.qkv() + 2 * s.q() + 3 * s.intermediate)) {
    const int64_t column = s.rows * size_of(s.dtype);
    embedded = memory.data();
    delta = embedded + column * s.hidden;
    residual = delta + column * s.hidden;
    normed = residual + column * s.hidden;
    projected = normed + column * s.hidden;
    turned = projected + column * s.qkv();
    attended = turned + column * s.q();
    gates = attended + column * s.q();
    activated = gates + column * 2 * s.intermediate;
  }
};

void* matrix(const char* name, const Tensor& x, ScalarType dtype, int64_t rows, int64_t columns) {
  KERNELS_CHECK(x.dim() == 2 && x.size(0) == rows && x.size(1) == columns, name, " must be (", rows,
                ", ", columns, ")");
  return vector_data<void>(name, x, dtype, rows * columns);
}

kernels::Linear product(const char* name, const Sizes& s, const void* x, const Tensor& weight,
                        const OptionalTensor& scales, int64_t outputs, int64_t inputs, void* y) {
  kernels::Linear l{};
  l.x = x;
  l.weight = matrix(name, weight, scales ? ScalarType::Char : s.stored, outputs, inputs);
  if (scales) l.scales = vector_data<float>("scales", *scales, ScalarType::Float, outputs);
  l.y = y;
  l.x_stride = l.weight_stride = l.in_features = inputs;
  l.rows = s.rows;
  l.out_features = outputs;
  l.dtype = s.dtype;
  return l;
}

// Turns q and k of what was projected, and writes k and v into rings: those of no layer yet.
rolling_cache::Update update_of(const Sizes& s, const Between& m, const Tensor& cos,
                                const Tensor& sin, const Tensor& lengths,
                                const Tensor& cu_seqlens) {
  const int64_t element = size_of(s.dtype), head = s.head_dim * element;
  const int64_t token = s.qkv() * element;
  const auto table = [&](const char* name, const Tensor& x) {
    return static_cast<const float*>(
        matrix(name, x, ScalarType::Float, cos.size(0), s.head_dim / 2));
  };
  KERNELS_CHECK(cos.dim() == 2, "cos must be (positions, ", s.head_dim / 2, ")");
  rolling_cache::Update u{};
  u.q = {m.projected, 0, token, head};
  u.k = {m.projected + s.q() * element, 0, token, head};
  u.v = {m.projected + (s.q() + s.kv()) * element, 0, token, head};
  u.q_out = {m.turned, 0, s.q() * element, head};
  u.cos = table("cos", cos);
  u.sin = table("sin", sin);
  u.cos_stride = u.sin_stride = s.head_dim / 2;
  u.lengths = vector_data<int32_t>("lengths", lengths, ScalarType::Int, s.rows);
  u.cu_seqlens = vector_data<int32_t>("cu_seqlens", cu_seqlens, ScalarType::Int, s.rows + 1);
  u.batch = s.rows;
  u.max_seqlen = 1;
  u.num_heads = static_cast<int32_t>(s.heads);
  u.num_kv_heads = static_cast<int32_t>(s.kv_heads);
  u.head_dim = static_cast<int32_t>(s.head_dim);
  u.dtype = s.dtype;
  for (int64_t row = 0; row < s.rows; ++row) {
    KERNELS_CHECK(u.lengths[row] >= 0 && u.lengths[row] < cos.size(0),
                  "lengths must lie in the tables' [0, ", cos.size(0), "), got ", u.lengths[row]);
    KERNELS_CHECK(u.cu_seqlens[row] == row, "cu_seqlens must count from 0 to ", s.rows);
  }
  return u;
}

rolling_cache::Update with_rings(rolling_cache::Update u, const Sizes& s, const Tensor& k_cache,
                                 const Tensor& v_cache) {
  const int64_t head = s.head_dim * size_of(s.dtype), slot = s.kv_heads * head;
  const auto ring = [&](const char* name, const Tensor& x) {
    KERNELS_CHECK(x.dim() == 4 && x.size(1) == s.capacity && x.size(2) == s.kv_heads &&
                      x.size(3) == s.head_dim,
                  "v_cache must have k_cache's shape");
    char* data = vector_data<char>(name, x, s.stored, s.rows * s.capacity * s.kv());
    return rolling_cache::Heads{data, s.capacity * slot, slot, head};
  };
  u.k_cache = ring("k_cache", k_cache);
  u.v_cache = ring("v_cache", v_cache);
  u.capacity = u.page_size = static_cast<uint32_t>(s.capacity);
  return u;
}

// Of the tokens that `u` has turned and written.
kernels::Decode decode_of(const Sizes& s, const rolling_cache::Update& u, int64_t window_left,
                          void* out) {
  kernels::Decode d{};
  d.q = u.q_out.data;
  d.k_cache = u.k_cache.data;
  d.v_cache = u.v_cache.data;
  d.out = out;
  d.q_strides[0] = s.q();
  for (int64_t* strides : {d.k_strides, d.v_strides}) {
    strides[0] = s.capacity * s.kv();
    strides[1] = s.kv();
    strides[2] = s.head_dim;
  }
  d.q_strides[1] = d.head_dim = s.head_dim;
  d.lengths = u.lengths;
  d.new_tokens = 1;
  d.batch = s.rows;
  d.num_heads = s.heads;
  d.num_kv_heads = s.kv_heads;
  d.capacity = d.page_size = s.capacity;
  d.window_left = window_left;
  d.scale = static_cast<float>(1 / std::sqrt(static_cast<double>(s.head_dim)));
  d.dtype = s.dtype;
  return d;
}

// Of x + residual, which goes on as the residual; or of x alone, where that is null.
kernels::RMSNorm norm_of(const char* name, const Sizes& s, const Between& m, const void* x,
                         const void* residual, const Tensor& weight, double eps, void* y) {
  kernels::RMSNorm r{};
  r.x = x;
  r.residual = residual;
  r.weight = vector_data<void>(name, weight, s.stored, s.hidden);
  r.y = y;
  r.h = residual ? m.residual : nullptr;
  r.x_stride = r.residual_stride = r.hidden = s.hidden;
  r.eps = static_cast<float>(eps);
  r.dtype = s.dtype;
  return r;
}

struct Layer {
  kernels::RMSNorm input_norm, mlp_norm;
  kernels::Linear qkv, o, gate_up, down;
  rolling_cache::Update update;
  kernels::Decode attention;
  kernels::SwiGLU swiglu;
};

// The `first` layer begins with what no other has added to.
Layer layer_of(const Sizes& s, const Between& m, bool first, const Weights& w,
               const rolling_cache::Update& update, int64_t window_left, double eps) {
  Layer l{};
  l.input_norm = norm_of("input_norm", s, m, first ? m.embedded : m.delta,
                         first ? nullptr : m.residual, w.input_norm(), eps, m.normed);
  l.qkv = product("qkv", s, m.normed, w.qkv(), w.qkv_scales(), s.qkv(), s.hidden, m.projected);
  l.update = update;
  l.attention = decode_of(s, update, window_left, m.attended);
  l.o = product("o", s, m.attended, w.o(), w.o_scales(), s.hidden, s.q(), m.delta);
  l.mlp_norm = norm_of("mlp_norm", s, m, m.delta, first ? m.embedded : m.residual, w.mlp_norm(),
                       eps, m.normed);
  l.gate_up = product("gate_up", s, m.normed, w.gate_up(), w.gate_up_scales(),
                      2 * s.intermediate, s.hidden, m.gates);
  l.swiglu.gate = m.gates;
  l.swiglu.up = m.gates + s.intermediate * size_of(s.dtype);
  l.swiglu.y = m.activated;
  l.swiglu.cols = s.intermediate;
  l.swiglu.gate_stride = l.swiglu.up_stride = 2 * s.intermediate;
  l.swiglu.dtype = s.dtype;
  l.down = product("down", s, m.activated, w.down(), w.down_scales(), s.hidden, s.intermediate,
                   m.delta);
  return l;
}

// Writes each token's row of the embedding, to memory of our own.
void embed(const Sizes& s, const Between& m, const Tensor& token_ids, const Tensor& embedding) {
  const int64_t vocab = embedding.size(0), row_bytes = s.hidden * size_of(s.dtype);
  const auto* ids = vector_data<int64_t>("token_ids", token_ids, ScalarType::Long, s.rows);
  const auto* data = vector_data<char>("embedding", embedding, s.stored, vocab * s.hidden);
  for (int64_t row = 0; row < s.rows; ++row) {
    KERNELS_CHECK(ids[row] >= 0 && ids[row] < vocab, "token_ids must lie in [0, ", vocab,
                  "), got ", ids[row]);
    std::memcpy(m.embedded + row * row_bytes, data + ids[row] * row_bytes, row_bytes);
  }
}

void decoder_step(const Tensor& token_ids, const Tensor& embedding,
                  const std::vector<OptionalTensor>& weights, const Tensor& norm,
                  const Tensor& head, const OptionalTensor& head_scales, const Tensor& cos,
                  const Tensor& sin, const std::vector<Tensor>& k_caches,
                  const std::vector<Tensor>& v_caches, const Tensor& lengths,
                  const Tensor& cu_seqlens, const std::vector<int64_t>& windows_left, double eps,
                  const Tensor& logits) {
  const size_t count = k_caches.size();
  KERNELS_CHECK(count > 0 && weights.size() == count * Weights::kCount &&
                    v_caches.size() == count && windows_left.size() == count,
                "weights, caches and windows must be those of as many layers");
  const auto weights_of = [&](size_t i) { return Weights{&weights[i * Weights::kCount]}; };
  const Sizes sizes = sizes_of(token_ids, embedding, weights_of(0), k_caches[0]);
  const Between between(sizes);
  embed(sizes, between, token_ids, embedding);
  const auto update = update_of(sizes, between, cos, sin, lengths, cu_seqlens);
  std::vector<Layer> layers;
  for (size_t i = 0; i < count; ++i) {
    const Sizes s = sizes_of(token_ids, embedding, weights_of(i), k_caches[i]);
    KERNELS_CHECK(s.like(sizes), "layers must have one shape");
    layers.push_back(layer_of(s, between, i == 0, weights_of(i),
                              with_rings(update, s, k_caches[i], v_caches[i]), windows_left[i],
                              eps));
  }
  const auto last_norm = norm_of("norm", sizes, between, between.delta, between.residual, norm,
                                 eps, between.normed);
  KERNELS_CHECK(logits.dim() == 2, "logits must be (", sizes.rows, ", vocabulary)");
  const int64_t vocab = logits.size(1);
  const auto last = product("head", sizes, between.normed, head, head_scales, vocab, sizes.hidden,
                            matrix("logits", logits, sizes.stored, sizes.rows, vocab));

  // All has been checked, and no argument was written to before.
  for (const Layer& l : layers) {
    kernels::run(l.input_norm, sizes.rows);
    kernels::run(l.qkv);
    rolling_cache::update(l.update, nullptr);
    kernels::run(l.attention);
    kernels::run(l.o);
    kernels::run(l.mlp_norm, sizes.rows);
    kernels::run(l.gate_up);
    kernels::run(l.swiglu, sizes.rows * sizes.intermediate);
    kernels::run(l.down);
  }
  kernels::run(last_norm, sizes.rows);
  kernels::run(last);
  auto* const counted = static_cast<int32_t*>(lengths.data_ptr());
  for (int64_t row = 0; row < sizes.rows; ++row) ++counted[row];
}

}  // namespace

LIBRARY_FRAGMENT(KERNELS_NAMESPACE, m) {
  m.def(
      "decoder_step(Tensor token_ids, Tensor embedding, Tensor?[] weights, Tensor norm, "
      "Tensor head, Tensor? head_scales, Tensor cos, Tensor sin, Tensor(a!)[] k_caches, "
      "Tensor(b!)[] v_caches, Tensor(c!) lengths, Tensor cu_seqlens, int[] windows_left, "
      "float eps, Tensor(d!) logits) -> ()");
}

LIBRARY_IMPL(KERNELS_NAMESPACE, CPU, m) { m.impl("decoder_step", TORCH_BOX(&decoder_step)); }
