// Sums or means of consecutive segments of a vector, and their gradient.
//
//   out_s = sum_{n in [c_s, c_{s+1})} values_n  (/ length for a mean);   d_values_n = d_out_s  (/ length)
//
// | tensor     | shape    | dtype | segment_sum | segment_sum_backward |
// | values     | (N,)     | f32   | read        | -                    |
// | cu_seqlens | (S + 1,) | int32 | read        | read                 |
// | out        | (S,)     | f32   | written     | -                    |
// | d_out      | (S,)     | f32   | -           | read                 |
// | d_values   | (N,)     | f32   | -           | written              |
//
// One block per segment; float32 accumulators; a fixed tree, no atomics, so the same bits every time. Bytes
// moved: 4 N read or written. Empty segments give 0 and write nothing. Entries of d_values outside every
// segment are left as they are.
#include <algorithm>

#include "block_sum.cuh"
#include "kernels.h"

namespace slime_fused::cuda {
namespace {

constexpr int kThreads = 256;

__global__ void __launch_bounds__(kThreads) segment_sum_kernel(const float* values, const int32_t* cu_seqlens,
                                                               float* out, int64_t segments, bool mean) {
  __shared__ float partials[kThreads / 32];
  for (int64_t s = blockIdx.x; s < segments; s += gridDim.x) {
    const int begin = cu_seqlens[s];
    const int end = cu_seqlens[s + 1];
    float sum = 0.f;
    for (int n = begin + static_cast<int>(threadIdx.x); n < end; n += kThreads) sum += values[n];
    sum = block_sum<kThreads>(sum, partials);
    if (threadIdx.x == 0) out[s] = mean && end > begin ? sum / static_cast<float>(end - begin) : sum;
  }
}

__global__ void __launch_bounds__(kThreads)
    segment_sum_backward_kernel(const float* d_out, const int32_t* cu_seqlens, float* d_values,
                                int64_t segments, bool mean) {
  for (int64_t s = blockIdx.x; s < segments; s += gridDim.x) {
    const int begin = cu_seqlens[s];
    const int end = cu_seqlens[s + 1];
    const float d = mean && end > begin ? d_out[s] / static_cast<float>(end - begin) : d_out[s];
    for (int n = begin + static_cast<int>(threadIdx.x); n < end; n += kThreads) d_values[n] = d;
  }
}

}  // namespace

void segment_sum(const float* values, const int32_t* cu_seqlens, float* out, int64_t segments, bool mean,
                 cudaStream_t stream) {
  if (segments <= 0) return;
  const auto grid = static_cast<unsigned>(std::min(segments, kMaxBlocks));
  SF_LAUNCH(segment_sum_kernel, grid, kThreads, 0, stream, values, cu_seqlens, out, segments, mean);
  check_launch("segment_sum", segments, 0);
}

void segment_sum_backward(const float* d_out, const int32_t* cu_seqlens, float* d_values, int64_t segments,
                          bool mean, cudaStream_t stream) {
  if (segments <= 0) return;
  const auto grid = static_cast<unsigned>(std::min(segments, kMaxBlocks));
  SF_LAUNCH(segment_sum_backward_kernel, grid, kThreads, 0, stream, d_out, cu_seqlens, d_values, segments,
            mean);
  check_launch("segment_sum_backward", segments, 0);
}

}  // namespace slime_fused::cuda
