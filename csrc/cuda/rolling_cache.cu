// The update on a GPU. Each vector of q, k and v is read once and written once. One launch
// processes the tokens of all sequences, whatever their lengths.
#include "rolling_cache.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace kernels {
namespace {

// N contiguous elements, loaded and stored in accesses of up to ALIGNMENT bytes.
template <typename T, int N, int ALIGNMENT>
struct alignas(ALIGNMENT) Vector {
  T x[N];
};

template <typename T, int N, int ALIGNMENT>
__device__ Vector<T, N, ALIGNMENT> load(const T* x) {
  return *reinterpret_cast<const Vector<T, N, ALIGNMENT>*>(x);
}

__device__ float to_float(float x) { return x; }
__device__ float to_float(__half x) { return __half2float(x); }
__device__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ void round_to(float& out, float x) { out = x; }
__device__ void round_to(__half& out, float x) { out = __float2half_rn(x); }
__device__ void round_to(__nv_bfloat16& out, float x) { out = __float2bfloat16_rn(x); }

template <typename T>
__device__ void rotate_pair(T& a, T& b, float cos, float sin) {
  const Pair y = rotate({to_float(a), to_float(b)}, cos, sin);
  round_to(a, y.a);
  round_to(b, y.b);
}

// Copies one thread's two vectors of a head, x[0..N) and x[half..half+N), to the same offsets of
// `out`. They are rotated unless `cos` is null. An interleaved pair lies within one vector; a
// half-split pair has one element in each vector.
template <typename T, int BYTES, int N>
__device__ void move(const T* x, T* out, int half, const float* cos, const float* sin,
                     bool interleaved, int first) {
  auto a = load<T, N, BYTES>(x), b = load<T, N, BYTES>(x + half);
  if (cos && interleaved) {
    constexpr int ALIGNMENT = BYTES == sizeof(T) ? 4 : N / 2 * 4;
    const int pair = first / 2, later = (half + first) / 2;
    const auto cos_a = load<float, N / 2, ALIGNMENT>(cos + pair);
    const auto sin_a = load<float, N / 2, ALIGNMENT>(sin + pair);
    const auto cos_b = load<float, N / 2, ALIGNMENT>(cos + later);
    const auto sin_b = load<float, N / 2, ALIGNMENT>(sin + later);
#pragma unroll
    for (int i = 0; i < N / 2; ++i) {
      rotate_pair(a.x[2 * i], a.x[2 * i + 1], cos_a.x[i], sin_a.x[i]);
      rotate_pair(b.x[2 * i], b.x[2 * i + 1], cos_b.x[i], sin_b.x[i]);
    }
  } else if (cos) {
    constexpr int ALIGNMENT = BYTES == sizeof(T) ? 4 : N < 4 ? N * 4 : 16;
    const auto cosines = load<float, N, ALIGNMENT>(cos + first);
    const auto sines = load<float, N, ALIGNMENT>(sin + first);
#pragma unroll
    for (int i = 0; i < N; ++i) rotate_pair(a.x[i], b.x[i], cosines.x[i], sines.x[i]);
  }
  *reinterpret_cast<decltype(a)*>(out) = a;
  *reinterpret_cast<decltype(b)*>(out + half) = b;
}

// Consecutive threads take consecutive vectors of half a head, then the next head of q, k and v,
// then the next token of the sequence, so that memory accesses coalesce.
template <typename T, int BYTES>
__global__ void __launch_bounds__(kBlock) update_kernel(const __grid_constant__ Update u) {
  constexpr int N = BYTES == sizeof(T) ? 2 : BYTES / sizeof(T);
  const int half = u.head_dim / 2, vectors = half / N;
  const uint32_t per_token = (u.num_heads + 2 * u.num_kv_heads) * vectors;
  for (int64_t sequence = blockIdx.y; sequence < u.batch; sequence += gridDim.y) {
    const int64_t start = u.cu_seqlens[sequence], count = u.cu_seqlens[sequence + 1] - start;
    const int64_t step = int64_t{gridDim.x} * kBlock;
    for (int64_t i = int64_t{blockIdx.x} * kBlock + threadIdx.x; i < count * per_token; i += step) {
      // The slower 64-bit division is needed for the longest prompts only.
      const int64_t token = i <= UINT32_MAX ? uint32_t(i) / per_token : i / per_token;
      const int in_token = static_cast<int>(i - token * per_token);
      int head = in_token / vectors;
      const int first = in_token % vectors * N;
      const uint32_t position = u.lengths[sequence] + static_cast<uint32_t>(token);
      const float* cos = u.q.data ? u.cos + position * u.cos_stride : nullptr;
      const float* sin = u.q.data ? u.sin + position * u.sin_stride : nullptr;

      const T* from;
      T* to;
      if (head < u.num_heads) {
        from = u.q.at<T>(0, start + token, head);
        to = u.q_out.at<T>(0, start + token, head);
      } else {
        if (!is_kept(token, count, u.capacity)) continue;
        const Slot slot = slot_of(u, sequence, position);
        head -= u.num_heads;
        const bool is_v = head >= u.num_kv_heads;
        if (is_v) {
          head -= u.num_kv_heads;
          cos = nullptr;
        }
        from = (is_v ? u.v : u.k).at<T>(0, start + token, head);
        to = (is_v ? u.v_cache : u.k_cache).at<T>(slot.outer, slot.token, head);
      }
      move<T, BYTES, N>(from + first, to + first, half, cos, sin, u.interleaved, first);
    }
  }
}

template <typename T>
void launch(const Update& u, cudaStream_t stream) {
  const Launch shape = launch_shape(u);
  const int bytes = access_bytes(u);
  const auto kernel = bytes == 16  ? update_kernel<T, 16>
                      : bytes == 8 ? update_kernel<T, 8>
                                   : update_kernel<T, sizeof(T)>;
  kernel<<<dim3(shape.grid_x, shape.grid_y), kBlock, 0, stream>>>(u);
}

}  // namespace

const char* update(const Update& u, void* stream) {
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  switch (u.dtype) {
    case DType::float32: launch<float>(u, cuda_stream); break;
    case DType::float16: launch<__half>(u, cuda_stream); break;
    case DType::bfloat16: launch<__nv_bfloat16>(u, cuda_stream); break;
  }
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace kernels
