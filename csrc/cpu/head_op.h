// The head transform on vectors: from the raw product h W^T to the logit z, and its derivative.
//
//   y = scale * (raw + bias);   z = y / T, or (c / T) * tanh(y / c) under a soft cap c (T: the temperature)
//   d z / d raw = (scale / T) * slope,   slope = 1 - tanh(y / c)^2 under a soft cap, else 1
//
// The quotients by T are constants, so a temperature costs nothing beside a scale or a cap.
#pragma once

#include "row_dispatch.h"
#include "simd.h"

namespace slime_fused::cpu::SLIME_FUSED_ISA {
namespace {

// z and, for the residual, its slope, of one vector of logits.
template <typename Scalar>
struct Logit {
  Vec<Scalar> z;
  Vec<Scalar> slope;  // only set for Head::capped
};

template <DType kType, Head kHead>
struct HeadOp {
  using S = Storage<kType>;
  using Elem = typename S::Elem;
  using Scalar = typename S::Scalar;
  static constexpr int kLanes = Acc<Scalar>::kLanes;

  explicit HeadOp(const HeadTransform& head)
      : bias(static_cast<const Elem*>(head.bias)),
        scale(static_cast<Scalar>(kHead == Head::capped ? head.scale : full_scale(head))),
        cap(static_cast<Scalar>(head.softcap / head.temperature)),
        inverse_cap(static_cast<Scalar>(1.0 / (head.softcap == 0.0 ? 1.0 : head.softcap))) {}

  Logit<Scalar> operator()(const Elem* row, int64_t v, int count) const {
    Vec<Scalar> offset{};
    if (kHead != Head::plain && bias != nullptr) offset = load<S>(bias + v, count);
    return transform(load<S>(row + v, count), offset);
  }

  // 2 * kLanes logits in two vectors, in the order of load_pair.
  Pair<Logit<Scalar>> pair(const Elem* row, int64_t v) const {
    Pair<Vec<Scalar>> offset{};
    if (kHead != Head::plain && bias != nullptr) offset = load_pair<S>(bias + v);
    const Pair<Vec<Scalar>> raw = load_pair<S>(row + v);
    return {transform(raw.first, offset.first), transform(raw.second, offset.second)};
  }

  Logit<Scalar> transform(Vec<Scalar> y, Vec<Scalar> offset) const {
    if constexpr (kHead != Head::plain) y = as_rounded((y + offset) * scale);
    if constexpr (kHead != Head::capped) return {y, y};
    const Vec<Scalar> t = vec_tanh(y * inverse_cap);
    return {as_rounded(t * cap), Scalar(1) - t * t};
  }

  const Elem* bias;    // [V]
  Scalar scale;        // the temperature included, but for Head::capped
  Scalar cap;          // c / T
  Scalar inverse_cap;  // 1 / c
};

}  // namespace
}  // namespace slime_fused::cpu::SLIME_FUSED_ISA
