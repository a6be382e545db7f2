// Sums over the segments of a packed batch, and the terms of the SLIME loss.
#pragma once

#include "slime_fused.h"

namespace slime_fused::cpu {

// Segment s covers values [cu_seqlens[s], cu_seqlens[s + 1]).
struct Segments {
  const int32_t* cu_seqlens = nullptr;  // [S + 1], non-decreasing, within [0, tokens]
  int64_t count = 0;                    // S
  int64_t tokens = 0;                   // N
};

// T is float or double. Sums run in double, in the order of the tokens. An empty segment gives 0.
template <typename T>
void segment_sum(const T* values, const Segments& segments, T* out, bool mean, int num_threads);

// d_values[n] = d_out[segment of n], divided by the segment's length where mean.
template <typename T>
void segment_sum_backward(const T* d_out, const Segments& segments, T* d_values, bool mean, int num_threads);

template <typename T>
struct SlimeTermsArgs {
  const T* logp = nullptr;  // [N]
  Segments segments;        // 2P: chosen 0..P-1, rejected P..2P-1
  SlimeParams params;
  T* chosen_logps = nullptr;    // [P] mean log-prob of the chosen response, written
  T* rejected_logps = nullptr;  // [P] written
  T* anchor = nullptr;          // [P] this pair's share of the term, written
  T* margin_loss = nullptr;     // [P] written
  T* stabilizer = nullptr;      // [P] written
  T* d_logp = nullptr;          // [N] d(sum of all terms) / d logp, written, or null
};

template <typename T>
void slime_terms(const SlimeTermsArgs<T>& args, int num_threads);

}  // namespace slime_fused::cpu
