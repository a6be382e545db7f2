// The logits kernels on the CPU: arguments checked, rows spread over threads. Formulas: row_kernels.cpp.
#pragma once

#include "row_kernels.h"

namespace slime_fused::cpu {

// Each throws std::invalid_argument before anything is written if an argument is wrong; see checks.h.
void softmax_residual(const SoftmaxResidualArgs& args, int num_threads);
void logits_stats(const LogitsStatsArgs& args, int num_threads);
void residual_from_stats(const ResidualFromStatsArgs& args, int num_threads);

}  // namespace slime_fused::cpu
