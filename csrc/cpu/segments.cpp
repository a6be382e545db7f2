// Segment sums and the SLIME terms (arXiv 2602.02383, eq. 5 to 10) of P pairs on N tokens.
//
//   m_w, m_l    mean log-prob of the chosen / rejected response       D = m_w - m_l
//   anchor     -lambda_w m_w                                          weight 1 / pairs
//   margin      lambda_d h s,  h = max(0, m_h - D),  s = sigma(-kappa (D - m_s))
//   stabilizer  lambda_l sum_t sp(u_t)^p n,  u_t = -logp_t - delta    n = pair_weight / |y_l| or token_weight
//   gradient    dD = -lambda_d (s + kappa h s (1 - s)) where D < m_h, else 0
//               chosen token (dD - lambda_w) / |y_w|;  rejected -dD / |y_l| - lambda_l p sp^(p-1) sigma(u) n
//
// All arithmetic is double and each sum runs in token order, so results depend on neither threads nor widths.
#include "segments.h"

#include <cmath>
#include <string>

#include "checks.h"
#include "thread_pool.h"

namespace slime_fused::cpu {
namespace {

// About 50 ns a token (exp and pow): below this a thread's wake-up costs more than it saves.
constexpr int64_t kTokensPerPart = 2048;

void check_segments(const Segments& segments, int num_threads) {
  check_at_least(segments.count, 0, "number of segments");
  check_at_least(segments.tokens, 0, "number of tokens");
  check_at_least(num_threads, 1, "num_threads");
  if (segments.count == 0) return;
  check_pointer(segments.cu_seqlens, "cu_seqlens");
  int64_t previous = 0;
  for (int64_t s = 0; s <= segments.count; ++s) {
    const int64_t offset = segments.cu_seqlens[s];
    if (offset < previous || offset > segments.tokens) {
      throw std::invalid_argument("cu_seqlens: expected non-decreasing offsets within [0, " +
                                  std::to_string(segments.tokens) + "], got " + std::to_string(offset) +
                                  " after " + std::to_string(previous) + " at index " + std::to_string(s));
    }
    previous = offset;
  }
}

// Segments of average length make parts of about kTokensPerPart tokens.
int64_t segments_per_part(const Segments& segments) {
  return kTokensPerPart * segments.count / (segments.tokens + 1) + 1;
}

double sigmoid(double x) {
  const double e = std::exp(-std::fabs(x));
  return (x >= 0 ? 1.0 : e) / (1.0 + e);
}

double softplus(double x) { return std::fmax(x, 0.0) + std::log1p(std::exp(-std::fabs(x))); }

template <typename T>
double sum_of(const T* values, int64_t begin, int64_t end) {
  double sum = 0;
  for (int64_t n = begin; n < end; ++n) sum += static_cast<double>(values[n]);
  return sum;
}

// 1 / length, and 0 for an empty segment: its sum is 0, and a 0 mean is what the backend contract asks for.
double inverse_length(int64_t begin, int64_t end) {
  return end > begin ? 1.0 / static_cast<double>(end - begin) : 0.0;
}

struct MarginTerm {
  double value;     // h s
  double d_margin;  // d value / d D
};

MarginTerm margin_term(double margin, const SlimeParams& params) {
  if (margin >= params.margin_hard) return {0.0, 0.0};  // a NaN margin is not: it stays visible
  const double h = params.margin_hard - margin;
  const double x = -params.kappa * (margin - params.margin_soft);
  const double s = sigmoid(x);
  const double slope = s * sigmoid(-x);
  // Where the margin is -inf, h is inf and slope 0; the product's limit is 0.
  return {h * s, -(s + (slope == 0.0 ? 0.0 : params.kappa * h * slope))};
}

template <typename T>
void pair_terms(const SlimeTermsArgs<T>& args, int64_t pair) {
  const int32_t* const cu = args.segments.cu_seqlens;
  const int64_t pairs = args.segments.count / 2;
  const int64_t chosen_begin = cu[pair], chosen_end = cu[pair + 1];
  const int64_t rejected_begin = cu[pairs + pair], rejected_end = cu[pairs + pair + 1];
  const double chosen_inverse = inverse_length(chosen_begin, chosen_end);
  const double rejected_inverse = inverse_length(rejected_begin, rejected_end);
  const SlimeParams& p = args.params;

  const double chosen = sum_of(args.logp, chosen_begin, chosen_end) * chosen_inverse;
  const double rejected = sum_of(args.logp, rejected_begin, rejected_end) * rejected_inverse;
  const MarginTerm margin = margin_term(chosen - rejected, p);
  const double d_margin = p.lambda_d * p.pair_weight * margin.d_margin;
  const double token_weight =
      p.lambda_l * (p.token_weight == 0.0 ? p.pair_weight * rejected_inverse : p.token_weight);

  double stabilizer = 0;
  for (int64_t n = rejected_begin; n < rejected_end; ++n) {
    const double u = -static_cast<double>(args.logp[n]) - p.delta;
    const double sp = softplus(u);
    stabilizer += std::pow(sp, p.power);
    if (args.d_logp != nullptr) {
      const double slope = p.power * std::pow(sp, p.power - 1.0) * sigmoid(u);
      args.d_logp[n] = static_cast<T>(-d_margin * rejected_inverse - token_weight * slope);
    }
  }
  if (args.d_logp != nullptr) {
    const T g = static_cast<T>((d_margin - p.lambda_w * p.pair_weight) * chosen_inverse);
    for (int64_t n = chosen_begin; n < chosen_end; ++n) args.d_logp[n] = g;
  }
  args.chosen_logps[pair] = static_cast<T>(chosen);
  args.rejected_logps[pair] = static_cast<T>(rejected);
  args.anchor[pair] = static_cast<T>(-p.lambda_w * p.pair_weight * chosen);
  args.margin_loss[pair] = static_cast<T>(p.lambda_d * p.pair_weight * margin.value);
  args.stabilizer[pair] = static_cast<T>(token_weight * stabilizer);
}

}  // namespace

template <typename T>
void segment_sum(const T* values, const Segments& segments, T* out, bool mean, int num_threads) {
  check_segments(segments, num_threads);
  if (segments.count == 0) return;
  check_pointer(out, "out");
  if (segments.tokens > 0) check_pointer(values, "values");
  parallel_for(segments.count, segments_per_part(segments), num_threads, [&](int64_t first, int64_t last) {
    for (int64_t s = first; s < last; ++s) {
      const int64_t begin = segments.cu_seqlens[s], end = segments.cu_seqlens[s + 1];
      out[s] = static_cast<T>(sum_of(values, begin, end) * (mean ? inverse_length(begin, end) : 1.0));
    }
  });
}

template <typename T>
void segment_sum_backward(const T* d_out, const Segments& segments, T* d_values, bool mean, int num_threads) {
  check_segments(segments, num_threads);
  if (segments.count == 0 || segments.tokens == 0) return;
  check_pointer(d_out, "d_out");
  check_pointer(d_values, "d_values");
  parallel_for(segments.count, segments_per_part(segments), num_threads, [&](int64_t first, int64_t last) {
    for (int64_t s = first; s < last; ++s) {
      const int64_t begin = segments.cu_seqlens[s], end = segments.cu_seqlens[s + 1];
      const T d = static_cast<T>(static_cast<double>(d_out[s]) * (mean ? inverse_length(begin, end) : 1.0));
      for (int64_t n = begin; n < end; ++n) d_values[n] = d;
    }
  });
}

template <typename T>
void slime_terms(const SlimeTermsArgs<T>& args, int num_threads) {
  check_segments(args.segments, num_threads);
  check(args.segments.count % 2 == 0,
        "cu_seqlens: expected an even number of segments (chosen, then rejected), got " +
            std::to_string(args.segments.count));
  if (args.segments.count == 0) return;
  if (args.segments.tokens > 0) check_pointer(args.logp, "logp");
  check_pointer(args.chosen_logps, "chosen_logps");
  check_pointer(args.rejected_logps, "rejected_logps");
  check_pointer(args.anchor, "anchor");
  check_pointer(args.margin_loss, "margin_loss");
  check_pointer(args.stabilizer, "stabilizer");
  parallel_for(args.segments.count / 2, segments_per_part(args.segments), num_threads,
               [&](int64_t first, int64_t last) {
                 for (int64_t pair = first; pair < last; ++pair) pair_terms(args, pair);
               });
}

template void segment_sum(const float*, const Segments&, float*, bool, int);
template void segment_sum(const double*, const Segments&, double*, bool, int);
template void segment_sum_backward(const float*, const Segments&, float*, bool, int);
template void segment_sum_backward(const double*, const Segments&, double*, bool, int);
template void slime_terms(const SlimeTermsArgs<float>&, int);
template void slime_terms(const SlimeTermsArgs<double>&, int);

}  // namespace slime_fused::cpu
