// Softmax statistics and residuals of logit rows, compiled once per instruction set (SLIME_FUSED_ISA).
//
//   forward    lse = log sum_v exp z_v,   logp = z_y - lse
//   gradient   d loss / d raw_v = ((1 + 2 z_loss lse) p_v - eps / V - (1 - eps) [v = y]) * scale * slope_v,
//              slope_v = 1 - (z_v / c)^2 under a soft cap c, else 1
//
//   | tensor                 | shape | dtype            |                                          |
//   |------------------------|-------|------------------|------------------------------------------|
//   | in                     | M, V  | f32/bf16/f16/f64 | read twice: from memory, then from cache |
//   | out                    | M, V  | same; f32 logits: or bf16/f16 | written once, may be `in`   |
//   | bias                   | V     | same             | read, optional                           |
//   | row_max, row_sum, logp | M     | acc              | written; residual_from_stats: read       |
//
// lse travels as row_max and row_sum = sum_v exp(z_v - row_max): rounded to one number it would cost every
// probability of a row |lse| roundings.
// Accumulation  float32, float64 for f64. Memory traffic: one read and one write of M x V elements while
//               a row fits the L2 cache; about 2 exp per element.
// Determinism   a row's result depends on the row alone, so neither threads nor ranges change a bit.
// Special       -inf logits count as probability 0; NaN, +inf or a row of -inf gives NaN, as in PyTorch.
// Label entry   formed from expm1(logp), because p - 1 cancels when the token is likely.
#include "row_kernels.h"

#include "row_dispatch.h"
#include "simd.h"

namespace slime_fused::cpu::SLIME_FUSED_ISA {
namespace {

// Vectors per step of the statistics. 8 keep a step of z in registers on AVX-512, and make the branch on a
// new maximum rare.
constexpr int kUnroll = 8;

// z and, for the residual, d z / d raw without the scale, of one vector of logits.
template <typename Scalar>
struct Logit {
  Vec<Scalar> z;
  Vec<Scalar> slope;  // 1 - (z / c)^2; only set for Head::capped
};

template <DType kType, Head kHead>
struct HeadOp {
  using S = Storage<kType>;
  using Elem = typename S::Elem;
  using Scalar = typename S::Scalar;
  static constexpr int kLanes = Acc<Scalar>::kLanes;

  explicit HeadOp(const HeadTransform& head)
      : bias(static_cast<const Elem*>(head.bias)),
        scale(static_cast<Scalar>(head.scale)),
        cap(static_cast<Scalar>(head.softcap)),
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

  const Elem* bias;  // [V]
  Scalar scale, cap, inverse_cap;
};

template <typename Scalar>
struct RowStats {
  Scalar max, sum, logit_sum;  // max_v z, sum_v exp(z - max), sum_v z
};

// exp(z - max) needs a finite shift: where all logits are -inf so far, 0 keeps their exp at 0, not NaN.
template <typename Scalar>
inline Scalar finite_shift(Scalar max) {
  return max == -Scalar(INFINITY) ? Scalar(0) : max;
}

inline float scalar_exp(float x) { return expf(x); }
inline double scalar_exp(double x) { return exp(x); }
inline float scalar_log(float x) { return logf(x); }
inline double scalar_log(double x) { return log(x); }
inline float scalar_expm1(float x) { return expm1f(x); }
inline double scalar_expm1(double x) { return expm1(x); }

// One visit of a row: online maximum and sum. The maximum is one number for all lanes; it grows about ln(V /
// 128) times in a row of random order, so the rescale below is a rare branch.
template <DType kType, Head kHead, bool kLogitSum>
RowStats<typename Storage<kType>::Scalar> row_stats(const HeadOp<kType, kHead>& head,
                                                    const typename Storage<kType>::Elem* row, int64_t cols) {
  using Scalar = typename Storage<kType>::Scalar;
  using V = Vec<Scalar>;
  constexpr int kLanes = Acc<Scalar>::kLanes;
  Scalar max = -Scalar(INFINITY);
  V sum{}, logit_sum{};

  const auto raise_max = [&](V candidates) {
    if (!any_greater(candidates, max)) return;
    const Scalar grown = horizontal_max<Scalar>(candidates);
    sum *= scalar_exp(max - grown);
    max = grown;
  };

  int64_t v = 0;
  for (; v + kUnroll * kLanes <= cols; v += kUnroll * kLanes) {
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
    V partial[2] = {};
#pragma GCC unroll 8
    for (int i = 0; i < kUnroll; ++i) partial[i % 2] += vec_exp(z[i] - shift);
    sum += partial[0] + partial[1];
    if constexpr (kLogitSum) {
      logit_sum += ((z[0] + z[1]) + (z[2] + z[3])) + ((z[4] + z[5]) + (z[6] + z[7]));
    }
  }

  for (; v < cols; v += kLanes) {  // tail: less than kUnroll vectors, the last one partly filled
    const int count = cols - v < kLanes ? static_cast<int>(cols - v) : kLanes;
    V z = head(row, v, count).z;
    V z_or_zero = z;
    for (int i = count; i < kLanes; ++i) {
      z[i] = -Scalar(INFINITY);
      z_or_zero[i] = 0;
    }
    raise_max(z);
    sum += vec_exp(z - broadcast(finite_shift(max)));
    if constexpr (kLogitSum) logit_sum += z_or_zero;
  }
  return {max, horizontal_sum<Scalar>(sum), horizontal_sum<Scalar>(logit_sum)};
}

// The residual of a row is  (exp(z_v - shift) * gain - offset) * slope_v, but for the label's entry.
template <typename Scalar>
struct RowResidual {
  Scalar shift, gain, offset;
  int64_t label;       // column of the label in this block, or -1
  Scalar label_value;  // its entry, without slope
};

template <DType kOut, DType kType, Head kHead>
void write_residual(const HeadOp<kType, kHead>& head, const typename Storage<kType>::Elem* in,
                    typename Storage<kOut>::Elem* out, int64_t cols,
                    const RowResidual<typename Storage<kType>::Scalar>& row) {
  using S = Storage<kOut>;
  using Scalar = typename S::Scalar;
  using V = Vec<Scalar>;
  constexpr int kLanes = Acc<Scalar>::kLanes;
  constexpr Scalar kExpLimit = sizeof(Scalar) == 4 ? Scalar(88.7) : Scalar(709.7);
  const V shift = broadcast(row.shift), gain = broadcast(row.gain), offset = broadcast(row.offset);

  const auto value = [&](const Logit<Scalar>& logit) {
    const V x = logit.z - shift;  // above 0 only where a caller's maximum is not the row's
    const V r = vec_exp(smaller(broadcast(kExpLimit), x)) * gain - offset;
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
        scale(static_cast<Scalar>(head.scale)) {}

  RowResidual<Scalar> residual(Scalar shift, Scalar inverse_sum, Scalar lse, Scalar logp, int64_t label,
                               Scalar row_scale) const {
    const Scalar factor = scale * row_scale;
    const Scalar from_z_loss = Scalar(2) * z_loss * lse;
    Scalar entry = scalar_expm1(logp) + (eps - eps_per_column);
    if (z_loss != 0) entry += from_z_loss * scalar_exp(logp);
    return {shift, inverse_sum * (Scalar(1) + from_z_loss) * factor, eps_per_column * factor, label,
            entry * factor};
  }

  Scalar eps, eps_per_column, z_loss, scale;
};

template <typename Elem>
inline void zero_row(Elem* row, int64_t cols) {
  __builtin_memset(row, 0, static_cast<size_t>(cols) * sizeof(Elem));
}

template <DType kType, DType kOut, Head kHead>
void softmax_residual_rows(const SoftmaxResidualArgs& args, int64_t begin, int64_t end) {
  using Elem = typename Storage<kType>::Elem;
  using OutElem = typename Storage<kOut>::Elem;
  using Scalar = typename Storage<kType>::Scalar;
  const LogitsBlock& block = args.block;
  const HeadOp<kType, kHead> head(args.head);
  const LossTerms<Scalar> terms(args.token_loss, args.head);
  const bool wants_logit_sum = args.loss != nullptr && terms.eps != 0;
  Scalar* const row_max = static_cast<Scalar*>(args.row_max);  // [M]
  Scalar* const row_sum = static_cast<Scalar*>(args.row_sum);  // [M]
  Scalar* const logp_out = static_cast<Scalar*>(args.logp);    // [M]
  Scalar* const loss_out = static_cast<Scalar*>(args.loss);    // [M] or null

  for (int64_t m = begin; m < end; ++m) {
    const Elem* const in = static_cast<const Elem*>(block.in) + m * block.in_stride;  // [V]
    OutElem* const out = static_cast<OutElem*>(block.out) + m * block.out_stride;     // [V]
    const int64_t label = args.labels[m];
    if (label < 0) {
      zero_row(out, block.cols);
      row_max[m] = logp_out[m] = 0;
      row_sum[m] = 1;
      if (loss_out != nullptr) loss_out[m] = 0;
      continue;
    }
    const RowStats<Scalar> stats = wants_logit_sum ? row_stats<kType, kHead, true>(head, in, block.cols)
                                                   : row_stats<kType, kHead, false>(head, in, block.cols);
    const Scalar log_sum = scalar_log(stats.sum);
    const Scalar lse = stats.max + log_sum;
    // Not z - lse: at |z| = 1e4 the rounding of lse alone would be 5e-4.
    const Scalar logp = (head(in, label, 1).z[0] - stats.max) - log_sum;
    row_max[m] = stats.max;
    row_sum[m] = stats.sum;
    logp_out[m] = logp;
    if (loss_out != nullptr) {
      Scalar loss = -(Scalar(1) - terms.eps) * logp + terms.z_loss * lse * lse;
      if (terms.eps != 0) loss += terms.eps * (lse - stats.logit_sum / static_cast<Scalar>(block.cols));
      loss_out[m] = loss;
    }
    write_residual<kOut>(
        head, in, out, block.cols,
        terms.residual(finite_shift(stats.max), Scalar(1) / stats.sum, lse, logp, label, Scalar(1)));
  }
}

template <DType kType, Head kHead>
void logits_stats_rows(const LogitsStatsArgs& args, int64_t begin, int64_t end) {
  using Elem = typename Storage<kType>::Elem;
  using Scalar = typename Storage<kType>::Scalar;
  const LogitsBlock& block = args.block;
  const HeadOp<kType, kHead> head(args.head);
  Scalar* const row_max = static_cast<Scalar*>(args.row_max);
  Scalar* const row_sum = static_cast<Scalar*>(args.row_sum);
  Scalar* const label_logit = static_cast<Scalar*>(args.label_logit);
  Scalar* const logit_sum = static_cast<Scalar*>(args.logit_sum);

  for (int64_t m = begin; m < end; ++m) {
    const Elem* const in = static_cast<const Elem*>(block.in) + m * block.in_stride;  // [V]
    const RowStats<Scalar> stats = logit_sum != nullptr
                                       ? row_stats<kType, kHead, true>(head, in, block.cols)
                                       : row_stats<kType, kHead, false>(head, in, block.cols);
    const int64_t column = args.labels[m] < 0 ? -1 : args.labels[m] - block.col_offset;
    const bool has_label = column >= 0 && column < block.cols;
    const Scalar z_label = has_label ? head(in, column, 1).z[0] : Scalar(0);
    if (!args.merge) {
      row_max[m] = stats.max;
      row_sum[m] = stats.sum;
      label_logit[m] = z_label;
      if (logit_sum != nullptr) logit_sum[m] = stats.logit_sum;
      continue;
    }
    const Scalar max = stats.max > row_max[m] ? stats.max : row_max[m];
    const Scalar shift = finite_shift(max);
    row_sum[m] = row_sum[m] * scalar_exp(row_max[m] - shift) + stats.sum * scalar_exp(stats.max - shift);
    row_max[m] = max;
    if (has_label) label_logit[m] = z_label;
    if (logit_sum != nullptr) logit_sum[m] += stats.logit_sum;
  }
}

template <DType kType, DType kOut, Head kHead>
void residual_from_stats_rows(const ResidualFromStatsArgs& args, int64_t begin, int64_t end) {
  using Elem = typename Storage<kType>::Elem;
  using OutElem = typename Storage<kOut>::Elem;
  using Scalar = typename Storage<kType>::Scalar;
  const LogitsBlock& block = args.block;
  const HeadOp<kType, kHead> head(args.head);
  const LossTerms<Scalar> terms(args.token_loss, args.head);
  const Scalar* const row_max = static_cast<const Scalar*>(args.row_max);      // [M]
  const Scalar* const row_sum = static_cast<const Scalar*>(args.row_sum);      // [M]
  const Scalar* const logp = static_cast<const Scalar*>(args.logp);            // [M]
  const Scalar* const row_scale = static_cast<const Scalar*>(args.row_scale);  // [M] or null

  for (int64_t m = begin; m < end; ++m) {
    const Elem* const in = static_cast<const Elem*>(block.in) + m * block.in_stride;  // [V]
    OutElem* const out = static_cast<OutElem*>(block.out) + m * block.out_stride;     // [V]
    if (args.labels[m] < 0) {
      zero_row(out, block.cols);
      continue;
    }
    const int64_t column = args.labels[m] - block.col_offset;
    const int64_t label = column >= 0 && column < block.cols ? column : -1;
    const Scalar factor = row_scale != nullptr ? row_scale[m] : Scalar(1);
    const Scalar lse = row_max[m] + scalar_log(row_sum[m]);
    write_residual<kOut>(
        head, in, out, block.cols,
        terms.residual(finite_shift(row_max[m]), Scalar(1) / row_sum[m], lse, logp[m], label, factor));
  }
}

void softmax_residual(const SoftmaxResidualArgs& args, int64_t begin, int64_t end) {
  with_dtypes(args.block, [&]<DType kType, DType kOut>() {
    with_head(args.head, [&]<Head kHead>() { softmax_residual_rows<kType, kOut, kHead>(args, begin, end); });
  });
}

void logits_stats(const LogitsStatsArgs& args, int64_t begin, int64_t end) {
  with_dtype(args.block.dtype, [&]<DType kType>() {
    with_head(args.head, [&]<Head kHead>() { logits_stats_rows<kType, kHead>(args, begin, end); });
  });
}

void residual_from_stats(const ResidualFromStatsArgs& args, int64_t begin, int64_t end) {
  with_dtypes(args.block, [&]<DType kType, DType kOut>() {
    with_head(args.head,
              [&]<Head kHead>() { residual_from_stats_rows<kType, kOut, kHead>(args, begin, end); });
  });
}

#define SLIME_FUSED_STRING2(x) #x
#define SLIME_FUSED_STRING(x) SLIME_FUSED_STRING2(x)

}  // namespace

const RowKernels kRowKernels = {SLIME_FUSED_STRING(SLIME_FUSED_ISA), softmax_residual, logits_stats,
                                residual_from_stats};

}  // namespace slime_fused::cpu::SLIME_FUSED_ISA
