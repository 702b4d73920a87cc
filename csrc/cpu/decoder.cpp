// A decode step of the whole model in one call, with one new token per sequence. It runs the same
// kernels in the same order as the model's operators. See `CpuEngine` in
// mistral_kernels/model/engine.py.
#include "buffer.h"
#include "operator.h"
#include "run.h"

#include <cmath>
#include <cstring>
#include <memory>
#include <mutex>
#include <numeric>
#include <optional>
#include <unordered_map>
#include <utility>
#include <vector>

namespace {

using kernels::dtype_of;
using kernels::is_on_cpu;
using kernels::OptionalTensor;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

const char* name_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Double: return "float64";
    case ScalarType::Float: return "float32";
    case ScalarType::Half: return "float16";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Char: return "int8";
    case ScalarType::Int: return "int32";
    case ScalarType::Long: return "int64";
    default: return "another dtype";
  }
}

// Returns the data of x, which must be contiguous and have this dtype and number of elements.
template <typename T>
T* vector_data(const char* name, const Tensor& x, ScalarType dtype, int64_t size) {
  KERNELS_CHECK(x.is_cpu(), name, " must be on the CPU");
  KERNELS_CHECK(x.scalar_type() == dtype, name, " must be ", name_of(dtype), ", got ",
                name_of(x.scalar_type()));
  KERNELS_CHECK(x.is_contiguous(), name, " must be contiguous");
  KERNELS_CHECK(x.numel() == size, name, " must have ", size, " elements, got ", x.numel());
  return static_cast<T*>(x.data_ptr());
}

DType checked_dtype(const char* name, const Tensor& x) {
  const auto dtype = dtype_of(x);
  KERNELS_CHECK(dtype.has_value(), name, " must be float32, float16 or bfloat16, got ",
                name_of(x.scalar_type()));
  return *dtype;
}

void check_heads(int64_t heads, int64_t kv_heads) {
  KERNELS_CHECK(kv_heads > 0 && heads > 0 && heads <= INT32_MAX && heads % kv_heads == 0,
                "the number of query heads must be a positive multiple of that of kv heads, got ",
                heads, " and ", kv_heads);
}

struct Sizes {
  int64_t vocab, hidden, intermediate, heads, kv_heads, head_dim;
  ScalarType stored;
  DType dtype;

  int64_t q() const { return heads * head_dim; }
  int64_t kv() const { return kv_heads * head_dim; }
  int64_t qkv() const { return q() + 2 * kv(); }
};

struct Layer {
  const void *input_norm, *mlp_norm;
  kernels::Linear qkv, o, gate_up, down;  // x, y and rows are set per step
  int64_t window_left;
};

// The checked weights of a model. `owned` keeps their memory alive.
struct Decoder {
  std::vector<OptionalTensor> owned;
  Sizes sizes;
  float eps;
  const char* embedding;
  std::vector<Layer> layers;
  const void* norm;
  kernels::Linear head;
};

// All decoders between make_decoder and drop_decoder, by number.
class Decoders {
 public:
  static Decoders& all() {
    // Never destroyed: freeing the tensors at exit needs Python, which may be finalized by then.
    static auto& all = *new Decoders;
    return all;
  }

  int64_t add(Decoder decoder) {
    const std::lock_guard lock(mutex_);
    by_number_[++last_] = std::make_shared<const Decoder>(std::move(decoder));
    return last_;
  }

  std::shared_ptr<const Decoder> at(int64_t number) {
    const std::lock_guard lock(mutex_);
    const auto found = by_number_.find(number);
    KERNELS_CHECK(found != by_number_.end(),
                  "decoder must be the number of an existing decoder, got ", number);
    return found->second;
  }

  void drop(int64_t number) {
    std::shared_ptr<const Decoder> dropped;  // freed after unlocking, because freeing is slow
    const std::lock_guard lock(mutex_);
    const auto found = by_number_.find(number);
    if (found == by_number_.end()) return;
    dropped = std::move(found->second);
    by_number_.erase(found);
  }

 private:
  std::mutex mutex_;
  std::unordered_map<int64_t, std::shared_ptr<const Decoder>> by_number_;
  int64_t last_ = 0;
};

void* matrix(const char* name, const Tensor& x, ScalarType dtype, int64_t rows, int64_t columns) {
  KERNELS_CHECK(x.dim() == 2 && x.size(0) == rows && x.size(1) == columns, name, " must be (", rows,
                ", ", columns, ")");
  return vector_data<void>(name, x, dtype, rows * columns);
}

kernels::Linear product(const char* name, const Sizes& s, const Tensor& weight,
                        const OptionalTensor& scales, int64_t outputs, int64_t inputs) {
  kernels::Linear l{};
  l.weight = matrix(name, weight, scales ? ScalarType::Char : s.stored, outputs, inputs);
  if (scales) l.scales = vector_data<float>("scales", *scales, ScalarType::Float, outputs);
  l.x_stride = l.weight_stride = l.in_features = inputs;
  l.out_features = outputs;
  l.dtype = s.dtype;
  return l;
}

// Entries of `weights` per layer; `decoder_arguments` in mistral_kernels/model/engine.py has their
// order.
constexpr size_t kLayerWeights = 10;

const Tensor& weight_at(const OptionalTensor* weights, int i) {
  KERNELS_CHECK(weights[i].has_value(), "weights must be tensors, got None at index ", i,
                " of a layer; only scales may be None");
  return *weights[i];
}

Sizes sizes_of(const Tensor& embedding, const OptionalTensor* weights, int64_t head_dim) {
  const Tensor &qkv = weight_at(weights, 1), &o = weight_at(weights, 3);
  const Tensor& down = weight_at(weights, 8);
  KERNELS_CHECK(embedding.dim() == 2 && qkv.dim() == 2 && o.dim() == 2 && down.dim() == 2,
                "weight matrices must have 2 dimensions");
  KERNELS_CHECK(head_dim > 0 && head_dim % 8 == 0,
                "head_dim must be a positive multiple of 8, got ", head_dim);
  Sizes s{};
  s.vocab = embedding.size(0);
  s.hidden = embedding.size(1);
  s.intermediate = down.size(1);
  s.heads = o.size(1) / head_dim;
  s.kv_heads = (qkv.size(0) / head_dim - s.heads) / 2;
  s.head_dim = head_dim;
  check_heads(s.heads, s.kv_heads);
  s.stored = embedding.scalar_type();
  s.dtype = checked_dtype("embedding", embedding);
  return s;
}

Layer layer_of(const Sizes& s, const OptionalTensor* weights, int64_t window_left) {
  const auto at = [&](int i) -> const Tensor& { return weight_at(weights, i); };
  Layer l{};
  l.input_norm = vector_data<void>("input_norm", at(0), s.stored, s.hidden);
  l.qkv = product("qkv", s, at(1), weights[2], s.qkv(), s.hidden);
  l.o = product("o", s, at(3), weights[4], s.hidden, s.q());
  l.mlp_norm = vector_data<void>("mlp_norm", at(5), s.stored, s.hidden);
  l.gate_up = product("gate_up", s, at(6), weights[7], 2 * s.intermediate, s.hidden);
  l.down = product("down", s, at(8), weights[9], s.hidden, s.intermediate);
  l.window_left = window_left;
  return l;
}

int64_t make_decoder(const Tensor& embedding, const std::vector<OptionalTensor>& weights,
                     const Tensor& norm, const Tensor& head, const OptionalTensor& head_scales,
                     const std::vector<int64_t>& windows_left, int64_t head_dim, double eps) {
  const size_t count = windows_left.size();
  KERNELS_CHECK(count > 0 && weights.size() == count * kLayerWeights, "weights must have ",
                kLayerWeights, " entries per entry of windows_left, at least one, got ",
                weights.size(), " and ", count);
  Decoder d{};
  d.owned = weights;
  d.owned.insert(d.owned.end(), {embedding, norm, head, head_scales});
  const Sizes s = d.sizes = sizes_of(embedding, weights.data(), head_dim);
  d.eps = static_cast<float>(eps);
  d.embedding = vector_data<char>("embedding", embedding, s.stored, s.vocab * s.hidden);
  for (size_t i = 0; i < count; ++i) {
    d.layers.push_back(layer_of(s, &weights[i * kLayerWeights], windows_left[i]));
  }
  d.norm = vector_data<void>("norm", norm, s.stored, s.hidden);
  d.head = product("head", s, head, head_scales, s.vocab, s.hidden);
  return Decoders::all().add(std::move(d));
}

void drop_decoder(int64_t decoder) { Decoders::all().drop(decoder); }

// The intermediate results of a step, in one allocation.
struct Activations {
  Buffer memory;
  char *embedded, *delta, *residual, *normed, *projected, *rotated, *attended, *gates, *activated;

  Activations(const Sizes& s, int64_t rows)
      : memory(rows * size_of(s.dtype) *
               (4 * s.hidden + s.qkv() + 2 * s.q() + 3 * s.intermediate)) {
    const int64_t column = rows * size_of(s.dtype);
    embedded = memory.data();
    delta = embedded + column * s.hidden;
    residual = delta + column * s.hidden;
    normed = residual + column * s.hidden;
    projected = normed + column * s.hidden;
    rotated = projected + column * s.qkv();
    attended = rotated + column * s.q();
    gates = attended + column * s.q();
    activated = gates + column * 2 * s.intermediate;
  }
};

// One decode step of the sequences of a cache.
class Step {
 public:
  Step(const Decoder& decoder, int64_t rows)
      : d_(decoder), s_(decoder.sizes), rows_(rows), m_(s_, rows), cu_seqlens_(rows + 1) {
    std::iota(cu_seqlens_.begin(), cu_seqlens_.end(), 0);
  }

  // Copies the embedding row of each token.
  void embed(const Tensor& token_ids) {
    const auto* ids = vector_data<int64_t>("token_ids", token_ids, ScalarType::Long, rows_);
    const int64_t row_bytes = s_.hidden * size_of(s_.dtype);
    for (int64_t row = 0; row < rows_; ++row) {
      KERNELS_CHECK(ids[row] >= 0 && ids[row] < s_.vocab, "token_ids must be in [0, ", s_.vocab,
                    "), got ", ids[row]);
      std::memcpy(m_.embedded + row * row_bytes, d_.embedding + ids[row] * row_bytes, row_bytes);
    }
  }

  // Sets the caches that k and v are appended to, and the rotation tables.
  void set_caches(const Tensor& cos, const Tensor& sin, const Tensor& lengths,
                  const std::vector<Tensor>& k_caches, const std::vector<Tensor>& v_caches) {
    KERNELS_CHECK(k_caches.size() == d_.layers.size() && v_caches.size() == d_.layers.size(),
                  "k_caches and v_caches must have one cache for each of ", d_.layers.size(),
                  " layers, got ", k_caches.size(), " and ", v_caches.size());
    const auto update = update_of(cos, sin, lengths);
    for (size_t i = 0; i < k_caches.size(); ++i) {
      updates_.push_back(with_rings(update, k_caches[i], v_caches[i]));
    }
  }

  void run(const Tensor& logits) const {
    void* const out = matrix("logits", logits, s_.stored, rows_, s_.vocab);
    // All arguments are checked at this point; none has been written.
    const void *x = m_.embedded, *residual = nullptr;
    for (size_t i = 0; i < d_.layers.size(); ++i) {
      const Layer& l = d_.layers[i];
      normalize(x, residual, l.input_norm);
      multiply(l.qkv, m_.normed, m_.projected);
      kernels::update(updates_[i], nullptr);
      attend(updates_[i], l.window_left);
      multiply(l.o, m_.attended, m_.delta);
      normalize(m_.delta, residual ? residual : x, l.mlp_norm);
      multiply(l.gate_up, m_.normed, m_.gates);
      activate();
      multiply(l.down, m_.activated, m_.delta);
      x = m_.delta;
      residual = m_.residual;
    }
    normalize(x, residual, d_.norm);
    multiply(d_.head, m_.normed, out);
  }

 private:
  kernels::Update update_of(const Tensor& cos, const Tensor& sin, const Tensor& lengths) const {
    const int64_t element = size_of(s_.dtype), head = s_.head_dim, token = s_.qkv();
    KERNELS_CHECK(cos.dim() == 2, "cos must be (positions, ", s_.head_dim / 2, ")");
    const auto table = [&](const char* name, const Tensor& x) {
      return static_cast<const float*>(
          matrix(name, x, ScalarType::Float, cos.size(0), s_.head_dim / 2));
    };
    kernels::Update u{};
    u.q = {m_.projected, 0, token, head};
    u.k = {m_.projected + s_.q() * element, 0, token, head};
    u.v = {m_.projected + (s_.q() + s_.kv()) * element, 0, token, head};
    u.q_out = {m_.rotated, 0, s_.q(), head};
    u.cos = table("cos", cos);
    u.sin = table("sin", sin);
    u.cos_stride = u.sin_stride = s_.head_dim / 2;
    u.lengths = vector_data<int32_t>("lengths", lengths, ScalarType::Int, rows_);
    u.cu_seqlens = cu_seqlens_.data();
    u.batch = rows_;
    u.max_seqlen = 1;
    u.num_heads = static_cast<int32_t>(s_.heads);
    u.num_kv_heads = static_cast<int32_t>(s_.kv_heads);
    u.head_dim = static_cast<int32_t>(s_.head_dim);
    u.dtype = s_.dtype;
    for (int64_t row = 0; row < rows_; ++row) {
      KERNELS_CHECK(u.lengths[row] >= 0 && u.lengths[row] < cos.size(0), "lengths must be in [0, ",
                    cos.size(0), "), got ", u.lengths[row]);
    }
    return u;
  }

  kernels::Update with_rings(kernels::Update u, const Tensor& k_cache,
                             const Tensor& v_cache) const {
    const int64_t head = s_.head_dim, slot = s_.kv_heads * head;
    const int64_t capacity = k_cache.dim() == 4 ? k_cache.size(1) : 0;
    const auto ring = [&](const char* name, const Tensor& x) {
      KERNELS_CHECK(x.dim() == 4 && x.size(0) == rows_ && x.size(1) == capacity && capacity > 0 &&
                        x.size(2) == s_.kv_heads && x.size(3) == s_.head_dim,
                    name, " must be (", rows_, ", capacity, ", s_.kv_heads, ", ", s_.head_dim,
                    "), with the same capacity for k_cache and v_cache");
      void* data = vector_data<void>(name, x, s_.stored, rows_ * capacity * s_.kv());
      return Heads{data, capacity * slot, slot, head};
    };
    u.k_cache = ring("k_cache", k_cache);
    u.v_cache = ring("v_cache", v_cache);
    u.capacity = u.page_size = static_cast<uint32_t>(capacity);
    return u;
  }

  // Writes the norm of x to m_.normed. If `residual` is given, writes x + residual to m_.residual
  // and the norm of that sum to m_.normed.
  void normalize(const void* x, const void* residual, const void* weight) const {
    kernels::RMSNorm r{};
    r.x = x;
    r.residual = residual;
    r.weight = weight;
    r.y = m_.normed;
    r.h = residual ? m_.residual : nullptr;
    r.x_stride = r.residual_stride = r.hidden = s_.hidden;
    r.eps = d_.eps;
    r.dtype = s_.dtype;
    kernels::run(r, rows_);
  }

  void multiply(kernels::Linear l, const void* x, void* y) const {
    l.x = x;
    l.y = y;
    l.rows = rows_;
    kernels::run(l);
  }

  // Attends with the tokens that the update `u` has rotated and appended.
  void attend(const kernels::Update& u, int64_t window_left) const {
    kernels::Decode d{};
    d.q = u.q_out.data;
    d.k_cache = u.k_cache.data;
    d.v_cache = u.v_cache.data;
    d.out = m_.attended;
    d.q_strides[0] = s_.q();
    for (int64_t* strides : {d.k_strides, d.v_strides}) {
      strides[0] = u.capacity * s_.kv();
      strides[1] = s_.kv();
      strides[2] = s_.head_dim;
    }
    d.q_strides[1] = d.head_dim = s_.head_dim;
    d.lengths = u.lengths;
    d.new_tokens = 1;
    d.batch = rows_;
    d.num_heads = s_.heads;
    d.num_kv_heads = s_.kv_heads;
    d.capacity = d.page_size = u.capacity;
    d.window_left = window_left;
    d.scale = static_cast<float>(1 / std::sqrt(static_cast<double>(s_.head_dim)));
    d.dtype = s_.dtype;
    kernels::run(d);
  }

  void activate() const {
    kernels::SwiGLU g{};
    g.gate = m_.gates;
    g.up = m_.gates + s_.intermediate * size_of(s_.dtype);
    g.y = m_.activated;
    g.cols = s_.intermediate;
    g.gate_stride = g.up_stride = 2 * s_.intermediate;
    g.dtype = s_.dtype;
    kernels::run(g, rows_ * s_.intermediate);
  }

  const Decoder& d_;
  const Sizes& s_;
  const int64_t rows_;
  const Activations m_;
  std::vector<int32_t> cu_seqlens_;
  std::vector<kernels::Update> updates_;
};

void decoder_step(int64_t decoder, const Tensor& token_ids, const Tensor& cos, const Tensor& sin,
                  const std::vector<Tensor>& k_caches, const std::vector<Tensor>& v_caches,
                  const Tensor& lengths, const Tensor& logits) {
  const auto weights = Decoders::all().at(decoder);
  const int64_t rows = token_ids.numel();
  Step step(*weights, rows);
  step.embed(token_ids);
  step.set_caches(cos, sin, lengths, k_caches, v_caches);
  step.run(logits);
  auto* const counted = static_cast<int32_t*>(lengths.data_ptr());
  for (int64_t row = 0; row < rows; ++row) ++counted[row];
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(mistral_kernels, m) {
  m.def(
      "make_decoder(Tensor embedding, Tensor?[] weights, Tensor norm, Tensor head, "
      "Tensor? head_scales, int[] windows_left, int head_dim, float eps) -> int");
  m.def("drop_decoder(int decoder) -> ()");
  m.def(
      "decoder_step(int decoder, Tensor token_ids, Tensor cos, Tensor sin, Tensor(a!)[] k_caches, "
      "Tensor(b!)[] v_caches, Tensor(c!) lengths, Tensor(d!) logits) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(mistral_kernels, CompositeExplicitAutograd, m) {
  m.impl("drop_decoder", TORCH_BOX(&drop_decoder));
}

STABLE_TORCH_LIBRARY_IMPL(mistral_kernels, CPU, m) {
  m.impl("make_decoder", TORCH_BOX(&make_decoder));
  m.impl("decoder_step", TORCH_BOX(&decoder_step));
}
