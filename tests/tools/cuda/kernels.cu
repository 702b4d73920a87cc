// Correct kernels, one feature each (test_ptxrun_cuda.py).
#include <assert.h>
#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_pipeline.h>
#include <mma.h>
#include <stdio.h>
namespace cg = cooperative_groups;
extern "C" {
__global__ void vadd(const float* a, const float* b, float* c, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) c[i] = a[i] + b[i];
}

__global__ void collatz(const int* a, int* steps, int n) {  // divergent loops
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  long long x = a[i];
  int s = 0;
  while (x != 1) {
    if (x & 1)
      x = 3 * x + 1;
    else
      x >>= 1;
    if (++s > 500) break;
  }
  steps[i] = s;
}

__device__ int pick(int k, int i) {
  switch (k) {
    case 0:
      return i;
    case 1:
      return i * i;
    case 2:
      return -i;
    case 3:
      return i % 7;
    case 4:
      return i / 3;
    case 5:
      return i ^ 21;
    case 6:
      return i << 2;
    default:
      return 1000;
  }
}
__global__ void switch_loop(int* o, int n) {
  int i = threadIdx.x;
  int acc = 0;
  for (int j = 0; j < n; j++) {
    if ((i + j) % 3 == 0) continue;
    acc += pick((i * 7 + j) & 7, i);
    if (acc > 5000) break;
  }
  o[i] = acc;
}

__global__ void transpose(const float* in, float* out, int W, int H) {
  __shared__ float t[32][33];
  int x = blockIdx.x * 32 + threadIdx.x, y = blockIdx.y * 32 + threadIdx.y;
  for (int j = 0; j < 32; j += 8)
    if (x < W && y + j < H) t[threadIdx.y + j][threadIdx.x] = in[(y + j) * W + x];
  __syncthreads();
  x = blockIdx.y * 32 + threadIdx.x;
  y = blockIdx.x * 32 + threadIdx.y;
  for (int j = 0; j < 32; j += 8)
    if (x < H && y + j < W) out[(y + j) * H + x] = t[threadIdx.x][threadIdx.y + j];
}

__global__ void blocksum(const float* a, float* out, int n) {
  extern __shared__ float s[];
  float v = 0;
  for (int i = threadIdx.x; i < n; i += blockDim.x) v += a[blockIdx.x * n + i];
  s[threadIdx.x] = v;
  __syncthreads();
  for (int k = blockDim.x / 2; k > 32; k >>= 1) {
    if (threadIdx.x < k) s[threadIdx.x] += s[threadIdx.x + k];
    __syncthreads();
  }
  if (threadIdx.x < 32) {
    v = s[threadIdx.x] + s[threadIdx.x + 32];
    for (int o = 16; o; o >>= 1) v += __shfl_down_sync(~0u, v, o);
    if (threadIdx.x == 0) out[blockIdx.x] = v;
  }
}

__global__ void shuffles(const int* a, int* o) {
  int l = threadIdx.x & 31, v = a[threadIdx.x];
  o[threadIdx.x] = __shfl_xor_sync(~0u, v, 5);
  o[64 + threadIdx.x] = __shfl_up_sync(~0u, v, 3);
  o[128 + threadIdx.x] = __shfl_down_sync(~0u, v, 7, 16);
  o[192 + threadIdx.x] = __shfl_sync(~0u, v, (l * 3) & 31);
  o[256 + threadIdx.x] = __ballot_sync(~0u, v & 1);
  o[320 + threadIdx.x] = __popc(__match_any_sync(~0u, v & 3));
  o[384 + threadIdx.x] = __any_sync(~0u, v == 3) + 2 * __all_sync(~0u, v >= 0);
  o[448 + threadIdx.x] = __reduce_add_sync(~0u, v);
  o[512 + threadIdx.x] = __shfl_up_sync(~0u, v, 3, 8);
  o[576 + threadIdx.x] = __shfl_xor_sync(~0u, v, 9, 8);
  o[640 + threadIdx.x] = __shfl_sync(~0u, v, l + 5, 8);
}

__global__ void atomics(const float* a, float* fs, int* is, unsigned* us, unsigned long long* u64s,
                        __half2* h2, __nv_bfloat162* b2, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  int v = (int)a[i];
  atomicAdd(fs, a[i]);
  atomicAdd(is, v);
  atomicMin(is + 1, v);
  atomicMax(is + 2, v);
  atomicOr((unsigned*)is + 3, 1u << (i & 31));
  atomicXor(is + 4, v);
  atomicExch(is + 5, 77);
  atomicCAS(is + 6, 0, i + 1);
  atomicInc(us, 9);
  atomicAdd(u64s, (unsigned long long)i);
  atomicAdd(h2, __floats2half2_rn(1.f, 2.f));
  atomicAdd(b2, __floats2bfloat162_rn(1.f, .5f));
}

__global__ void smem_hist(const int* a, int* h, int n) {
  __shared__ int s[16];
  if (threadIdx.x < 16) s[threadIdx.x] = 0;
  __syncthreads();
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x)
    atomicAdd(&s[a[i] & 15], 1);
  __syncthreads();
  if (threadIdx.x < 16) atomicAdd(&h[threadIdx.x], s[threadIdx.x]);
}

__device__ __noinline__ float poly(float x, const float* c, int n) {
  float r = 0;
  for (int i = n - 1; i >= 0; i--) r = r * x + c[i];
  return r;
}
__constant__ float coef[4] = {1.f, 2.f, -3.f, 0.5f};
__global__ void call_local_const(const float* a, float* o, int n) {
  int i = threadIdx.x;
  float loc[8];
  for (int j = 0; j < 8; j++) loc[j] = coef[j & 3] * a[(i + j) % n];
  float s = 0;
  for (int j = 0; j < n; j++) s += loc[(j * a[0] > 1e9f) ? 0 : (j * 5 + i) & 7];
  o[i] = poly(a[i], coef, 4) + s;
}

struct P {
  float scale;
  int n;
  double d;
};
__global__ void structarg(P p, float* o) {
  int i = threadIdx.x;
  if (i < p.n) o[i] = p.scale * i + (float)p.d;
}

__global__ void counts(int* o, int n) {
  int t = threadIdx.x;
  int c = __syncthreads_count(t < n);
  int a = __syncthreads_and(t < n);
  int r = __syncthreads_or(t == n);
  o[t] = c * 4 + (a != 0) * 2 + (r != 0);
}

__global__ void bf16rms(const __nv_bfloat162* x, const __nv_bfloat162* w, __nv_bfloat162* y, int n2,
                        float eps) {
  const __nv_bfloat162* r = x + blockIdx.x * n2;
  float s = 0;
  for (int i = threadIdx.x; i < n2; i += blockDim.x) {
    float2 f = __bfloat1622float2(r[i]);
    s += f.x * f.x + f.y * f.y;
  }
  __shared__ float sh[32];
  for (int o = 16; o; o >>= 1) s += __shfl_xor_sync(~0u, s, o);
  if ((threadIdx.x & 31) == 0) sh[threadIdx.x >> 5] = s;
  __syncthreads();
  if (threadIdx.x < 32) {
    s = threadIdx.x < blockDim.x / 32 ? sh[threadIdx.x] : 0.f;
    for (int o = 16; o; o >>= 1) s += __shfl_xor_sync(~0u, s, o);
    if (threadIdx.x == 0) sh[0] = s;
  }
  __syncthreads();
  float inv = rsqrtf(sh[0] / (2 * n2) + eps);
  for (int i = threadIdx.x; i < n2; i += blockDim.x) {
    float2 f = __bfloat1622float2(r[i]), g = __bfloat1622float2(w[i]);
    y[blockIdx.x * n2 + i] = __floats2bfloat162_rn(f.x * inv * g.x, f.y * inv * g.y);
  }
}

__global__ void half_ops(const __half* a, const __half* b, __half* o, int n) {
  int i = threadIdx.x;
  if (i < n) {
    o[i] = __hfma(a[i], b[i], a[i]);
    o[n + i] = hexp(a[i]);
    o[2 * n + i] = __hmax(a[i], b[i]);
    o[3 * n + i] = __hlt(a[i], b[i]) ? a[i] : b[i];
    o[4 * n + i] = __hdiv(a[i], b[i]);
  }
}

__global__ void asynccopy(const float4* a, float4* o, int n) {
  __shared__ float4 s[2][64];
  int t = threadIdx.x;
  __pipeline_memcpy_async(&s[0][t], &a[t], 16);
  __pipeline_commit();
  for (int k = 0; k < n; k++) {
    if (k + 1 < n) __pipeline_memcpy_async(&s[(k + 1) & 1][t], &a[(k + 1) * 64 + t], 16);
    __pipeline_commit();
    __pipeline_wait_prior(1);
    __syncthreads();
    o[k * 64 + t] = s[k & 1][63 - t];
    __syncthreads();
  }
}

__global__ void mma_bf16(const __nv_bfloat16* A, const __nv_bfloat16* B,
                         float* C) {  // 16x16 * (8x16)^T
  int l = threadIdx.x, g = l >> 2, t = l & 3;
  const unsigned *a = (const unsigned*)A, *b = (const unsigned*)B;
  float c[4] = {0, 0, 0, 0};
  unsigned a0 = a[g * 8 + t], a1 = a[(g + 8) * 8 + t], a2 = a[g * 8 + t + 4],
           a3 = a[(g + 8) * 8 + t + 4], b0 = b[g * 8 + t], b1 = b[g * 8 + t + 4];
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  C[g * 8 + 2 * t] = c[0];
  C[g * 8 + 2 * t + 1] = c[1];
  C[(g + 8) * 8 + 2 * t] = c[2];
  C[(g + 8) * 8 + 2 * t + 1] = c[3];
}

__global__ void mma_misc(const unsigned* A, const unsigned* B, float* C, unsigned* H, float* T,
                         int* I) {
  int l = threadIdx.x;
  unsigned a[4], b[2];
  for (int i = 0; i < 4; i++) a[i] = A[l * 4 + i];
  for (int i = 0; i < 2; i++) b[i] = B[l * 2 + i];
  float c[4] = {0, 0, 0, 0};
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, "
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(b[0]));
  for (int i = 0; i < 4; i++) C[l * 4 + i] = c[i];
  unsigned h[2] = {0, 0};
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f16.f16.f16.f16 {%0,%1}, {%2,%3,%4,%5}, {%6,%7}, {%0,%1};"
      : "+r"(h[0]), "+r"(h[1])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  H[l * 2] = h[0];
  H[l * 2 + 1] = h[1];
  float f[4] = {0, 0, 0, 0};
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(f[0]), "+f"(f[1]), "+f"(f[2]), "+f"(f[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  for (int i = 0; i < 4; i++) T[l * 4 + i] = f[i];
  int d[4] = {0, 0, 0, 0};
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  for (int i = 0; i < 4; i++) I[l * 4 + i] = d[i];
}

__global__ void ldm(const unsigned short* in, unsigned* o) {
  __shared__ __align__(16) unsigned short s[32 * 8];
  int l = threadIdx.x;
  for (int i = 0; i < 8; i++) s[l * 8 + i] = in[l * 8 + i];
  __syncthreads();
  unsigned ad = (unsigned)__cvta_generic_to_shared(&s[l * 8]), r[4];
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(ad));
  for (int i = 0; i < 4; i++) o[l * 4 + i] = r[i];
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(ad));
  for (int i = 0; i < 4; i++) o[128 + l * 4 + i] = r[i];
}

__global__ void dbl(const double* a, double* o, int n) {
  int i = threadIdx.x;
  if (i < n) {
    o[i] = exp(a[i]);
    o[n + i] = sqrt(fabs(a[i])) / (1.0 + a[i] * a[i]);
    o[2 * n + i] = floor(a[i] * 3);
  }
}
__global__ void ll(const long long* a, const long long* b, long long* o, int n) {
  int i = threadIdx.x;
  if (i < n) {
    o[i] = a[i] / b[i];
    o[n + i] = a[i] % b[i];
    o[2 * n + i] = __mul64hi(a[i], b[i]);
    o[3 * n + i] = (unsigned long long)a[i] >> (b[i] & 63);
  }
}
__global__ void fmath(const float* a, float* o, int n) {
  int i = threadIdx.x;
  if (i < n) {
    float x = a[i];
    o[i] = expf(x);
    o[n + i] = sinf(x);
    o[2 * n + i] = tanhf(x);
    o[3 * n + i] = erff(x);
    o[4 * n + i] = powf(fabsf(x), 1.7f);
    o[5 * n + i] = log1pf(fabsf(x));
    o[6 * n + i] = __expf(x);
    o[7 * n + i] = cosf(x * 1e5f);
    o[8 * n + i] = fmodf(x, 0.7f);
    o[9 * n + i] = x / 3.f;
  }
}
__global__ void coop(const int* a, int* o, int n) {
  cg::thread_block b = cg::this_thread_block();
  auto t = cg::tiled_partition<8>(b);
  int v = a[b.thread_rank()];
  for (int k = t.size() / 2; k; k /= 2) v += t.shfl_down(v, k);
  if (t.thread_rank() == 0) o[b.thread_rank() / 8] = v;
}
__global__ void print(int n) {
  if (threadIdx.x == 3) printf("n=%d x=%.2f s=%s l=%lld\n", n, 1.5, "hi", 1234567890123LL);
}
__global__ void asserts(int n) { assert((int)threadIdx.x < n); }
__global__ void ptrs(float** p, int k) {
  int i = threadIdx.x;
  for (int j = 0; j < k; j++) p[j][i] += j + 1;
}
}
template <typename T, typename L>
__device__ void wm(const T* A, const T* B, float* C, int n) {
  using namespace nvcuda;
  __shared__ __align__(32) T s[256];
  for (int i = threadIdx.x; i < 256; i += 32) s[i] = A[(i / 16) * n + i % 16];
  __syncwarp();
  wmma::fragment<wmma::matrix_a, 16, 16, 16, T, wmma::row_major> a;
  wmma::fragment<wmma::matrix_b, 16, 16, 16, T, L> b;
  wmma::fragment<wmma::accumulator, 16, 16, 16, float> c;
  wmma::fill_fragment(c, 1.f);
  for (int k = 0; k < n; k += 16) {
    if (k)
      wmma::load_matrix_sync(a, A + k, n);
    else
      wmma::load_matrix_sync(a, s, 16);
    wmma::load_matrix_sync(b, std::is_same<L, wmma::row_major>::value ? B + k * 16 : B + k,
                           std::is_same<L, wmma::row_major>::value ? 16 : n);
    wmma::mma_sync(c, a, b, c);
  }
  for (int i = 0; i < c.num_elements; i++) c.x[i] *= 2.f;
  wmma::store_matrix_sync(C, c, 16, wmma::mem_row_major);
}
extern "C" __global__ void wmma_h(const __half* A, const __half* B, float* C, int n) {
  wm<__half, nvcuda::wmma::row_major>(A, B, C, n);
}
extern "C" __global__ void wmma_b(const __nv_bfloat16* A, const __nv_bfloat16* B, float* C, int n) {
  wm<__nv_bfloat16, nvcuda::wmma::col_major>(A, B, C, n);
}
template <typename T>
__device__ void gen(T* x, int i) {
  *x += i;
}
extern "C" __global__ void generic(int* g, int which) {
  __shared__ int s;
  if (threadIdx.x == 0) {
    s = 5;
  }
  __syncthreads();
  int loc = 3;
  int* p = which == 0 ? &g[threadIdx.x] : which == 1 ? &s : &loc;
  if (which != 1 || threadIdx.x == 0) atomicAdd(which == 1 ? &s : &g[64], 1);
  __syncthreads();
  g[threadIdx.x] += *(volatile int*)p;
}
