// The row kernels' entry points, one table per instruction set. See row_kernels.cpp for what they compute.
#pragma once

#include "slime_fused.h"

namespace slime_fused::cpu {

// Statistics of a row, and the residual written from them. Accumulation type: `acc` of the block's dtype.
struct SoftmaxResidualArgs {
  LogitsBlock block;
  const int64_t* labels = nullptr;  // [M], negative: ignored row
  HeadTransform head;
  TokenLoss token_loss;
  void* row_max = nullptr;  // [M] acc, written
  void* row_sum = nullptr;  // [M] acc, written
  void* logp = nullptr;     // [M] acc, written
  void* loss = nullptr;     // [M] acc, written, or null
};

struct LogitsStatsArgs {
  LogitsBlock block;                // out is not used
  const int64_t* labels = nullptr;  // [M]
  HeadTransform head;
  void* row_max = nullptr;      // [M] acc, written (read too where merge)
  void* row_sum = nullptr;      // [M] acc, likewise
  void* label_logit = nullptr;  // [M] acc, likewise
  void* logit_sum = nullptr;    // [M] acc, likewise, or null
  void* centred_sum = nullptr;  // [M] acc, likewise, as the next two: all or none
  void* square_sum = nullptr;   // see row_stats.h for what they are
  void* max_before = nullptr;
  bool merge = false;
};

struct ResidualFromStatsArgs {
  LogitsBlock block;
  const int64_t* labels = nullptr;  // [M], negative: ignored row
  HeadTransform head;
  TokenLoss token_loss;
  const void* row_max = nullptr;        // [M] acc, of the whole vocabulary
  const void* row_sum = nullptr;        // [M] acc, likewise
  const void* logp = nullptr;           // [M] acc
  const void* row_scale = nullptr;      // [M] acc, or null
  const void* entropy = nullptr;        // [M] acc, of the whole vocabulary, or null
  const void* entropy_scale = nullptr;  // [M] acc, d(loss)/d(entropy); given where entropy is
};

// Each function works on rows [begin, end) and is safe to call at once on disjoint ranges.
struct RowKernels {
  const char* name;
  void (*softmax_residual)(const SoftmaxResidualArgs& args, int64_t begin, int64_t end);
  void (*logits_stats)(const LogitsStatsArgs& args, int64_t begin, int64_t end);
  void (*residual_from_stats)(const ResidualFromStatsArgs& args, int64_t begin, int64_t end);
};

namespace scalar {
extern const RowKernels kRowKernels;
}
namespace avx2 {
extern const RowKernels kRowKernels;
}
namespace avx512 {
extern const RowKernels kRowKernels;
}

}  // namespace slime_fused::cpu
