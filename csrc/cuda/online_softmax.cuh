// The running (max, sum of exp, sum) of a row, kept per thread and merged without atomics.
//
// A thread visits each of its elements once: the maximum of one or several 16-byte vectors is taken first,
// and the running sum is rescaled to it. Exponentials are base 2 with log2(e) folded into one fused
// multiply-add: 2^(z log2e - shift), shift = fl(max log2e). Sums are relative to 2^shift, not to exp(max), so
// the rounding of the product cancels in every probability; where a sum leaves these helpers, `log_sum_exp`
// and `sum_relative_to_max` take it out. Beyond logits of 1.5e9 that rounding leaves the range of 2^x: NaN.
//
// -inf contributes 0 (the shift by a maximum of -inf is replaced by a shift by 0); NaN and +inf reach the sum
// as NaN. Merging is by fixed trees, so the same launch gives the same bits.
//
// Moments are kept where a template asks for them: sums of e x and e^2 over e = 2^x, from the same exponents
// x and exponentials as the sum itself, whose bits they leave alone, and the maximum over the columns before
// the label. `centred_sum` and `square_sum` take the rounding of the shift out of them.
#pragma once

#include "head_transform.cuh"
#include "row_plan.h"

namespace slime_fused::cuda {

inline constexpr float kLog2e = 1.4426950408889634f;
inline constexpr float kLn2 = 0.6931471805599453f;
inline constexpr unsigned kFullWarp = 0xffffffffu;

__device__ inline float negative_infinity() { return -INFINITY; }

struct RowStats {
  float max;
  float sum;        // sum of 2^(z log2e - exponent_shift(max))
  float logit_sum;  // sum of z; kept only where a template asks for it, as are the moments:
  float exponents;  // sum of 2^x x, x = z log2e - exponent_shift(max)
  float squares;    // sum of 2^(2 x)
  float max_before;

  __device__ static RowStats empty() {
    return {negative_infinity(), 0.f, 0.f, 0.f, 0.f, negative_infinity()};
  }
};

// max * log2e, or 0 where the maximum is -inf (every exponent is then -inf itself).
__device__ inline float exponent_shift(float max) { return max == negative_infinity() ? 0.f : max * kLog2e; }

// What a sum relative to maximum `from` is multiplied by to be relative to `to`; 0 where `from` is -inf.
__device__ inline float rescale_factor(float from, float to) {
  return from == negative_infinity() ? 0.f : exp2_approx(exponent_shift(from) - exponent_shift(to));
}

// max log2e - fl(max log2e), which the fused multiply-add gives without error.
__device__ inline float shift_rounding(float max) {
  return max == negative_infinity() ? 0.f : fmaf(max, kLog2e, -exponent_shift(max));
}

// log sum_v exp(z_v - max).
__device__ inline float log_sum_exp(const RowStats& stats) {
  return logf(stats.sum) - kLn2 * shift_rounding(stats.max);
}

// The other way round.
__device__ inline RowStats stats_of(float max, float sum_relative_to_max) {
  RowStats stats = RowStats::empty();
  stats.max = max;
  stats.sum = sum_relative_to_max * exp2_approx(shift_rounding(max));
  return stats;
}

// sum_v exp(z_v - max).
__device__ inline float sum_relative_to_max(const RowStats& stats) {
  return stats.sum * exp2_approx(-shift_rounding(stats.max));
}

// sum_v exp(z_v - max) (z_v - max).
__device__ inline float centred_sum(const RowStats& stats) {
  const float rounding = shift_rounding(stats.max);
  return kLn2 * exp2_approx(-rounding) * fmaf(-rounding, stats.sum, stats.exponents);
}

// sum_v exp(2 (z_v - max)).
__device__ inline float square_sum(const RowStats& stats) {
  const float factor = exp2_approx(-shift_rounding(stats.max));
  return stats.squares * factor * factor;
}

// An exponent as a factor of its own exponential: finite where that is 0, because 0 times -inf is NaN.
__device__ inline float finite_exponent(float x) { return fmaxf(x, -200.f); }

template <int E>
__device__ inline float tree_max(const float (&x)[E]) {
  float m = fmaxf(fmaxf(x[0], x[1]), fmaxf(x[2], x[3]));
  if constexpr (E == 8) m = fmaxf(m, fmaxf(fmaxf(x[4], x[5]), fmaxf(x[6], x[7])));
  return m;
}

template <int E>
__device__ inline float tree_sum(const float (&x)[E]) {
  float s = (x[0] + x[1]) + (x[2] + x[3]);
  if constexpr (E == 8) s += (x[4] + x[5]) + (x[6] + x[7]);
  return s;
}

// A sum of squares times factor^2, where the sum itself became `sum`. They may be infinite where the shift
// was rounded by 64 and still count for nothing. A NaN is in both sums.
__device__ inline float rescaled_squares(float squares, float factor, float sum) {
  return factor == 0.f ? sum : squares * factor * factor;
}

// Makes the sums relative to another maximum, which is no smaller.
template <bool kMoments>
__device__ inline void rescale(RowStats& stats, float max) {
  const float factor = rescale_factor(stats.max, max);
  const float sum = stats.sum * factor;
  if constexpr (kMoments) {
    const float distance = exponent_shift(stats.max) - exponent_shift(max);
    stats.exponents = factor * fmaf(stats.sum, distance, stats.exponents);
    stats.squares = rescaled_squares(stats.squares, factor, sum);
  }
  stats.sum = sum;
  stats.max = max;
}

// Moves a running sum to the larger of its maximum and `max`. Without a branch: among 32 lanes some maximum
// grows at nearly every visit.
template <bool kMoments = false>
__device__ inline void raise_max(RowStats& stats, float max) {
  rescale<kMoments>(stats, fmaxf(stats.max, max));
}

// `before`: how many of these columns, from the first, lie before the label's; may be any number.
template <int E>
__device__ inline float max_of_first(const float (&z)[E], int before) {
  float max = negative_infinity();
#pragma unroll
  for (int e = 0; e < E; ++e) max = e < before ? fmaxf(max, z[e]) : max;
  return max;
}

template <bool kLogitSum, bool kMoments = false, int E>
__device__ inline void accumulate(RowStats& stats, const float (&z)[E], int before = 0) {
  const float max = tree_max(z);
  raise_max<kMoments>(stats, max);
  const float shift = exponent_shift(stats.max);
  float p[E];
  float exponents = 0.f, squares = 0.f;
#pragma unroll
  for (int e = 0; e < E; ++e) {
    const float exponent = fmaf(z[e], kLog2e, -shift);
    p[e] = exp2_approx(exponent);
    if constexpr (kMoments) {
      exponents = fmaf(p[e], finite_exponent(exponent), exponents);
      squares = fmaf(p[e], p[e], squares);
    }
  }
  stats.sum += tree_sum(p);
  if constexpr (kLogitSum) stats.logit_sum += tree_sum(z);
  if constexpr (kMoments) {
    stats.exponents += exponents;
    stats.squares += squares;
    if (before > 0) stats.max_before = fmaxf(stats.max_before, before < E ? max_of_first(z, before) : max);
  }
}

// The same for several vectors of raw products that are logits themselves: their maximum is taken on the
// packed elements, two or more an instruction.
template <class T, int N>
__device__ inline void accumulate_packed(RowStats& stats, const uint4 (&vectors)[N]) {
  constexpr int E = kVecElems<T>;
  raise_max(stats, VecCodec<T>::max(vectors));
  const float shift = exponent_shift(stats.max);
#pragma unroll
  for (int j = 0; j < N; ++j) {
    float x[E];
    VecCodec<T>::unpack(vectors[j], x);
#pragma unroll
    for (int e = 0; e < E; ++e) x[e] = exp2_approx(fmaf(x[e], kLog2e, -shift));
    stats.sum += tree_sum(x);
  }
}

template <bool kLogitSum, bool kMoments = false>
__device__ inline void accumulate_one(RowStats& stats, float z, bool is_before = false) {
  raise_max<kMoments>(stats, z);
  const float exponent = fmaf(z, kLog2e, -exponent_shift(stats.max));
  const float p = exp2_approx(exponent);
  stats.sum += p;
  if constexpr (kLogitSum) stats.logit_sum += z;
  if constexpr (kMoments) {
    stats.exponents = fmaf(p, finite_exponent(exponent), stats.exponents);
    stats.squares = fmaf(p, p, stats.squares);
    if (is_before) stats.max_before = fmaxf(stats.max_before, z);
  }
}

// Butterflies: addition and max commute, so every lane ends with the same bits.
__device__ inline float warp_max(float x) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) x = fmaxf(x, __shfl_xor_sync(kFullWarp, x, offset));
  return x;
}

__device__ inline float warp_sum(float x) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(kFullWarp, x, offset);
  return x;
}

template <bool kLogitSum, bool kMoments = false>
__device__ inline RowStats warp_merge(RowStats mine) {
  RowStats all = RowStats::empty();
  all.max = warp_max(mine.max);
  rescale<kMoments>(mine, all.max);
  all.sum = warp_sum(mine.sum);
  if constexpr (kLogitSum) all.logit_sum = warp_sum(mine.logit_sum);
  if constexpr (kMoments) {
    all.exponents = warp_sum(mine.exponents);
    all.squares = warp_sum(mine.squares);
    all.max_before = warp_max(mine.max_before);
  }
  return all;
}

// Tells the other blocks of the cluster that this one's shared memory may be written. By every thread, once,
// before merge_row. Nothing was written that others will read, so there is no fence, which would wait for all
// of a thread's memory traffic.
template <bool kLogitSum>
__device__ inline void begin_exchange(void* exchange, int cluster) {
  if (cluster == 1) return;
  if (threadIdx.x == 0) {
    const int entries = cluster * (static_cast<int>(blockDim.x) >> 5);
    transactions_begin(exchange, (kLogitSum ? 3 : 2) * static_cast<int>(sizeof(float)) * entries);
  }
  __syncwarp();  // the barrier takes whole warps
  cluster_arrive();
}

// The statistics of the whole row, the same bits in every thread of every block of its cluster. Once per
// launch: `exchange` (stats_exchange_bytes of shared memory) may not be written again without a barrier.
// Moments are exchanged within one block only.
template <bool kLogitSum, bool kMoments = false>
__device__ inline RowStats merge_row(RowStats mine, void* exchange, int rank, int cluster) {
  const int lane = static_cast<int>(threadIdx.x) & 31;
  const int warp = static_cast<int>(threadIdx.x) >> 5;
  const int warps = static_cast<int>(blockDim.x) >> 5;
  const int n = cluster * warps;
  auto* const pairs = reinterpret_cast<float2*>(static_cast<unsigned char*>(exchange) + kExchangeHeader);
  auto* const logit_sums = reinterpret_cast<float*>(pairs + n);
  float* const moments = logit_sums + n;  // [3, n]

  const RowStats of_warp = warp_merge<kLogitSum, kMoments>(mine);
  const int slot = rank * warps + warp;
  if (cluster == 1) {
    if (lane == 0) {
      pairs[slot] = make_float2(of_warp.max, of_warp.sum);
      if constexpr (kLogitSum) logit_sums[slot] = of_warp.logit_sum;
      if constexpr (kMoments) {
        moments[slot] = of_warp.exponents;
        moments[slot + n] = of_warp.squares;
        moments[slot + 2 * n] = of_warp.max_before;
      }
    }
    __syncthreads();
  } else {
    // Lane r tells block r; the stores count on that block's barrier, so that no thread has to fence them.
    __syncwarp();
    cluster_wait();
    if (lane < cluster) {
      store_async(pairs + slot, make_float2(of_warp.max, of_warp.sum), lane, exchange);
      if constexpr (kLogitSum) store_async(logit_sums + slot, of_warp.logit_sum, lane, exchange);
    }
    transactions_wait(exchange);
  }

  // Every warp of every block merges the same entries in the same order.
  RowStats all = RowStats::empty();
#pragma unroll 1
  for (int i = lane; i < n; i += 32) {
    RowStats entry = RowStats::empty();
    entry.max = pairs[i].x;
    entry.sum = pairs[i].y;
    if constexpr (kMoments) {
      entry.exponents = moments[i];
      entry.squares = moments[i + n];
      all.max_before = fmaxf(all.max_before, moments[i + 2 * n]);
    }
    raise_max<kMoments>(all, entry.max);
    rescale<kMoments>(entry, all.max);
    all.sum += entry.sum;
    if constexpr (kLogitSum) all.logit_sum += logit_sums[i];
    if constexpr (kMoments) {
      all.exponents += entry.exponents;
      all.squares += entry.squares;
    }
  }
  return warp_merge<kLogitSum, kMoments>(all);
}

}  // namespace slime_fused::cuda
