// The launchers of csrc/cuda: they check what a host can see, launch on `stream`, and return.
//
// All pointers are device pointers. Statistics, log-probabilities and loss terms are float32; logits are f32,
// bf16 or f16 (f64 has no CUDA kernels). Shapes in brackets; M rows of logits, V columns, N tokens, S
// sequences, P pairs. A function throws std::invalid_argument for arguments it cannot take and
// std::runtime_error where the launch itself failed; a label at or above the vocabulary traps on the device,
// without a wait on the host.
#pragma once

#include <cuda_runtime_api.h>

#include "../include/slime_fused.h"
#include "row_plan.h"

namespace slime_fused::cuda {

// Columns that one row may have: row-local indices are 32-bit, with room for one grid stride beyond the end.
inline constexpr int64_t kMaxCols = (int64_t{1} << 31) - (int64_t{1} << 20);

// block.out = d(token loss)/d(raw logits), in the dtype of the logits or 16 bits for f32 ones (then with a
// plan of stage `shared`); row_max, row_sum, logp [M]; loss [M] or null. labels [M].
void softmax_residual(const LogitsBlock& block, const int64_t* labels, const HeadTransform& head,
                      const TokenLoss& token_loss, float* row_max, float* row_sum, float* logp, float* loss,
                      const RowPlan& plan, cudaStream_t stream);

// row_max, row_sum, label_logit [M]; logit_sum [M] or null; centred_sum, square_sum, max_before [M], or all
// three null. With `merge` they are updated.
void logits_stats(const LogitsBlock& block, const int64_t* labels, const HeadTransform& head, float* row_max,
                  float* row_sum, float* label_logit, float* logit_sum, float* centred_sum, float* square_sum,
                  float* max_before, bool merge, cudaStream_t stream);

// What softmax_residual was compiled for on the current device, as 10 * major + minor: its plan must not ask
// for more.
int row_kernel_capability();

// As softmax_residual from known row_max, row_sum, logp [M], times row_scale [M] or null, plus entropy_scale
// [M] times the gradient of the row's entropy [M], or both null. token_loss.vocab: the whole vocabulary.
void residual_from_stats(const LogitsBlock& block, const int64_t* labels, const HeadTransform& head,
                         const TokenLoss& token_loss, const float* row_max, const float* row_sum,
                         const float* logp, const float* row_scale, const float* entropy,
                         const float* entropy_scale, cudaStream_t stream);

// out [S] = sum or mean of values [N] over [cu_seqlens[s], cu_seqlens[s + 1]); cu_seqlens [S + 1].
void segment_sum(const float* values, const int32_t* cu_seqlens, float* out, int64_t segments, bool mean,
                 cudaStream_t stream);
void segment_sum_backward(const float* d_out, const int32_t* cu_seqlens, float* d_values, int64_t segments,
                          bool mean, cudaStream_t stream);

// The five outputs are [P]; d_logp [N] or null; cu_seqlens [2 P + 1].
void slime_terms(const float* logp, const int32_t* cu_seqlens, int64_t pairs, const SlimeParams& params,
                 float* chosen_logps, float* rejected_logps, float* anchor, float* margin_loss,
                 float* stabilizer, float* d_logp, cudaStream_t stream);

// data [n] *= *factor, a float32 on the device; costs nothing where it is exactly 1.
void scale_in_place(void* data, int64_t n, DType dtype, const float* factor, cudaStream_t stream);

}  // namespace slime_fused::cuda
