// How a kernel is launched, and the one place that includes the CUDA runtime.
//
// Every launch goes through SF_LAUNCH and every dynamic shared array through SF_DYNAMIC_SMEM, because those
// two are the only parts of CUDA C++ that a plain C++ compiler cannot parse: with SF_CUDA_EMULATOR defined, a
// header of the tests supplies both, and the same kernel sources run on a CPU under its sanitizers.
#pragma once

#ifdef SF_CUDA_EMULATOR
#include "cuda_emulator.h"
#else
#include <cuda_runtime.h>
#endif

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <mutex>
#include <stdexcept>
#include <string>

#ifndef SF_CUDA_EMULATOR

#define SF_LAUNCH(kernel, grid, block, smem_bytes, stream, ...) \
  (kernel)<<<(grid), (block), (smem_bytes), (stream)>>>(__VA_ARGS__)

// One untyped array per translation unit: extern shared arrays of one name must agree in type.
#define SF_DYNAMIC_SMEM(type, name)                               \
  extern __shared__ __align__(128) unsigned char sf_smem_bytes[]; \
  type* name = reinterpret_cast<type*>(sf_smem_bytes)

#endif

namespace slime_fused::cuda {

// The largest grid of a one-dimensional launch. Kernels stride over what is left, so that any number of rows
// works; below it the hardware's own scheduler balances better than a persistent grid.
inline constexpr int64_t kMaxBlocks = int64_t{1} << 30;

// Throws with the kernel's name and sizes if the launch before it failed. Does not wait for the kernel.
inline void check_launch(const char* kernel, int64_t rows, int64_t cols) {
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string("launch of CUDA kernel ") + kernel +
                             " (rows=" + std::to_string(rows) + ", cols=" + std::to_string(cols) +
                             ") failed: " + cudaGetErrorString(error));
  }
}

struct LaunchShape {
  int64_t blocks = 1;
  int threads = 32;
  int smem_bytes = 0;
  int cluster = 1;  // blocks that share a row and see each other's shared memory
};

// What `kernel` was compiled for, as 10 * major + minor: below the device's capability where it comes from
// PTX of an older architecture, which knows no newer instruction.
template <class... Params>
int compiled_capability(void (*kernel)(Params...)) {
  cudaFuncAttributes attributes{};
  const cudaError_t error = cudaFuncGetAttributes(&attributes, kernel);
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string("cudaFuncGetAttributes failed: ") + cudaGetErrorString(error));
  }
  return attributes.ptxVersion;
}

// Lets `kernel` take `bytes` of dynamic shared memory; only ever raises the limit, so that a launch of
// another thread keeps what it asked for.
template <class... Params>
void allow_shared_memory(void (*kernel)(Params...), int bytes) {
  static std::mutex one_at_a_time;
  const std::lock_guard lock(one_at_a_time);
  cudaFuncAttributes attributes{};
  if (cudaFuncGetAttributes(&attributes, kernel) == cudaSuccess &&
      attributes.maxDynamicSharedSizeBytes < bytes) {
    cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  }
}

// Launches `kernel` with clusters of `shape.cluster` blocks; shape.blocks must be a multiple of it.
template <class... Params, class... Args>
void launch_clustered(void (*kernel)(Params...), const LaunchShape& shape, cudaStream_t stream,
                      Args... args) {
  const auto grid = static_cast<unsigned>(shape.blocks);
  const auto block = static_cast<unsigned>(shape.threads);
  // Above 48 KB a kernel must opt in, and so must a cluster of more than 8 blocks. Failures surface in
  // check_launch: the launch that follows reports them again.
  if (shape.smem_bytes > 48 * 1024) allow_shared_memory(kernel, shape.smem_bytes);
  if (shape.cluster > 1) {
    if (shape.cluster > 8) cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {static_cast<unsigned>(shape.cluster), 1, 1};
    const cudaLaunchConfig_t config{dim3(grid), dim3(block), static_cast<size_t>(shape.smem_bytes),
                                    stream,     &attribute,  1};
    cudaLaunchKernelEx(&config, kernel, args...);
    return;
  }
  SF_LAUNCH(kernel, grid, block, static_cast<size_t>(shape.smem_bytes), stream, args...);
}

}  // namespace slime_fused::cuda
