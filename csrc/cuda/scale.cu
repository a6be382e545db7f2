// Multiplies a tensor in place by one number that lies on the device.
//
//   data_i = round(data_i * factor)
//
// | tensor | shape | dtype          | access                          |
// | data   | (n,)  | f32, bf16, f16 | read and written; contiguous    |
// | factor | ()    | f32            | read                            |
//
// Bytes moved: 2 n elements, or none where factor is exactly 1: each thread reads it and returns. This is how
// an upstream gradient reaches gradients that were formed in the forward pass, without a wait on the host.
// Elementwise, so deterministic; the product is formed in float32 and rounded once. 64-bit indices.
#include <algorithm>

#include "dispatch.cuh"

namespace slime_fused::cuda {
namespace {

// 256 threads, 4 vectors in flight each; at most 16 blocks for each of 132 multiprocessors, then strided.
constexpr int kThreads = 256;
constexpr int kVectors = 4;
constexpr int64_t kScaleMaxBlocks = 132 * 16;

template <class T>
__global__ void __launch_bounds__(kThreads) scale_kernel(T* data, int64_t n, const float* factor_at) {
  constexpr int E = kVecElems<T>;
  const float factor = *factor_at;
  if (factor == 1.f) return;

  const int64_t to_boundary = elements_to_boundary(data);
  const int64_t head = to_boundary < n ? to_boundary : n;
  const int64_t vectors = (n - head) / E;
  const int64_t tail = head + vectors * E;
  auto* const body = reinterpret_cast<uint4*>(data + head);
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads * kVectors;

  for (int64_t first = static_cast<int64_t>(blockIdx.x) * kThreads * kVectors + threadIdx.x; first < vectors;
       first += step) {
    uint4 loaded[kVectors];
#pragma unroll
    for (int j = 0; j < kVectors; ++j) {
      if (first + j * kThreads < vectors) loaded[j] = load_once(body + first + j * kThreads);
    }
#pragma unroll
    for (int j = 0; j < kVectors; ++j) {
      if (first + j * kThreads >= vectors) break;
      float x[E];
      VecCodec<T>::unpack(loaded[j], x);
#pragma unroll
      for (int e = 0; e < E; ++e) x[e] *= factor;
      body[first + j * kThreads] = VecCodec<T>::pack(x);
    }
  }

  // Head and tail: fewer than 2 E elements, by the first threads of the first block.
  if (blockIdx.x > 0) return;
  const int64_t t = threadIdx.x;
  if (t < head) data[t] = from_float<T>(to_float(data[t]) * factor);
  if (tail + t < n) data[tail + t] = from_float<T>(to_float(data[tail + t]) * factor);
}

}  // namespace

void scale_in_place(void* data, int64_t n, DType dtype, const float* factor, cudaStream_t stream) {
  if (n < 0) throw std::invalid_argument("scale_: n must be non-negative, got " + std::to_string(n));
  if (n == 0) return;
  dispatch_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    const int64_t per_block = int64_t{kThreads} * kVectors * kVecElems<T>;
    const auto grid = static_cast<unsigned>(std::min((n + per_block - 1) / per_block, kScaleMaxBlocks));
    SF_LAUNCH(scale_kernel<T>, grid, kThreads, 0, stream, static_cast<T*>(data), n, factor);
  });
  check_launch("scale_", 1, n);
}

}  // namespace slime_fused::cuda
