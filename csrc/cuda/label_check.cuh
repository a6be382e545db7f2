// What a label at or above the vocabulary gets: its value and row on the device's console, then a trap.
#pragma once

#include <cstdio>

#include "launch.cuh"

namespace slime_fused::cuda {

// Out of line: printf takes its arguments through local memory, which the kernels otherwise do not touch.
__device__ __noinline__ inline void report_bad_label(int64_t label, int64_t row, int64_t vocab) {
  printf("slime_fused: labels[%lld] = %lld is not in [0, %lld)\n", static_cast<long long>(row),
         static_cast<long long>(label), static_cast<long long>(vocab));
  __trap();
}

}  // namespace slime_fused::cuda
