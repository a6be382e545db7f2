// The sum of one float per thread of a block, by a fixed tree: the same bits in every thread and every run.
#pragma once

#include "launch.cuh"

namespace slime_fused::cuda {

// `partials` [kThreads / 32] is shared memory; the barriers allow calls one after another with the same
// array.
template <int kThreads>
__device__ inline float block_sum(float x, float* partials) {
  static_assert(kThreads % 32 == 0 && kThreads <= 1024);
  const int lane = static_cast<int>(threadIdx.x) & 31;
  const int warp = static_cast<int>(threadIdx.x) >> 5;
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
  __syncthreads();
  if (lane == 0) partials[warp] = x;
  __syncthreads();
  float sum = 0.f;
#pragma unroll
  for (int w = 0; w < kThreads / 32; ++w) sum += partials[w];
  return sum;
}

}  // namespace slime_fused::cuda
