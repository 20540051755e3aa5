// What special functions cost a Hopper scheduler, alone and among multiplications:
//   nvcc -O3 -arch=sm_90 benchmarks/special_functions.cu -o special_functions && ./special_functions
// Prints cycles a scheduler and warp for one of each group, all schedulers full, at the clock that the card reports.
#include <cstdio>

enum Group { TANH, EXP2, TANH_AND_FMA, EXP2_AND_FMA, FMA, TANH_OF_HALVES, EXP2_OF_HALVES };

__device__ void fma(float& x, int times) {
  for (int i = 0; i < times; i++) asm volatile("fma.rn.f32 %0, %0, %0, %0;" : "+f"(x));
}

template <int GROUP> __device__ void once(float& x) {
  if (GROUP == TANH || GROUP == TANH_AND_FMA) asm volatile("tanh.approx.f32 %0, %0;" : "+f"(x));
  if (GROUP == EXP2 || GROUP == EXP2_AND_FMA) asm volatile("ex2.approx.ftz.f32 %0, %0;" : "+f"(x));
  if (GROUP == TANH_AND_FMA || GROUP == EXP2_AND_FMA) fma(x, 7);
  if (GROUP == FMA) fma(x, 8);
  unsigned bits = __float_as_uint(x);
  if (GROUP == TANH_OF_HALVES) asm volatile("tanh.approx.f16x2 %0, %0;" : "+r"(bits));
  if (GROUP == EXP2_OF_HALVES) asm volatile("ex2.approx.f16x2 %0, %0;" : "+r"(bits));
  x = __uint_as_float(bits);
}

template <int GROUP> __global__ void repeated(float* out, int times) {
  float x[8];
  for (int i = 0; i < 8; i++) x[i] = threadIdx.x * 1e-3f + i;
  for (int k = 0; k < times; k++)
    for (int i = 0; i < 8; i++) once<GROUP>(x[i]);
  float sum = 0;
  for (int i = 0; i < 8; i++) sum += x[i];
  out[blockIdx.x * blockDim.x + threadIdx.x] = sum;
}

template <int GROUP> void measure(const char* name) {
  int processors, kilohertz, times = 4000;
  cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, 0);
  cudaDeviceGetAttribute(&kilohertz, cudaDevAttrClockRate, 0);
  // 16 warps for each of a multiprocessor's four schedulers.
  int blocks = processors * 8, threads = 256;
  float *out, least = 1e9f, ms;
  cudaMalloc(&out, blocks * threads * sizeof(float));
  cudaEvent_t begin, end;
  cudaEventCreate(&begin), cudaEventCreate(&end);
  for (int round = 0; round < 5; round++) {
    cudaEventRecord(begin);
    repeated<GROUP><<<blocks, threads>>>(out, times);
    cudaEventRecord(end);
    cudaEventSynchronize(end);
    cudaEventElapsedTime(&ms, begin, end);
    least = ms < least ? ms : least;
  }
  cudaFree(out);
  double groups = double(blocks) * (threads / 32) * 8 * times / (processors * 4);
  printf("%-16s %6.2f cycles  %s\n", name, least * kilohertz / groups, cudaGetErrorString(cudaGetLastError()));
}

int main() {
  measure<TANH>("tanh");
  measure<EXP2>("ex2");
  measure<TANH_AND_FMA>("tanh and 7 fma");
  measure<EXP2_AND_FMA>("ex2 and 7 fma");
  measure<FMA>("8 fma");
  measure<TANH_OF_HALVES>("tanh of 2 halves");
  measure<EXP2_OF_HALVES>("ex2 of 2 halves");
}
