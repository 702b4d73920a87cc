// A decoder layer's step of one token a sequence, in one call of the kernels that its operators
// call one by one; see mistral_kernels/ops/decoder_layer.py.
#include "../bindings.h"
#include "buffer.h"
#include "run.h"

#include <cmath>
#include <optional>

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

struct Sizes {
  int64_t rows, hidden, intermediate, heads, kv_heads, head_dim, capacity;
  ScalarType stored;
  DType dtype;

  int64_t q() const { return heads * head_dim; }
  int64_t kv() const { return kv_heads * head_dim; }
  int64_t qkv() const { return q() + 2 * kv(); }
};

Sizes sizes_of(const Tensor& delta, const Tensor& o, const Tensor& down, const Tensor& k_cache) {
  KERNELS_CHECK(delta.dim() == 2 && k_cache.dim() == 4 && o.dim() == 2 && down.dim() == 2,
                "delta and weights must have 2 dimensions, caches 4");
  Sizes s{};
  s.rows = delta.size(0);
  s.hidden = delta.size(1);
  s.intermediate = down.size(1);
  s.capacity = k_cache.size(1);
  s.kv_heads = k_cache.size(2);
  s.head_dim = k_cache.size(3);
  KERNELS_CHECK(s.head_dim > 0 && s.head_dim % 8 == 0 && s.kv_heads > 0 && o.size(1) % s.kv() == 0,
                "head_dim must be a multiple of 8, and k_cache's heads must divide q's");
  KERNELS_CHECK(k_cache.size(0) == s.rows && s.capacity > 0, "k_cache must hold ", s.rows,
                " sequences");
  s.heads = o.size(1) / s.head_dim;
  s.stored = delta.scalar_type();
  s.dtype = dtype_of("delta", delta);
  return s;
}

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

// Turns q and k of `qkv`, the first to `turned`, and writes k and v into the rings.
rolling_cache::Update update_of(const Sizes& s, char* qkv, char* turned, const Tensor& k_cache,
                                const Tensor& v_cache, const Tensor& cos, const Tensor& sin,
                                const Tensor& lengths, const Tensor& cu_seqlens) {
  const int64_t element = size_of(s.dtype), head = s.head_dim * element;
  const int64_t token = s.qkv() * element, slot = s.kv() * element;
  const auto ring = [&](const char* name, const Tensor& x) {
    KERNELS_CHECK(x.dim() == 4 && x.size(1) == s.capacity && x.size(2) == s.kv_heads &&
                      x.size(3) == s.head_dim,
                  "v_cache must have k_cache's shape");
    char* data = vector_data<char>(name, x, s.stored, s.rows * s.capacity * s.kv());
    return rolling_cache::Heads{data, s.capacity * slot, slot, head};
  };
  const auto table = [&](const char* name, const Tensor& x) {
    return static_cast<const float*>(
        matrix(name, x, ScalarType::Float, cos.size(0), s.head_dim / 2));
  };
  KERNELS_CHECK(cos.dim() == 2, "cos must be (positions, ", s.head_dim / 2, ")");
  rolling_cache::Update u{};
  u.q = {qkv, 0, token, head};
  u.k = {qkv + s.q() * element, 0, token, head};
  u.v = {qkv + (s.q() + s.kv()) * element, 0, token, head};
  u.q_out = {turned, 0, s.q() * element, head};
  u.k_cache = ring("k_cache", k_cache);
  u.v_cache = ring("v_cache", v_cache);
  u.cos = table("cos", cos);
  u.sin = table("sin", sin);
  u.cos_stride = u.sin_stride = s.head_dim / 2;
  u.lengths = vector_data<int32_t>("lengths", lengths, ScalarType::Int, s.rows);
  u.cu_seqlens = vector_data<int32_t>("cu_seqlens", cu_seqlens, ScalarType::Int, s.rows + 1);
  u.batch = s.rows;
  u.max_seqlen = 1;
  u.capacity = u.page_size = static_cast<uint32_t>(s.capacity);
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

void decoder_layer(const Tensor& delta, const OptionalTensor& residual, const Tensor& input_norm,
                   const Tensor& qkv, const OptionalTensor& qkv_scales, const Tensor& o,
                   const OptionalTensor& o_scales, const Tensor& mlp_norm, const Tensor& gate_up,
                   const OptionalTensor& gate_up_scales, const Tensor& down,
                   const OptionalTensor& down_scales, const Tensor& cos, const Tensor& sin,
                   const Tensor& k_cache, const Tensor& v_cache, const Tensor& lengths,
                   const Tensor& cu_seqlens, int64_t window_left, double eps, const Tensor& out,
                   const Tensor& residual_out) {
  const Sizes s = sizes_of(delta, o, down, k_cache);
  const auto stream = [&](const char* name, const Tensor& x) {
    return matrix(name, x, s.stored, s.rows, s.hidden);
  };

  // What one operator leaves for the next.
  const int64_t row_bytes = s.rows * size_of(s.dtype);
  const Buffer buffer(row_bytes * (s.hidden + s.qkv() + 2 * s.q() + 3 * s.intermediate));
  char* const normed = buffer.data();
  char* const projected = normed + row_bytes * s.hidden;
  char* const turned = projected + row_bytes * s.qkv();
  char* const attended = turned + row_bytes * s.q();
  char* const gates = attended + row_bytes * s.q();
  char* const activated = gates + row_bytes * 2 * s.intermediate;
  void* const result = stream("out", out);
  void* const h = stream("residual_out", residual_out);

  kernels::RMSNorm before{};
  before.x = stream("delta", delta);
  before.residual = residual ? stream("residual", *residual) : nullptr;
  before.weight = vector_data<void>("input_norm", input_norm, s.stored, s.hidden);
  before.y = normed;
  before.h = residual ? h : nullptr;
  before.x_stride = before.residual_stride = before.hidden = s.hidden;
  before.eps = static_cast<float>(eps);
  before.dtype = s.dtype;
  kernels::RMSNorm between = before;
  between.x = result;
  between.residual = residual ? h : before.x;
  between.weight = vector_data<void>("mlp_norm", mlp_norm, s.stored, s.hidden);
  between.h = h;

  const auto to_qkv =
      product("qkv", s, normed, qkv, qkv_scales, s.qkv(), s.hidden, projected);
  const auto update =
      update_of(s, projected, turned, k_cache, v_cache, cos, sin, lengths, cu_seqlens);
  const auto attention = decode_of(s, update, window_left, attended);
  const auto to_o = product("o", s, attended, o, o_scales, s.hidden, s.q(), result);
  const auto to_gates = product("gate_up", s, normed, gate_up, gate_up_scales,
                                2 * s.intermediate, s.hidden, gates);
  kernels::SwiGLU swiglu{};
  swiglu.gate = gates;
  swiglu.up = gates + s.intermediate * size_of(s.dtype);
  swiglu.y = activated;
  swiglu.cols = s.intermediate;
  swiglu.gate_stride = swiglu.up_stride = 2 * s.intermediate;
  swiglu.dtype = s.dtype;
  const auto to_hidden =
      product("down", s, activated, down, down_scales, s.hidden, s.intermediate, result);

  kernels::run(before, s.rows);
  kernels::run(to_qkv);
  rolling_cache::update(update, nullptr);
  kernels::run(attention);
  kernels::run(to_o);
  kernels::run(between, s.rows);
  kernels::run(to_gates);
  kernels::run(swiglu, s.rows * s.intermediate);
  kernels::run(to_hidden);
}

}  // namespace

LIBRARY_FRAGMENT(KERNELS_NAMESPACE, m) {
  m.def(
      "decoder_layer(Tensor delta, Tensor? residual, Tensor input_norm, Tensor qkv, "
      "Tensor? qkv_scales, Tensor o, Tensor? o_scales, Tensor mlp_norm, Tensor gate_up, "
      "Tensor? gate_up_scales, Tensor down, Tensor? down_scales, Tensor cos, Tensor sin, "
      "Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor lengths, Tensor cu_seqlens, "
      "int window_left, float eps, Tensor(c!) out, Tensor(d!) residual_out) -> ()");
}

LIBRARY_IMPL(KERNELS_NAMESPACE, CPU, m) { m.impl("decoder_layer", TORCH_BOX(&decoder_layer)); }
