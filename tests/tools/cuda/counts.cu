// Kernels with known traffic, bank conflicts and divergence (test_ptxrun_profile.py).
extern "C" __global__ void strided(const float* a, float* o, int s) {
  o[threadIdx.x] = a[threadIdx.x * s];
}
extern "C" __global__ void zigzag(const float* a, float* o) {
  o[threadIdx.x] = a[(threadIdx.x & 1) * 64 + (threadIdx.x >> 1)];
}
extern "C" __global__ void banks(float* o, int s) {
  __shared__ float m[32 * 32];
  for (int i = 0; i < 32; i++) m[i * 32 + threadIdx.x] = i;
  __syncthreads();
  o[threadIdx.x] = m[threadIdx.x * s];
}
extern "C" __global__ void divergent(float* o) {
  if (threadIdx.x & 1) o[threadIdx.x] = sqrtf(o[threadIdx.x]);
}
