// The operators that append to a rolling cache, compiled into both libraries; see
// mistral_kernels/ops/rolling_cache.py.
#include "rolling_cache.h"

#include "operator.h"

#include <initializer_list>

#include <torch/csrc/stable/accelerator.h>

#ifdef KERNELS_FOR_CUDA
// Declared here because PyTorch's header with this declaration requires the CUDA headers.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);
#endif

namespace kernels {
namespace {

constexpr int64_t kAny = -1;  // matches any size

// Requires that x is on the device of `cache`, has this dtype and shape, and has a contiguous last
// dimension.
void require_like(const Tensor& x, const Tensor& cache, ScalarType dtype,
                  std::initializer_list<int64_t> shape) {
  require(x.dim() == static_cast<int64_t>(shape.size()) && x.scalar_type() == dtype);
  for (int64_t i = 0; i < x.dim(); ++i) {
    require(shape.begin()[i] == kAny || shape.begin()[i] == x.size(i));
  }
  require(x.is_cuda() == cache.is_cuda() && x.get_device_index() == cache.get_device_index());
  require(x.size(x.dim() - 1) <= 1 || x.stride(x.dim() - 1) == 1);
}

Heads heads(const Tensor& x, const Tensor& cache, std::initializer_list<int64_t> shape) {
  require_like(x, cache, cache.scalar_type(), shape);
  const int64_t dim = x.dim();
  return {x.data_ptr(), dim == 4 ? x.stride(0) : 0, x.stride(dim - 3), x.stride(dim - 2)};
}

// The same for a tensor that is written: expanded dimensions are refused, because two threads would
// write the same element.
Heads written(const Tensor& x, const Tensor& cache, std::initializer_list<int64_t> shape) {
  for (int64_t i = 0; i < x.dim(); ++i) require(x.size(i) <= 1 || x.stride(i) != 0);
  return heads(x, cache, shape);
}

const int32_t* int32s(const Tensor& x, const Tensor& cache, std::initializer_list<int64_t> shape) {
  require_like(x, cache, ScalarType::Int, shape);
  return static_cast<const int32_t*>(x.data_ptr());
}

#ifndef KERNELS_FOR_CUDA
// Index tensors decide which memory is written, so their values are checked on the CPU. On a GPU,
// reading them would synchronize with the device, so the caller must pass valid values.
void require_values(const Update& u, int64_t total, int64_t cache_rows, int64_t num_positions) {
  require(u.cu_seqlens[0] == 0 && u.cu_seqlens[u.batch] == total);
  for (int64_t sequence = 0; sequence < u.batch; ++sequence) {
    const int64_t length = u.lengths[sequence];
    const int64_t count = int64_t{u.cu_seqlens[sequence + 1]} - u.cu_seqlens[sequence];
    require(length >= 0 && count >= 0 && count <= u.max_seqlen);
    if (count == 0) continue;
    const int64_t end = length + count;
    require(!u.q.data || end <= num_positions);
    const auto require_row = [&](int64_t row) { require(row >= 0 && row < cache_rows); };
    if (u.rows) require_row(u.rows[sequence]);
    if (!u.block_table) continue;
    int64_t position = end - std::min<int64_t>(count, u.capacity);
    while (position < end) {
      const int64_t slot = position % u.capacity;
      require_row(u.block_table[sequence * u.block_table_stride + slot / u.page_size]);
      position += u.page_size - slot % u.page_size;
    }
  }
}
#endif

// Returns the arguments of an update with k and v, without rotation.
Update update_of(const Tensor& k_cache, const Tensor& v_cache, const Tensor& k, const Tensor& v,
                 const Tensor& lengths, const Tensor& cu_seqlens, int64_t max_seqlen,
                 const OptionalTensor& rows, const OptionalTensor& block_table) {
  Update u{};
  u.dtype = required_dtype(k_cache);
  require(k_cache.dim() == 4 && k.dim() == 3 && lengths.dim() == 1 && !(rows && block_table));
  const int64_t kv_heads = k_cache.size(2), head_dim = k_cache.size(3);
  require(kv_heads > 0 && kv_heads <= INT32_MAX);
  require(head_dim > 0 && head_dim % 8 == 0 && head_dim <= INT32_MAX);
  const int64_t total = k.size(0), batch = lengths.size(0);
  u.k_cache = written(k_cache, k_cache, {kAny, kAny, kAny, kAny});
  u.v_cache = written(v_cache, k_cache, {k_cache.size(0), k_cache.size(1), kv_heads, head_dim});
  u.k = heads(k, k_cache, {kAny, kv_heads, head_dim});
  u.v = heads(v, k_cache, {total, kv_heads, head_dim});
  u.lengths = int32s(lengths, k_cache, {kAny});
  u.cu_seqlens = int32s(cu_seqlens, k_cache, {batch + 1});
  int64_t capacity = k_cache.size(1);
  require(capacity <= UINT32_MAX);
  u.page_size = static_cast<uint32_t>(capacity);
  if (rows) {
    u.rows = int32s(*rows, k_cache, {batch});
  } else if (block_table) {
    u.block_table = int32s(*block_table, k_cache, {batch, kAny});
    u.block_table_stride = block_table->stride(0);
    capacity *= block_table->size(1);
  } else {
    require(batch <= k_cache.size(0));
  }
  require(capacity > 0);
  // Positions fit in uint32: a ring of more than UINT32_MAX slots never wraps.
  u.capacity = static_cast<uint32_t>(std::min<int64_t>(capacity, UINT32_MAX));
  u.batch = batch;
  u.max_seqlen = max_seqlen;
  u.num_kv_heads = static_cast<int32_t>(kv_heads);
  u.head_dim = static_cast<int32_t>(head_dim);
  return u;
}

void run(const Update& u, const Tensor& k_cache, int64_t total, int64_t num_positions) {
#ifdef KERNELS_FOR_CUDA
  if (total == 0) return;
  void* stream = nullptr;
  const torch::stable::accelerator::DeviceGuard guard(k_cache.get_device_index());
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_get_current_cuda_stream(k_cache.get_device_index(), &stream));
  const char* error = update(u, stream);
#else
  require_values(u, total, k_cache.size(0), num_positions);
  if (total == 0) return;
  const char* error = update(u, nullptr);
#endif
  KERNELS_CHECK(!error, error);
}

Tensor rotate_and_append(const Tensor& k_cache, const Tensor& v_cache, const Tensor& k,
                         const Tensor& v, const Tensor& lengths, const Tensor& cu_seqlens,
                         int64_t max_seqlen, const Tensor& q, const Tensor& cos,
                         const Tensor& sin, bool interleaved) {
  Update u = update_of(k_cache, v_cache, k, v, lengths, cu_seqlens, max_seqlen, std::nullopt,
                       std::nullopt);
  const int64_t total = k.size(0), head_dim = k.size(2);
  u.q = heads(q, k_cache, {total, kAny, head_dim});
  require(q.size(1) > 0 && q.size(1) <= INT32_MAX);
  u.num_heads = static_cast<int32_t>(q.size(1));
  require_like(cos, k_cache, ScalarType::Float, {kAny, head_dim / 2});
  require_like(sin, k_cache, ScalarType::Float, {cos.size(0), head_dim / 2});
  u.cos = static_cast<const float*>(cos.data_ptr());
  u.sin = static_cast<const float*>(sin.data_ptr());
  u.cos_stride = cos.stride(0);
  u.sin_stride = sin.stride(0);
  u.interleaved = interleaved;
  Tensor q_out = new_like(q);
  u.q_out = {q_out.data_ptr(), 0, u.num_heads * head_dim, head_dim};
  run(u, k_cache, total, cos.size(0));
  return q_out;
}

void rolling_cache_update(const Tensor& k_cache, const Tensor& v_cache, const Tensor& k,
                          const Tensor& v, const Tensor& lengths, const Tensor& cu_seqlens,
                          int64_t max_seqlen, const OptionalTensor& rows,
                          const OptionalTensor& block_table) {
  const auto append = [&] {
    const Update u =
        update_of(k_cache, v_cache, k, v, lengths, cu_seqlens, max_seqlen, rows, block_table);
    run(u, k_cache, k.size(0), 0);
  };
  run_or_call<void>("mistral_kernels::rolling_cache_update_python", append, k_cache, v_cache, k, v,
                    lengths, cu_seqlens, max_seqlen, rows, block_table);
}

Tensor rotary_rolling_cache_update(const Tensor& k_cache, const Tensor& v_cache, const Tensor& k,
                                   const Tensor& v, const Tensor& lengths,
                                   const Tensor& cu_seqlens, int64_t max_seqlen, const Tensor& q,
                                   const Tensor& cos, const Tensor& sin, bool interleaved) {
  const auto append = [&] {
    return rotate_and_append(k_cache, v_cache, k, v, lengths, cu_seqlens, max_seqlen, q, cos, sin,
                             interleaved);
  };
  return run_or_call<Tensor>("mistral_kernels::rotary_rolling_cache_update_python", append, k_cache,
                             v_cache, k, v, lengths, cu_seqlens, max_seqlen, q, cos, sin,
                             interleaved);
}

}  // namespace
}  // namespace kernels

LIBRARY_IMPL(KERNELS_NAMESPACE, KERNELS_DEVICE, m) {
  m.impl("rolling_cache_update", TORCH_BOX(&kernels::rolling_cache_update));
  m.impl("rotary_rolling_cache_update", TORCH_BOX(&kernels::rotary_rolling_cache_update));
}
