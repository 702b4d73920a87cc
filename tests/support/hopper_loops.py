"""CUDA C++ sources of small Hopper kernels: wgmma, named barriers, warp specialization."""

FENCE = 'asm volatile("wgmma.fence.sync.aligned;" ::: "memory");\n'
COMMIT = 'asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");\n'
WAIT = 'asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");\n'


def wgmma(n, b="db"):
    k = n // 2
    regs = ", ".join(f"%{i}" for i in range(k))
    outs = ", ".join(f'"+f"(d[{i}])' for i in range(k))
    return (
        f'asm volatile("wgmma.mma_async.sync.aligned.m64n{n}k16.f32.bf16.bf16 "\n'
        f'"{{{regs}}}, %{k}, %{k + 1}, 1, 1, 1, 0, 0;\\n"'
        f' : {outs} : "l"(da), "l"({b}));\n'
    )


def product(steps=4, touch=False, threads=128, who="true", barrier="", bounds=True):
    """Return a kernel whose loop has one product of `steps` wgmmas, and exponentials.

    Args:
        steps: number of wgmmas.
        touch: use an accumulator while its wgmma is in flight; ptxas then serializes the wgmmas.
        threads: threads per block.
        who: condition, in C, under which a thread runs the loop.
        barrier: statement executed in every iteration.
        bounds: whether the kernel has __launch_bounds__.
    """

    def step(j):
        return wgmma(64, f"db + {j}") + ("d[3] *= s;\n" if touch else "")

    return f"""
extern "C" __global__ void {f"__launch_bounds__({threads})" if bounds else ""}
k(float* out, unsigned long long da, unsigned long long db, int n, float s, int count) {{
  float d[32];
  for (int i = 0; i < 32; i++) d[i] = 0;
  if ({who}) {{
#pragma unroll 1
    for (int t = 0; t < n; t++) {{
      {FENCE}{"".join(step(j) for j in range(steps))}{COMMIT}{WAIT}
      for (int i = 0; i < 32; i++) d[i] = exp2f(d[i]);
      {barrier}
    }}
  }}
  for (int i = 0; i < 32; i++) out[i * {threads} + threadIdx.x] = d[i];
}}"""


def bar(text, *values):
    ops = ", ".join(f'"r"({v})' for v in values)
    return f'asm volatile("{text}" :: {ops} : "memory");'


def specialized():
    """Return a kernel in which warps 0-3 load and warps 4-11 are two consumer warpgroups.

    The consumers alternate; the named barriers 8 and 9 order them.
    """
    return f"""
__device__ __forceinline__ void wait(unsigned bar, int phase) {{
  asm volatile("{{ .reg .pred P; W: mbarrier.try_wait.parity.shared.b64 P, [%0], %1; "
               "@P bra D; bra W; D: }}" :: "r"(bar), "r"(phase) : "memory");
}}
extern "C" __global__ void __launch_bounds__(384, 1)
k(float* out, const float4* in, unsigned long long da, unsigned long long db, int n) {{
  extern __shared__ float4 s[];
  __shared__ unsigned long long bar[2];
  unsigned full = __cvta_generic_to_shared(bar), empty = full + 8;
  int wg = threadIdx.x / 128;
  if (threadIdx.x == 0)
    asm volatile("mbarrier.init.shared.b64 [%0], 128; mbarrier.init.shared.b64 [%1], 256;"
                 :: "r"(full), "r"(empty) : "memory");
  __syncthreads();
  if (wg == 0) {{
    asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
#pragma unroll 1
    for (int t = 0; t < n; t++) {{
      wait(empty, (t & 1) ^ 1);
      asm volatile("cp.async.ca.shared.global [%0], [%1], 16;"
                   :: "r"((unsigned)__cvta_generic_to_shared(s + threadIdx.x)),
                      "l"(in + t * 128 + threadIdx.x) : "memory");
      asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" :: "r"(full) : "memory");
    }}
  }} else {{
    asm volatile("setmaxnreg.inc.sync.aligned.u32 240;");
    float d[64], p = 0;
    for (int i = 0; i < 64; i++) d[i] = 0;
    int me = 7 + wg, you = 10 - wg;
    if (wg == 1) asm volatile("bar.arrive %0, 256;" :: "r"(8) : "memory");
#pragma unroll 1
    for (int t = 0; t < n; t++) {{
      wait(full, t & 1);
      {bar("bar.sync %0, 256;", "me")}
      {FENCE}{"".join(wgmma(128, f"db + {j}") for j in range(4))}{COMMIT}
      {bar("bar.arrive %0, 256;", "you")}
      {WAIT}
      asm volatile("mbarrier.arrive.shared.b64 _, [%0];" :: "r"(empty) : "memory");
#pragma unroll
      for (int i = 0; i < 64; i++) p += exp2f(d[i]);
      {bar("bar.sync %0, 128;", "wg")}
    }}
    for (int i = 0; i < 64; i++) out[i * 256 + threadIdx.x] = d[i] + p;
  }}
}}"""
