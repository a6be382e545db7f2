// The three terms of the SLIME loss for every pair, and g = d(sum of all terms)/d(logp).
//
//   D = m_w - m_l (mean log-probs);  h = max(0, m_h - D);  s = sigmoid(-kappa (D - m_s));  u_t = -l_t - delta
//   anchor = -lambda_w m_w / P;  margin = lambda_d h s / P;  stabilizer = lambda_l n sum_t softplus(u_t)^p
//   dL/dD = -(lambda_d / P) [D < m_h] (s + kappa h s (1 - s))
//   chosen:   g_t = (dL/dD - lambda_w / P) / |y_w|
//   rejected: g_t = -(dL/dD) / |y_l| - lambda_l n p softplus(u_t)^(p-1) sigmoid(u_t)
// with n = 1 / (P |y_l|) ("sequence") or 1 / (rejected tokens of the batch) ("token").
//
// | tensor                            | shape      | dtype       | access  |
// | logp                              | (N,)       | f32         | read    |
// | cu_seqlens                        | (2 P + 1,) | int32       | read    |
// | chosen_logps, rejected_logps      | (P,)       | f32         | written |
// | anchor, margin_loss, stabilizer   | (P,)       | f32         | written |
// | d_logp                            | (N,)       | f32 or null | written |
//
// One block per pair; rejected tokens are read three times (from cache after the first), chosen ones once,
// both gradients written once. float32 accumulators, fixed trees, no atomics. An empty response counts as
// mean 0 with no gradient. Non-finite log-probs make the terms non-finite. Model: SLIME, arXiv 2602.02383,
// equations 5 to 10.
#include <algorithm>

#include "block_sum.cuh"
#include "kernels.h"

namespace slime_fused::cuda {
namespace {

constexpr int kThreads = 256;

struct TermsArgs {
  const float* logp;          // [N]
  const int32_t* cu_seqlens;  // [2 P + 1]
  float* chosen_logps;        // [P]
  float* rejected_logps;      // [P]
  float* anchor;              // [P]
  float* margin_loss;         // [P]
  float* stabilizer;          // [P]
  float* d_logp;              // [N] or null
  int64_t pairs;
  float lambda_w, lambda_l, lambda_d, delta, margin_hard, margin_soft, kappa, power, pair_weight,
      token_weight;
};

__device__ float softplus(float x) { return (x < 0.f ? 0.f : x) + log1pf(expf(-fabsf(x))); }

__device__ float sigmoid(float x) { return 1.f / (1.f + expf(-x)); }

__device__ float segment_mean(const float* logp, int begin, int end, float* partials) {
  float sum = 0.f;
  for (int n = begin + static_cast<int>(threadIdx.x); n < end; n += kThreads) sum += logp[n];
  sum = block_sum<kThreads>(sum, partials);
  return end > begin ? sum / static_cast<float>(end - begin) : 0.f;
}

__global__ void __launch_bounds__(kThreads) slime_terms_kernel(const TermsArgs a) {
  __shared__ float partials[kThreads / 32];
  const int t = static_cast<int>(threadIdx.x);

  for (int64_t pair = blockIdx.x; pair < a.pairs; pair += gridDim.x) {
    const int chosen_begin = a.cu_seqlens[pair];
    const int chosen_end = a.cu_seqlens[pair + 1];
    const int rejected_begin = a.cu_seqlens[a.pairs + pair];
    const int rejected_end = a.cu_seqlens[a.pairs + pair + 1];
    const float chosen_mean = segment_mean(a.logp, chosen_begin, chosen_end, partials);
    const float rejected_mean = segment_mean(a.logp, rejected_begin, rejected_end, partials);

    // Margin: comparisons are written so that a NaN margin stays NaN instead of becoming "satisfied".
    const float margin = chosen_mean - rejected_mean;
    const bool is_met = margin >= a.margin_hard;
    const float hinge = is_met ? 0.f : a.margin_hard - margin;
    const float gate = sigmoid(-a.kappa * (margin - a.margin_soft));
    const float d_margin =
        is_met ? 0.f : -a.lambda_d * a.pair_weight * (gate + a.kappa * hinge * gate * (1.f - gate));

    // Stabilizer: softplus(-l - delta)^p over the rejected tokens.
    const int rejected_tokens = rejected_end - rejected_begin;
    const float inv_rejected = rejected_tokens > 0 ? 1.f / static_cast<float>(rejected_tokens) : 0.f;
    const float token_weight = a.token_weight != 0.f ? a.token_weight : a.pair_weight * inv_rejected;
    float penalty = 0.f;
    for (int n = rejected_begin + t; n < rejected_end; n += kThreads) {
      penalty += powf(softplus(-a.logp[n] - a.delta), a.power);
    }
    penalty = block_sum<kThreads>(penalty, partials);

    if (t == 0) {
      a.chosen_logps[pair] = chosen_mean;
      a.rejected_logps[pair] = rejected_mean;
      a.anchor[pair] = -a.lambda_w * a.pair_weight * chosen_mean;
      a.margin_loss[pair] = a.lambda_d * a.pair_weight * hinge * gate;
      a.stabilizer[pair] = a.lambda_l * token_weight * penalty;
    }
    if (a.d_logp == nullptr) continue;

    const int chosen_tokens = chosen_end - chosen_begin;
    const float d_chosen =
        chosen_tokens > 0 ? (d_margin - a.lambda_w * a.pair_weight) / static_cast<float>(chosen_tokens) : 0.f;
    for (int n = chosen_begin + t; n < chosen_end; n += kThreads) a.d_logp[n] = d_chosen;
    for (int n = rejected_begin + t; n < rejected_end; n += kThreads) {
      const float u = -a.logp[n] - a.delta;
      const float d_penalty = a.power * powf(softplus(u), a.power - 1.f) * sigmoid(u);
      a.d_logp[n] = -d_margin * inv_rejected - a.lambda_l * token_weight * d_penalty;
    }
  }
}

}  // namespace

void slime_terms(const float* logp, const int32_t* cu_seqlens, int64_t pairs, const SlimeParams& params,
                 float* chosen_logps, float* rejected_logps, float* anchor, float* margin_loss,
                 float* stabilizer, float* d_logp, cudaStream_t stream) {
  if (pairs <= 0) return;
  const TermsArgs args{logp,
                       cu_seqlens,
                       chosen_logps,
                       rejected_logps,
                       anchor,
                       margin_loss,
                       stabilizer,
                       d_logp,
                       pairs,
                       static_cast<float>(params.lambda_w),
                       static_cast<float>(params.lambda_l),
                       static_cast<float>(params.lambda_d),
                       static_cast<float>(params.delta),
                       static_cast<float>(params.margin_hard),
                       static_cast<float>(params.margin_soft),
                       static_cast<float>(params.kappa),
                       static_cast<float>(params.power),
                       static_cast<float>(params.pair_weight),
                       static_cast<float>(params.token_weight)};
  SF_LAUNCH(slime_terms_kernel, static_cast<unsigned>(std::min(pairs, kMaxBlocks)), kThreads, 0, stream,
            args);
  check_launch("slime_terms", pairs, 0);
}

}  // namespace slime_fused::cuda
