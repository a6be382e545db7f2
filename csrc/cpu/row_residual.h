// The residual of a row of logits from its statistics: with p_v = exp(z_v - max) / sum,
//
//   r * d(token loss)/dz_v + g * dH/dz_v,   dH/dz_v = -p_v (log p_v + H),   H = -sum_v p_v log p_v the
//   entropy,
//
// times d z / d raw. r and g are numbers of the row.
#pragma once

#include <math.h>

#include "head_op.h"
#include "simd.h"

namespace slime_fused::cpu::SLIME_FUSED_ISA {
namespace {

// The residual of a row is  (exp(x_v) * (gain + tilt * x_v) - offset) * slope_v with x_v = z_v - shift, but
// for the label's entry.
template <typename Scalar>
struct RowResidual {
  Scalar shift, gain, tilt, offset;
  int64_t label;       // column of the label in this block, or -1
  Scalar label_value;  // its entry, without slope
};

// kTilted: whether the row's tilt is used; it costs a product and a clamp per vector.
template <DType kOut, bool kTilted, DType kType, Head kHead>
void write_residual(const HeadOp<kType, kHead>& head, const typename Storage<kType>::Elem* in,
                    typename Storage<kOut>::Elem* out, int64_t cols,
                    const RowResidual<typename Storage<kType>::Scalar>& row) {
  using S = Storage<kOut>;
  using Scalar = typename S::Scalar;
  using V = Vec<Scalar>;
  constexpr int kLanes = Acc<Scalar>::kLanes;
  constexpr Scalar kExpLimit = sizeof(Scalar) == 4 ? Scalar(88.7) : Scalar(709.7);
  const V shift = broadcast(row.shift), gain = broadcast(row.gain), offset = broadcast(row.offset);
  const V tilt = broadcast(row.tilt);

  const auto value = [&](const Logit<Scalar>& logit) {
    // Above 0 only where a caller's maximum is not the row's.
    const V x = clamp_for_exp(smaller(broadcast(kExpLimit), logit.z - shift));
    V r = exp_of_clamped(x);
    if constexpr (kTilted) {
      r = r * (tilt * x + gain) - offset;
    } else {
      r = r * gain - offset;
    }
    if constexpr (kHead == Head::capped) return r * logit.slope;
    return r;
  };
  // Read before the row is overwritten: out may be in.
  Scalar label_value = row.label_value;
  if (row.label >= 0) label_value *= kHead == Head::capped ? head(in, row.label, 1).slope[0] : Scalar(1);

  int64_t v = 0;
  for (; v + 4 * kLanes <= cols; v += 4 * kLanes) {
    Pair<V> r[2];
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      const Pair<Logit<Scalar>> logits = head.pair(in, v + 2 * i * kLanes);
      r[i] = {value(logits.first), value(logits.second)};
    }
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      if constexpr (kType == kOut) {
        store_pair<S>(out + v + 2 * i * kLanes, r[i]);
      } else {  // float32 is loaded in order, which 16 bits are not in a pair
        store<S>(out + v + 2 * i * kLanes, r[i].first);
        store<S>(out + v + (2 * i + 1) * kLanes, r[i].second);
      }
    }
  }
  for (; v < cols; v += kLanes) {
    const int count = cols - v < kLanes ? static_cast<int>(cols - v) : kLanes;
    store<S>(out + v, value(head(in, v, count)), count);
  }
  if (row.label >= 0) store<S>(out + row.label, broadcast(label_value), 1);
}

// What the loss adds to softmax - onehot, per row: gain on p, offset per column, and the label's entry
//   (1 + 2 z_loss lse) p - (1 - eps) - eps / V  =  expm1(logp) + 2 z_loss lse p + eps - eps / V.
template <typename Scalar>
struct LossTerms {
  LossTerms(const TokenLoss& token_loss, const HeadTransform& head)
      : eps(static_cast<Scalar>(token_loss.label_smoothing)),
        eps_per_column(
            static_cast<Scalar>(token_loss.label_smoothing / static_cast<double>(token_loss.vocab))),
        z_loss(static_cast<Scalar>(token_loss.z_loss)),
        scale(static_cast<Scalar>(full_scale(head))) {}

  RowResidual<Scalar> residual(Scalar shift, Scalar inverse_sum, Scalar lse, Scalar logp, int64_t label,
                               Scalar row_scale) const {
    const Scalar factor = scale * row_scale;
    const Scalar from_z_loss = Scalar(2) * z_loss * lse;
    Scalar entry = scalar_expm1(logp) + (eps - eps_per_column);
    if (z_loss != 0) entry += from_z_loss * scalar_exp(logp);
    return {shift, inverse_sum * (Scalar(1) + from_z_loss) * factor,
            0,     eps_per_column * factor,
            label, entry * factor};
  }

  // Adds entropy_scale * -p_v (log p_v + entropy), with log p_v = x_v - log_sum.
  void add_entropy(RowResidual<Scalar>& row, Scalar inverse_sum, Scalar log_sum, Scalar logp, Scalar entropy,
                   Scalar entropy_scale) const {
    const Scalar factor = -(scale * entropy_scale);
    row.tilt = inverse_sum * factor;
    row.gain += row.tilt * (entropy - log_sum);
    const Scalar label_logp = clamp_exponent(logp);
    row.label_value += factor * (scalar_exp(label_logp) * (label_logp + entropy));
  }

  Scalar eps, eps_per_column, z_loss, scale;
};

}  // namespace
}  // namespace slime_fused::cpu::SLIME_FUSED_ISA
