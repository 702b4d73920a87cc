// Kernels with errors that ptxrun must find (test_ptxrun_checks.py). good_sync has no error.
// last_block_sum has a race between CTAs if fence is 0, shared_write is out of range if i > 0.
extern "C" {
__global__ void missing_sync(const float* a, float* b) {
  __shared__ float s[128];
  s[threadIdx.x] = a[threadIdx.x];
  b[threadIdx.x] = s[127 - threadIdx.x];
}
__global__ void missing_sync_in_loop(const float* a, float* b) {
  __shared__ float s[128];
  for (int k = 0; k < 2; k++) {
    s[threadIdx.x] = a[threadIdx.x] + k;
    __syncthreads();
    b[threadIdx.x] = s[127 - threadIdx.x];
  }
}
__global__ void write_after_read(const float* a, float* b) {
  __shared__ float s[128];
  int t = threadIdx.x;
  s[t] = a[t];
  __syncthreads();
  if (t < 32)
    b[t] = s[64 + t];
  else if (t >= 64)
    s[t] = 1;
}
__global__ void good_sync(const float* a, float* b) {
  __shared__ float s[128];
  for (int k = 0; k < 2; k++) {
    s[threadIdx.x] = a[threadIdx.x] + k;
    __syncthreads();
    b[threadIdx.x] = s[127 - threadIdx.x];
    __syncthreads();
  }
}
__global__ void misaligned(const char* a, float* b) {
  b[threadIdx.x] = *(const float*)(a + 4 * threadIdx.x + 1);
}
__global__ void misaligned_vector(const float* a, float* b) {
  float4 v = *(const float4*)(a + 4 * threadIdx.x + 1);
  b[threadIdx.x] = v.x + v.w;
}
__global__ void shared_write(float* b, int i) {
  extern __shared__ float d[];
  d[threadIdx.x + i] = 1;
  __syncthreads();
  b[threadIdx.x] = d[threadIdx.x];
}
__global__ void divergent_barrier(float* b) {
  if (threadIdx.x & 1) {
    b[threadIdx.x] = 1;
    __syncthreads();
  } else {
    b[threadIdx.x] = 2;
    __syncthreads();
    b[threadIdx.x] = 3;
  }
}
__global__ void divergent_shuffle(int* b) {
  int v = threadIdx.x;
  if (threadIdx.x < 16) v = __shfl_xor_sync(0xffffffffu, v, 1);
  b[threadIdx.x] = v;
}
__global__ void spin(volatile int* f) {
  while (*f == 0) {
  }
}
__global__ void deadlock(float* b) {
  if (threadIdx.x < 32)
    asm volatile("bar.sync 1, 64;");
  else
    asm volatile("bar.sync 2, 64;");
  b[threadIdx.x] = 1;
}
__global__ void copy_without_wait(const float4* a, float* b) {
  __shared__ float4 s[32];
  unsigned d = (unsigned)__cvta_generic_to_shared(&s[threadIdx.x]);
  asm volatile("cp.async.ca.shared.global [%0], [%1], 16;" ::"r"(d), "l"(a + threadIdx.x));
  b[threadIdx.x] = s[threadIdx.x].x;
}
__global__ void read_before_wait(const float4* a, float* b, int n) {
  __shared__ float4 s[2][32];
  int t = threadIdx.x;
  for (int k = 0; k < 2; k++) {
    unsigned d = (unsigned)__cvta_generic_to_shared(&s[k][t]);
    asm volatile("cp.async.ca.shared.global [%0], [%1], 16; cp.async.commit_group;" ::"r"(d),
                 "l"(a + k * 32 + t));
  }
  asm volatile("cp.async.wait_group 1;");
  b[t] = s[0][t].x;
  b[32 + t] = s[1][t].x;
  asm volatile("cp.async.wait_group 0;");
  b[64 + t] = s[1][t].x;
}
__global__ void last_block_sum(const float* a, float* part, int* cnt, float* out, int fence) {
  __shared__ int last;
  float v = a[blockIdx.x * 32 + threadIdx.x];
  for (int o = 16; o; o >>= 1) v += __shfl_xor_sync(~0u, v, o);
  if (threadIdx.x == 0) {
    part[blockIdx.x] = v;
    if (fence) __threadfence();
    last = atomicAdd(cnt, 1) == gridDim.x - 1;
  }
  __syncthreads();
  if (last) {
    if (fence) __threadfence();
    if (threadIdx.x == 0) {
      float s = 0;
      for (int i = 0; i < gridDim.x; i++) s += part[i];
      *out = s;
    }
  }
}
}
