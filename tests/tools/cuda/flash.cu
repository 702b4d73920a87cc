// Causal sliding-window attention forward with grouped heads (test_ptxrun_cuda_flash.py).
// Two macros plant bugs: with WITHOUT_BOUNDS the kernel reads rows beyond S, with WITHOUT_BARRIER
// it overwrites a tile that other warps still read.
#include <cuda_bf16.h>
#include <stdint.h>
constexpr int D = 64, BM = 64, BN = 64, LD = D + 8;
typedef __nv_bfloat16 bf;
__device__ __forceinline__ uint32_t sa(const void* p) {
  return (uint32_t)__cvta_generic_to_shared(p);
}
__device__ __forceinline__ void ldm4(uint32_t* r, const void* p) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(sa(p)));
}
__device__ __forceinline__ void ldm4t(uint32_t* r, const void* p) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(sa(p)));
}
__device__ __forceinline__ void mma(float* c, const uint32_t* a, uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ __forceinline__ uint32_t pack(float x, float y) {
  __nv_bfloat162 t = __floats2bfloat162_rn(x, y);
  return *(uint32_t*)&t;
}
__device__ __forceinline__ void tile(bf* s, const bf* g, int r0,
                                     int S) {  // 64 rows of D, zero beyond S
  for (int i = threadIdx.x; i < 64 * (D / 8); i += blockDim.x) {
    int r = i / (D / 8), c = i % (D / 8) * 8;
#ifdef WITHOUT_BOUNDS
    int ok = 1;
#else
    int ok = r0 + r < S;
#endif
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(sa(s + r * LD + c)),
                 "l"(g + (int64_t)(ok ? r0 + r : 0) * D + c), "r"(ok ? 16 : 0));
  }
  asm volatile("cp.async.commit_group;");
}
extern "C" __global__ void __launch_bounds__(128)
    flash(const bf* Q, const bf* K, const bf* V, bf* O, int S, int G, int W, float sc) {
  extern __shared__ __align__(16) bf sm[];
  bf *sq = sm, *sk = sq + BM * LD, *sv = sk + 2 * BN * LD;
  int h = blockIdx.y, m0 = blockIdx.x * BM, w = threadIdx.x >> 5, l = threadIdx.x & 31, g = l >> 2,
      t = l & 3;
  Q += (int64_t)h * S * D;
  O += (int64_t)h * S * D;
  K += (int64_t)(h / G) * S * D;
  V += (int64_t)(h / G) * S * D;
  int lo = max(0, m0 - W + 1) / BN, hi = (min(S, m0 + BM) + BN - 1) / BN;
  tile(sq, Q, m0, S);
  tile(sk, K, lo * BN, S);
  tile(sv, V, lo * BN, S);
  uint32_t q[D / 16][4];
  float o[D / 8][4] = {}, mx[2] = {-INFINITY, -INFINITY}, sum[2] = {0, 0};
  for (int n = lo; n < hi; n++) {
    int b = (n - lo) & 1;
    if (n + 1 < hi) {
      tile(sk + (b ^ 1) * BN * LD, K, (n + 1) * BN, S);
      tile(sv + (b ^ 1) * BN * LD, V, (n + 1) * BN, S);
      asm volatile("cp.async.wait_group 2;");
    } else
      asm volatile("cp.async.wait_group 0;");
    __syncthreads();
    if (n == lo)
      for (int k = 0; k < D / 16; k++)
        ldm4(q[k], sq + (w * 16 + (l & 15)) * LD + k * 16 + (l >> 4) * 8);
    float s[BN / 8][4] = {};
    const bf *kb = sk + b * BN * LD, *vb = sv + b * BN * LD;
    for (int j = 0; j < BN / 8; j += 2)
      for (int k = 0; k < D / 16; k++) {
        uint32_t r[4];
        ldm4(r, kb + (j * 8 + (l & 7) + (l >> 4) * 8) * LD + k * 16 + (l >> 3 & 1) * 8);
        mma(s[j], q[k], r[0], r[1]);
        mma(s[j + 1], q[k], r[2], r[3]);
      }
    float nm[2] = {mx[0], mx[1]};
    for (int j = 0; j < BN / 8; j++)
      for (int e = 0; e < 4; e++) {
        int row = m0 + w * 16 + g + (e >> 1) * 8, col = n * BN + j * 8 + 2 * t + (e & 1);
        bool ok = col <= row && col > row - W && col < S;
        s[j][e] = ok ? s[j][e] * sc : -INFINITY;
        nm[e >> 1] = fmaxf(nm[e >> 1], s[j][e]);
      }
    for (int r = 0; r < 2; r++) {
      nm[r] = fmaxf(nm[r], __shfl_xor_sync(~0u, nm[r], 1));
      nm[r] = fmaxf(nm[r], __shfl_xor_sync(~0u, nm[r], 2));
      float ref = nm[r] == -INFINITY ? 0.f : nm[r];
      float a = exp2f(mx[r] - ref);
      mx[r] = nm[r];
      sum[r] *= a;
      for (int d = 0; d < D / 8; d++) {
        o[d][2 * r] *= a;
        o[d][2 * r + 1] *= a;
      }
      for (int j = 0; j < BN / 8; j++)
        for (int e = 2 * r; e < 2 * r + 2; e++) {
          s[j][e] = exp2f(s[j][e] - ref);
          sum[r] += s[j][e];
        }
    }
    for (int k = 0; k < BN / 16; k++) {
      uint32_t p[4] = {pack(s[2 * k][0], s[2 * k][1]), pack(s[2 * k][2], s[2 * k][3]),
                       pack(s[2 * k + 1][0], s[2 * k + 1][1]),
                       pack(s[2 * k + 1][2], s[2 * k + 1][3])};
      for (int d = 0; d < D / 8; d += 2) {
        uint32_t r[4];
        ldm4t(r, vb + (k * 16 + (l & 15)) * LD + d * 8 + (l >> 4) * 8);
        mma(o[d], p, r[0], r[1]);
        mma(o[d + 1], p, r[2], r[3]);
      }
    }
#ifndef WITHOUT_BARRIER
    __syncthreads();
#endif
  }
  for (int r = 0; r < 2; r++) {
    sum[r] += __shfl_xor_sync(~0u, sum[r], 1);
    sum[r] += __shfl_xor_sync(~0u, sum[r], 2);
    int row = m0 + w * 16 + g + 8 * r;
    if (row < S)
      for (int d = 0; d < D / 8; d++)
        *(__nv_bfloat162*)(O + (int64_t)row * D + d * 8 + 2 * t) =
            __floats2bfloat162_rn(o[d][2 * r] / sum[r], o[d][2 * r + 1] / sum[r]);
  }
}
