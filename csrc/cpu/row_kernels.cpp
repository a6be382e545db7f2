// Softmax statistics and residuals of logit rows, compiled once per instruction set (SLIME_FUSED_ISA).
//
//   forward    lse = log sum_v exp z_v,   logp = z_y - lse
//   gradient   d loss / d raw_v = ((1 + 2 z_loss lse) p_v - eps / V - (1 - eps) [v = y]) * d z_v / d raw_v
//
// z: head_op.h; the statistics: row_stats.h; the gradient and that of the entropy: row_residual.h.
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
#include "row_residual.h"
#include "row_stats.h"
#include "simd.h"

namespace slime_fused::cpu::SLIME_FUSED_ISA {
namespace {

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
    const RowStats<Scalar> stats = wants_logit_sum ? row_stats<Wanted::logit_sum>(head, in, block.cols, label)
                                                   : row_stats<Wanted::softmax>(head, in, block.cols, label);
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
    write_residual<kOut, false>(
        head, in, out, block.cols,
        terms.residual(finite_shift(stats.max), Scalar(1) / stats.sum, lse, logp, label, Scalar(1)));
  }
}

template <Wanted kWanted, DType kType, Head kHead>
void logits_stats_rows(const LogitsStatsArgs& args, int64_t begin, int64_t end) {
  using Elem = typename Storage<kType>::Elem;
  using Scalar = typename Storage<kType>::Scalar;
  const LogitsBlock& block = args.block;
  const HeadOp<kType, kHead> head(args.head);
  Scalar* const row_max = static_cast<Scalar*>(args.row_max);          // [M]
  Scalar* const row_sum = static_cast<Scalar*>(args.row_sum);          // [M]
  Scalar* const label_logit = static_cast<Scalar*>(args.label_logit);  // [M]
  Scalar* const logit_sum = static_cast<Scalar*>(args.logit_sum);      // [M] or null
  Scalar* const centred_sum = static_cast<Scalar*>(args.centred_sum);  // [M], as the two below
  Scalar* const square_sum = static_cast<Scalar*>(args.square_sum);
  Scalar* const max_before = static_cast<Scalar*>(args.max_before);

  for (int64_t m = begin; m < end; ++m) {
    const Elem* const in = static_cast<const Elem*>(block.in) + m * block.in_stride;  // [V]
    const int64_t column = args.labels[m] < 0 ? -1 : args.labels[m] - block.col_offset;
    const bool has_label = column >= 0 && column < block.cols;
    RowStats<Scalar> stats = row_stats<kWanted>(head, in, block.cols, column);
    if (args.merge) {
      RowStats<Scalar> earlier;
      earlier.max = row_max[m];
      earlier.sum = row_sum[m];
      if (logit_sum != nullptr) earlier.logit_sum = logit_sum[m];
      if constexpr (kWanted == Wanted::moments) {
        earlier.centred_sum = centred_sum[m];
        earlier.square_sum = square_sum[m];
        earlier.max_before = max_before[m];
      }
      stats = merged(earlier, stats);
    }
    row_max[m] = stats.max;
    row_sum[m] = stats.sum;
    if (has_label) {
      label_logit[m] = head(in, column, 1).z[0];
    } else if (!args.merge) {
      label_logit[m] = 0;
    }
    if (logit_sum != nullptr) logit_sum[m] = stats.logit_sum;
    if constexpr (kWanted == Wanted::moments) {
      centred_sum[m] = stats.centred_sum;
      square_sum[m] = stats.square_sum;
      max_before[m] = stats.max_before;
    }
  }
}

template <bool kEntropy, DType kType, DType kOut, Head kHead>
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
  const Scalar* const entropy = static_cast<const Scalar*>(args.entropy);      // [M] where kEntropy
  const Scalar* const entropy_scale = static_cast<const Scalar*>(args.entropy_scale);

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
    const Scalar log_sum = scalar_log(row_sum[m]), inverse_sum = Scalar(1) / row_sum[m];
    RowResidual<Scalar> row =
        terms.residual(finite_shift(row_max[m]), inverse_sum, row_max[m] + log_sum, logp[m], label, factor);
    if constexpr (kEntropy) {
      terms.add_entropy(row, inverse_sum, log_sum, logp[m], entropy[m], entropy_scale[m]);
    }
    write_residual<kOut, kEntropy>(head, in, out, block.cols, row);
  }
}

void softmax_residual(const SoftmaxResidualArgs& args, int64_t begin, int64_t end) {
  with_dtypes(args.block, [&]<DType kType, DType kOut>() {
    with_head(args.head, [&]<Head kHead>() { softmax_residual_rows<kType, kOut, kHead>(args, begin, end); });
  });
}

void logits_stats(const LogitsStatsArgs& args, int64_t begin, int64_t end) {
  with_dtype(args.block.dtype, [&]<DType kType>() {
    with_head(args.head, [&]<Head kHead>() {
      if (args.centred_sum != nullptr)
        return logits_stats_rows<Wanted::moments, kType, kHead>(args, begin, end);
      if (args.logit_sum != nullptr)
        return logits_stats_rows<Wanted::logit_sum, kType, kHead>(args, begin, end);
      logits_stats_rows<Wanted::softmax, kType, kHead>(args, begin, end);
    });
  });
}

void residual_from_stats(const ResidualFromStatsArgs& args, int64_t begin, int64_t end) {
  with_dtypes(args.block, [&]<DType kType, DType kOut>() {
    with_head(args.head, [&]<Head kHead>() {
      if (args.entropy != nullptr)
        return residual_from_stats_rows<true, kType, kOut, kHead>(args, begin, end);
      residual_from_stats_rows<false, kType, kOut, kHead>(args, begin, end);
    });
  });
}

#define SLIME_FUSED_STRING2(x) #x
#define SLIME_FUSED_STRING(x) SLIME_FUSED_STRING2(x)

}  // namespace

const RowKernels kRowKernels = {SLIME_FUSED_STRING(SLIME_FUSED_ISA), softmax_residual, logits_stats,
                                residual_from_stats};

}  // namespace slime_fused::cpu::SLIME_FUSED_ISA
