// The operator as PyTorch sees it, on its stable ABI. Compiled into either library, which gives the
// namespace of its operators, KERNELS_NAMESPACE, and their device, KERNELS_DEVICE: CPU or CUDA.
#include "bindings.h"
#include "rolling_cache.h"

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <initializer_list>
#include <optional>

#ifdef KERNELS_FOR_CUDA
// Declared here since the header that has it asks for the whole of CUDA.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);
#endif

namespace {

using rolling_cache::Heads;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr int64_t kAny = -1;  // a size of any value

// The data of x, which must be like the caches' in device, of this dtype and shape, and contiguous
// in its last dimension.
char* data(const char* name, const Tensor& x, const Tensor& cache, ScalarType dtype,
           std::initializer_list<int64_t> shape) {
  bool fits = x.dim() == static_cast<int64_t>(shape.size());
  for (int64_t i = 0; fits && i < x.dim(); ++i) {
    fits = shape.begin()[i] == kAny || shape.begin()[i] == x.size(i);
  }
  KERNELS_CHECK(fits, "the shape of ", name, " does not fit the other arguments");
  KERNELS_CHECK(x.scalar_type() == dtype, name, " has the wrong dtype");
  KERNELS_CHECK(x.is_cuda() == cache.is_cuda() && x.get_device_index() == cache.get_device_index(),
                name, " must be on the device of k_cache");
  KERNELS_CHECK(x.size(x.dim() - 1) <= 1 || x.stride(x.dim() - 1) == 1, "the last dimension of ",
                name, " must be contiguous");
  return static_cast<char*>(x.data_ptr());
}

Heads heads(const char* name, const Tensor& x, const Tensor& cache,
            std::initializer_list<int64_t> shape) {
  char* start = data(name, x, cache, cache.scalar_type(), shape);
  const int64_t bytes = x.element_size(), dim = x.dim();
  return {start, dim == 4 ? x.stride(0) * bytes : 0, x.stride(dim - 3) * bytes,
          x.stride(dim - 2) * bytes};
}

#ifndef KERNELS_FOR_CUDA
// Index tensors decide which memory is written. On a GPU their values cannot be read without
// waiting for it: there the caller vouches for them.
void check_values(const rolling_cache::Update& u, int64_t total, int64_t cache_rows,
                  int64_t num_positions) {
  KERNELS_CHECK(u.cu_seqlens[0] == 0 && u.cu_seqlens[u.batch] == total,
                "cu_seqlens must rise from 0 to the ", total, " tokens of k, got ",
                u.cu_seqlens[0], " to ", u.cu_seqlens[u.batch]);
  for (int64_t sequence = 0; sequence < u.batch; ++sequence) {
    const int64_t length = u.lengths[sequence];
    const int64_t count = int64_t{u.cu_seqlens[sequence + 1]} - u.cu_seqlens[sequence];
    KERNELS_CHECK(length >= 0, "lengths must be >= 0, got ", length);
    KERNELS_CHECK(count >= 0 && count <= u.max_seqlen,
                  "cu_seqlens must rise in steps of at most max_seqlen ", u.max_seqlen, ", got ",
                  count);
    if (count == 0) continue;
    const int64_t end = length + count;
    KERNELS_CHECK(!u.q.data || end <= num_positions, "cos and sin end at position ", num_positions,
                  ", but the new tokens reach ", end);
    const auto check_row = [&](const char* name, int64_t row) {
      KERNELS_CHECK(row >= 0 && row < cache_rows, name, " must lie in [0, ", cache_rows,
                    "), got ", row);
    };
    if (u.rows) check_row("rows", u.rows[sequence]);
    if (!u.block_table) continue;
    int64_t position = end - std::min<int64_t>(count, u.capacity);
    while (position < end) {
      const int64_t slot = position % u.capacity;
      check_row("block_table", u.block_table[sequence * u.block_table_stride + slot / u.page_size]);
      position += u.page_size - slot % u.page_size;
    }
  }
}
#endif

void rolling_cache_update(const Tensor& k_cache, const Tensor& v_cache, const Tensor& k,
                          const Tensor& v, const Tensor& lengths, const Tensor& cu_seqlens,
                          int64_t max_seqlen, const OptionalTensor& rows,
                          const OptionalTensor& block_table, const OptionalTensor& q,
                          const OptionalTensor& q_out, const OptionalTensor& cos,
                          const OptionalTensor& sin, bool interleaved) {
  KERNELS_CHECK(k_cache.dim() == 4, "k_cache must have 4 dimensions, got ", k_cache.dim());
  const int64_t kv_heads = k_cache.size(2), head_dim = k_cache.size(3);
  const int64_t total = k.size(0), batch = lengths.size(0);
  KERNELS_CHECK(head_dim > 0 && head_dim % 8 == 0, "head_dim must be a multiple of 8, got ",
                head_dim);
  KERNELS_CHECK(kv_heads > 0, "k_cache must have heads");
  KERNELS_CHECK(q.has_value() == q_out.has_value() && q.has_value() == cos.has_value() &&
                    q.has_value() == sin.has_value(),
                "q, q_out, cos and sin go together");
  KERNELS_CHECK(!(rows && block_table), "rows and block_table exclude each other");

  rolling_cache::Update u{};
  u.k_cache = heads("k_cache", k_cache, k_cache, {kAny, kAny, kAny, kAny});
  u.v_cache = heads("v_cache", v_cache, k_cache,
                    {k_cache.size(0), k_cache.size(1), kv_heads, head_dim});
  u.k = heads("k", k, k_cache, {kAny, kv_heads, head_dim});
  u.v = heads("v", v, k_cache, {total, kv_heads, head_dim});
  const auto int32s = [&](const char* name, const Tensor& x, std::initializer_list<int64_t> shape) {
    return reinterpret_cast<const int32_t*>(data(name, x, k_cache, ScalarType::Int, shape));
  };
  u.lengths = int32s("lengths", lengths, {kAny});
  u.cu_seqlens = int32s("cu_seqlens", cu_seqlens, {batch + 1});
  int64_t capacity = k_cache.size(1);
  KERNELS_CHECK(capacity <= UINT32_MAX, "k_cache must have at most 2^32 - 1 places a row");
  u.page_size = static_cast<uint32_t>(capacity);
  if (rows) {
    u.rows = int32s("rows", *rows, {batch});
  } else if (block_table) {
    u.block_table = int32s("block_table", *block_table, {batch, kAny});
    u.block_table_stride = block_table->stride(0);
    capacity *= block_table->size(1);
  } else {
    KERNELS_CHECK(batch <= k_cache.size(0), "k_cache has fewer rows than there are lengths");
  }
  KERNELS_CHECK(capacity > 0, "the caches have no slots");
  u.capacity = static_cast<uint32_t>(std::min<int64_t>(capacity, UINT32_MAX));  // never wraps then
  if (q) {
    u.num_heads = static_cast<int32_t>(q->size(1));
    u.q = heads("q", *q, k_cache, {total, kAny, head_dim});
    u.q_out = heads("q_out", *q_out, k_cache, {total, u.num_heads, head_dim});
    const auto floats = [&](const char* name, const Tensor& x) {
      const auto* start = data(name, x, k_cache, ScalarType::Float, {cos->size(0), head_dim / 2});
      return reinterpret_cast<const float*>(start);
    };
    u.cos = floats("cos", *cos);
    u.sin = floats("sin", *sin);
    u.cos_stride = cos->stride(0);
    u.sin_stride = sin->stride(0);
  }
  u.batch = batch;
  u.max_seqlen = max_seqlen;
  u.num_kv_heads = static_cast<int32_t>(kv_heads);
  u.head_dim = static_cast<int32_t>(head_dim);
  u.dtype = dtype_of("k_cache", k_cache);
  u.interleaved = interleaved;
  if (total == 0) return;
#ifndef KERNELS_FOR_CUDA
  check_values(u, total, k_cache.size(0), cos ? cos->size(0) : 0);
#endif

  void* stream = nullptr;
#ifdef KERNELS_FOR_CUDA
  const torch::stable::accelerator::DeviceGuard guard(k_cache.get_device_index());
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_get_current_cuda_stream(k_cache.get_device_index(), &stream));
#endif
  const char* error = rolling_cache::update(u, stream);
  KERNELS_CHECK(!error, error);
}

}  // namespace

LIBRARY(KERNELS_NAMESPACE, m) {
  m.def(
      "rolling_cache_update(Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor k, Tensor v, "
      "Tensor lengths, Tensor cu_seqlens, int max_seqlen, Tensor? rows, Tensor? block_table, "
      "Tensor? q, Tensor(c!)? q_out, Tensor? cos, Tensor? sin, bool interleaved) -> ()");
}

LIBRARY_IMPL(KERNELS_NAMESPACE, KERNELS_DEVICE, m) {
  m.impl("rolling_cache_update", TORCH_BOX(&rolling_cache_update));
}
