#include <stdint.h>
__device__ __forceinline__ unsigned sa(const void* p) {
  return (unsigned)__cvta_generic_to_shared(p);
}
__device__ __forceinline__ void wait(unsigned b, unsigned par) {
  asm volatile(
      "{ .reg .pred p; L: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1; @!p bra L; }" ::"r"(
          b),
      "r"(par)
      : "memory");
}
__device__ __forceinline__ uint64_t desc(unsigned a) {
  return (uint64_t)((a & 0x3ffff) >> 4) | (uint64_t)(128 >> 4) << 16 | (uint64_t)(256 >> 4) << 32;
}
// A pipeline of one producer warp and one consumer warpgroup (test_ptxrun_sm90.py).
// A: steps x 64 x 16, B: steps x 16 x 16, in core matrices; C: 128 threads x 8.
// bug 1: wait_group 1 instead of 0; 2: the producer waits for the wrong parity; 3: arrive without
// expect_tx; 4: the consumer frees a buffer before it waits for its wgmma; 5: ordinary writes to an
// operand without a proxy fence; 6: warp 0 skips an arrival.
extern "C" __global__ void __launch_bounds__(160)
    pipe(const char* A, const char* B, float* C, int steps, int bug) {
  extern __shared__ __align__(1024) char s[];
  __shared__ __align__(8) uint64_t full[2], free_[2];
  const int T = 2560;
  int t = threadIdx.x;
  if (t == 0)
    for (int i = 0; i < 2; i++) {
      asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(sa(&full[i])));
      asm volatile("mbarrier.init.shared::cta.b64 [%0], 128;" ::"r"(sa(&free_[i])));
    }
  asm volatile("fence.mbarrier_init.release.cluster;");
  __syncthreads();
  if (t >= 128) {
    if (t == 128)
      for (int i = 0; i < steps; i++) {
        int st = i & 1;
        unsigned d = sa(s + st * T), f = sa(&full[st]);
        wait(sa(&free_[st]), ((i >> 1) & 1) ^ 1 ^ (bug == 2));
        if (bug == 3)
          asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(f));
        else
          asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], 2560;" ::"r"(f));
        asm volatile(
            "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], 2048, "
            "[%2];" ::"r"(d),
            "l"(A + i * 2048), "r"(f)
            : "memory");
        asm volatile(
            "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], 512, "
            "[%2];" ::"r"(d + 2048),
            "l"(B + i * 512), "r"(f)
            : "memory");
      }
    return;
  }
  float c[8] = {0};
  for (int i = 0; i < steps; i++) {
    int st = i & 1;
    unsigned a = sa(s + st * T);
    wait(sa(&full[st]), (i >> 1) & 1);
    if (bug == 5) {
      *(short*)(s + st * T + 2 * t) = 0x3f80;
      asm volatile("bar.sync 1, 128;" ::: "memory");
    }
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
    asm volatile(
        "{ .reg .pred p; setp.ne.b32 p, 1, 0; wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 "
        "{%0, %1, %2, %3, %4, %5, %6, %7}, %8, %9, p, 1, 1, 0, 0; }"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]), "+f"(c[4]), "+f"(c[5]), "+f"(c[6]),
          "+f"(c[7])
        : "l"(desc(a)), "l"(desc(a + 2048))
        : "memory");
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
    if (bug == 4)
      asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(sa(&free_[st])) : "memory");
    if (bug == 1)
      asm volatile("wgmma.wait_group.sync.aligned 1;"
                   : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]), "+f"(c[4]), "+f"(c[5]),
                     "+f"(c[6]), "+f"(c[7])::"memory");
    else
      asm volatile("wgmma.wait_group.sync.aligned 0;"
                   : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]), "+f"(c[4]), "+f"(c[5]),
                     "+f"(c[6]), "+f"(c[7])::"memory");
    if (bug == 6 && i == 1 && t < 32) continue;
    if (bug != 4)
      asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(sa(&free_[st])) : "memory");
  }
  for (int i = 0; i < 8; i++) C[t * 8 + i] = c[i] + 1.0f;
  if (bug == 1) asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
}
// Named barriers. bug 1: no arrival at barrier 3; 2: two arrivals at barrier 3.
extern "C" __global__ void __launch_bounds__(128) named(float* x, int bug) {
  int w = threadIdx.x / 64;
  __shared__ float v[2];
  for (int i = 0; i < 4; i++) {
    if (w == 0) {
      asm volatile("bar.sync 2, 128;" ::: "memory");
      if (threadIdx.x == 0) v[0] = i;
      if (bug != 1) asm volatile("bar.arrive 3, 128;" ::: "memory");
      if (bug == 2) asm volatile("bar.arrive 3, 128;" ::: "memory");
    } else {
      asm volatile("bar.arrive 2, 128;" ::: "memory");
      asm volatile("bar.sync 3, 128;" ::: "memory");
      if (threadIdx.x == 64) x[i] = v[0];
    }
  }
}
extern "C" __global__ void __maxnreg__(128) regs(int* x, int bug) {
  if (threadIdx.x < 128) {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 224;");
    x[threadIdx.x] = 1;
  } else {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 32;");
    x[threadIdx.x] = 2;
  }
}
