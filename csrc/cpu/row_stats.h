// Softmax statistics of a row of logits in one visit, and of two ranges of columns together.
//
//   max = max_v z_v,   sum = sum_v exp(z_v - max),   logit_sum = sum_v z_v
//   centred_sum = sum_v exp(z_v - max) (z_v - max)   entropy = log(sum) - centred_sum / sum
//   square_sum  = sum_v exp(z_v - max)^2             sum_v p_v^2 = square_sum / sum^2
//   max_before  = max of z before the label          the label is argmax's choice: z_y >= max, z_y >
//   max_before
//
// A new maximum m' leaves share = exp(m - m') of the sum, share^2 of square_sum, and share * (centred_sum +
// sum * (m - m')) of centred_sum. Never sum_v exp(z_v) z_v: at logits of 5e4 what is left of it is rounding.
#pragma once

#include <math.h>

#include "head_op.h"
#include "simd.h"

namespace slime_fused::cpu::SLIME_FUSED_ISA {
namespace {

// Vectors per step of the statistics. 8 keep a step of z in registers on AVX-512, and make the branch on a
// new maximum rare.
constexpr int kUnroll = 8;

// Which statistics a visit forms; each includes those before it.
enum class Wanted { softmax, logit_sum, moments };

template <typename Scalar>
struct RowStats {
  Scalar max = -Scalar(INFINITY), sum = 0, logit_sum = 0;
  Scalar centred_sum = 0, square_sum = 0, max_before = -Scalar(INFINITY);
};

// The largest z of columns [begin, end), or `max` where that is larger.
template <DType kType, Head kHead>
typename Storage<kType>::Scalar largest(const HeadOp<kType, kHead>& head,
                                        const typename Storage<kType>::Elem* row, int64_t begin, int64_t end,
                                        typename Storage<kType>::Scalar max) {
  constexpr int kLanes = HeadOp<kType, kHead>::kLanes;
  for (int64_t v = begin; v < end; v += kLanes) {
    const int count = end - v < kLanes ? static_cast<int>(end - v) : kLanes;
    const auto z = head(row, v, count).z;
    for (int i = 0; i < count; ++i) max = z[i] > max ? z[i] : max;
  }
  return max;
}

// One visit of a row: online maximum and sums. The maximum is one number for all lanes; it grows about ln(V /
// 128) times in a row of random order, so the rescale below is a rare branch. `label` is its column, below 0
// for none and at or above cols where it lies behind these columns.
template <Wanted kWanted, DType kType, Head kHead>
RowStats<typename Storage<kType>::Scalar> row_stats(const HeadOp<kType, kHead>& head,
                                                    const typename Storage<kType>::Elem* row, int64_t cols,
                                                    int64_t label) {
  using Scalar = typename Storage<kType>::Scalar;
  using V = Vec<Scalar>;
  constexpr int kLanes = Acc<Scalar>::kLanes;
  constexpr bool kMoments = kWanted == Wanted::moments;
  Scalar max = -Scalar(INFINITY);
  V sum{}, logit_sum{}, centred_sum{}, square_sum{};
  // Columns before the label: whole steps, after which the running maximum is theirs, and less than one more.
  const int64_t before = label < 0 ? 0 : label < cols ? label : cols;
  const int64_t in_steps = before - before % (kUnroll * kLanes);
  Scalar max_in_steps = max;

  const auto raise_max = [&](V candidates) {
    if (!any_greater(candidates, max)) return;
    const Scalar grown = horizontal_max<Scalar>(candidates);
    const Scalar share = scalar_exp(max - grown);
    if constexpr (kMoments) {
      centred_sum = (centred_sum + sum * clamp_exponent(max - grown)) * share;
      square_sum *= share * share;
    }
    sum *= share;
    max = grown;
  };

  int64_t v = 0;
  for (; v + kUnroll * kLanes <= cols; v += kUnroll * kLanes) {
    if (kMoments && v == in_steps) max_in_steps = max;
    V z[kUnroll];
#pragma GCC unroll 4
    for (int i = 0; i < kUnroll; i += 2) {
      const Pair<Logit<Scalar>> logits = head.pair(row, v + i * kLanes);
      z[i] = logits.first.z;
      z[i + 1] = logits.second.z;
    }
    V best[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) best[i] = larger(z[i], z[i + 4]);
    best[0] = larger(best[0], best[1]);
    best[2] = larger(best[2], best[3]);
    raise_max(larger(best[0], best[2]));

    const V shift = broadcast(finite_shift(max));
    V partial[2] = {}, partial_centred{}, partial_square{};
#pragma GCC unroll 8
    for (int i = 0; i < kUnroll; ++i) {
      const V x = clamp_for_exp(z[i] - shift);
      const V e = exp_of_clamped(x);
      partial[i % 2] += e;
      if constexpr (kMoments) {
        partial_centred += e * x;
        partial_square += e * e;
      }
    }
    sum += partial[0] + partial[1];
    if constexpr (kMoments) {
      centred_sum += partial_centred;
      square_sum += partial_square;
    }
    if constexpr (kWanted != Wanted::softmax) {
      logit_sum += ((z[0] + z[1]) + (z[2] + z[3])) + ((z[4] + z[5]) + (z[6] + z[7]));
    }
  }

  if (kMoments && v == in_steps) max_in_steps = max;

  for (; v < cols; v += kLanes) {  // tail: less than kUnroll vectors, the last one partly filled
    const int count = cols - v < kLanes ? static_cast<int>(cols - v) : kLanes;
    V z = head(row, v, count).z;
    V z_or_zero = z;
    for (int i = count; i < kLanes; ++i) {
      z[i] = -Scalar(INFINITY);
      z_or_zero[i] = 0;
    }
    raise_max(z);
    const V x = clamp_for_exp(z - broadcast(finite_shift(max)));
    const V e = exp_of_clamped(x);
    sum += e;
    if constexpr (kMoments) {
      centred_sum += e * x;
      square_sum += e * e;
    }
    if constexpr (kWanted != Wanted::softmax) logit_sum += z_or_zero;
  }

  RowStats<Scalar> stats;
  stats.max = max;
  stats.sum = horizontal_sum<Scalar>(sum);
  stats.logit_sum = horizontal_sum<Scalar>(logit_sum);
  if constexpr (kMoments) {
    stats.centred_sum = horizontal_sum<Scalar>(centred_sum);
    stats.square_sum = horizontal_sum<Scalar>(square_sum);
    stats.max_before = largest(head, row, in_steps, before, max_in_steps);
  }
  return stats;
}

// The statistics of two ranges of columns as those of both.
template <typename Scalar>
RowStats<Scalar> merged(const RowStats<Scalar>& a, const RowStats<Scalar>& b) {
  RowStats<Scalar> both;
  both.max = b.max > a.max ? b.max : a.max;
  const Scalar shift = finite_shift(both.max);
  const Scalar down_a = clamp_exponent(a.max - shift), down_b = clamp_exponent(b.max - shift);
  const Scalar share_a = scalar_exp(down_a), share_b = scalar_exp(down_b);
  both.sum = a.sum * share_a + b.sum * share_b;
  both.logit_sum = a.logit_sum + b.logit_sum;
  both.centred_sum = share_a * (a.centred_sum + a.sum * down_a) + share_b * (b.centred_sum + b.sum * down_b);
  both.square_sum = share_a * share_a * a.square_sum + share_b * share_b * b.square_sum;
  both.max_before = b.max_before > a.max_before ? b.max_before : a.max_before;
  return both;
}

}  // namespace
}  // namespace slime_fused::cpu::SLIME_FUSED_ISA
