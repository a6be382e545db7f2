// Compiles CUDA C++ kernels with a host compiler and runs them on the CPU: a test instrument, never shipped.
//
// Included by csrc/cuda/launch.cuh in place of <cuda_runtime.h> where SF_CUDA_EMULATOR is defined. The
// kernels' source is unchanged; only two things differ between the builds, both macros: the launch
// (SF_LAUNCH) and the declaration of dynamic shared memory (SF_DYNAMIC_SMEM). The toolkit's own headers
// supply the vector types and the host paths of bf16 and fp16 arithmetic.
//
// What it checks, and how:
//   barriers, warp masks   the scheduler (scheduler.h) ends the launch and names the thread
//   bounds, alignment      AddressSanitizer and UBSan see ordinary host memory
//   races                  ThreadSanitizer sees one fiber per CUDA thread, ordered by barriers only
//   uninitialised memory   dynamic shared memory begins as NaN in every block
//   clusters               their blocks run together: barrier, distributed shared memory, launch limits
//   mbarriers              one phase of transactions: bytes that other blocks store asynchronously
// What it cannot check: timing, the accuracy of approximate instructions (modelled as exact), races between
// clusters (they run one after another), weak memory ordering, inline PTX, tensor cores. Static shared memory
// is one variable for all blocks: a kernel that is launched in clusters keeps to dynamic shared memory.
#pragma once

#include <cuda_runtime_api.h>
// After the runtime's types, which they use.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <math_constants.h>

// NDEBUG must not be defined: the tests rely on the kernels' own assertions.
#include <cassert>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <tuple>
#include <type_traits>
#include <utility>

#include "scheduler.h"

// The language. The toolkit's headers define most of these for nvcc's eyes only.
#undef __global__
#undef __device__
#undef __host__
#undef __shared__
#undef __constant__
#undef __launch_bounds__
#undef __grid_constant__
#undef __cluster_dims__
#define __global__
#define __device__
#define __host__
// Clusters run one at a time on one host thread, so one copy per kernel serves all but clusters of several
// blocks; thread_local would hide the variable from AddressSanitizer.
#define __shared__ static
#define __constant__ static
#define __launch_bounds__(...)
#define __grid_constant__
#define __cluster_dims__(...)
// Inlined frames lose their line in a sanitizer's report, and forcing it slows the instrumented build.
#undef __forceinline__
#define __forceinline__ inline
// Empty rather than an attribute: libstdc++ spells the attribute with this very name.
#undef __noinline__
#define __noinline__

#define threadIdx (::cuda_emulator::thread_index())
#define blockIdx (::cuda_emulator::block_index())
#define blockDim (::cuda_emulator::block_dim())
#define gridDim (::cuda_emulator::grid_dim())
constexpr int warpSize = 32;

#define SF_LAUNCH(kernel, grid, block, smem_bytes, stream, ...) \
  ::cuda_emulator::launch(#kernel, kernel, grid, block, smem_bytes, stream __VA_OPT__(, ) __VA_ARGS__)

#define SF_DYNAMIC_SMEM(type, name) \
  type* const name = static_cast<type*>(::cuda_emulator::dynamic_shared_memory())

namespace cuda_emulator {

// Runs a whole launch before it returns; every thread gets its own copy of the arguments, as on a GPU.
template <typename... Parameters, typename... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
            cudaStream_t, Arguments&&... arguments) {
  const std::tuple<std::remove_cvref_t<Parameters>...> values(std::forward<Arguments>(arguments)...);
  const LaunchShape shape{grid, block, shared_bytes, name, 1, reinterpret_cast<const void*>(kernel)};
  run_grid(shape, [&] { std::apply(kernel, std::tuple<std::remove_cvref_t<Parameters>...>(values)); });
}

}  // namespace cuda_emulator

// The runtime's C++ forms, which <cuda_runtime.h> defines for nvcc.
template <typename... Parameters>
cudaError_t cudaFuncSetAttribute(void (*kernel)(Parameters...), cudaFuncAttribute attribute, int value) {
  return cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), attribute, value);
}

template <typename... Parameters>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, void (*kernel)(Parameters...)) {
  return cudaFuncGetAttributes(attributes, reinterpret_cast<const void*>(kernel));
}

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  const std::tuple<std::remove_cvref_t<Parameters>...> values(std::forward<Arguments>(arguments)...);
  const auto shape = ::cuda_emulator::shape_of(*config, reinterpret_cast<const void*>(kernel));
  ::cuda_emulator::run_grid(
      shape, [&] { std::apply(kernel, std::tuple<std::remove_cvref_t<Parameters>...>(values)); });
  return cudaSuccess;
}

#include "emulated_functions.h"
#include "warp_functions.h"
