// Row statistics of a block of vocabulary columns, and the residual once the whole row's log-sum-exp is
// known.
//
//   row_max = max_v z_v;  row_sum = sum_v exp(z_v - row_max);  label_logit = z_y or 0;  logit_sum = sum_v z_v
//   centred_sum = sum_v exp(z_v - row_max) (z_v - row_max);  square_sum = sum_v exp(2 (z_v - row_max))
//   max_before = max_(v < y) z_v
//   p_v = exp(z_v - row_max) / row_sum;  lse = row_max + log(row_sum);  H = -sum_v p_v log p_v
//   residual: d_raw_v = dz/draw ( row_scale ( p_v (1 + 2 zl lse) - eps/V - (1 - eps) [v = y] )
//                                 - entropy_scale p_v (log p_v + H) )
//
// | tensor                          | shape  | dtype          | logits_stats          | residual_from_stats |
// | raw logits                      | (M, V) | f32, bf16, f16 | read                  | read                |
// | d_raw                           | (M, V) | same, or 16-bit | -                    | written, may alias  |
// | labels                          | (M,)   | int64          | read                  | read                |
// | row_max, row_sum                | (M,)   | f32            | written, or merged in | read                |
// | label_logit                     | (M,)   | f32            | written, or merged in | -                   |
// | logit_sum                       | (M,)   | f32, or null   | written, or merged in | -                   |
// | centred_sum, square_sum,        |        |                |                       |                     |
// |   max_before                    | (M,)   | f32, or null   | written, or merged in | -                   |
// | logp                            | (M,)   | f32            | -                     | read                |
// | row_scale                       | (M,)   | f32, or null   | -                     | read                |
// | entropy (H), entropy_scale      | (M,)   | f32, or null   | -                     | read                |
//
// Bytes moved: M V elements read; residual_from_stats writes as many. Used where one visit cannot see the
// row: evaluation, vocabulary-parallel heads (columns begin at `col_offset`), recomputation. Labels are
// indices of the whole vocabulary. Statistics of ignored rows are formed too (label_logit 0); their residual
// is 0. Accumulation in float32, fixed merge trees, no atomics: the same call gives the same bits. A merge
// takes the larger maximum and rescales the sums, so it depends only on the order of the calls. The last
// three statistics change no bit of the others; label_logit has the bits of row_max where the label is there.
//
// Both kernels have one variant more, for every head: statistics with moments, the residual with the entropy.
#include <algorithm>

#include "dispatch.cuh"
#include "label_check.cuh"

namespace slime_fused::cuda {
namespace {

// One block per row of statistics; 16-byte loads in flight per thread. Rows shorter than a block's reach take
// a smaller block.
constexpr int kMaxStatsThreads = 512;
constexpr int kLoadGroup = 4;

// residual_from_stats: blocks of 256 threads, each covering up to 8 vectors per thread of one row.
constexpr int kResidualThreads = 256;
constexpr int kResidualVectors = 8;
constexpr int64_t kMaxGridRows = 65535;  // the limit of gridDim.y; the kernel strides over the rest

template <class T>
struct StatsArgs {
  const T* in;            // [M, V] pitch in_stride
  const int64_t* labels;  // [M]
  float* row_max;         // [M]
  float* row_sum;         // [M]
  float* label_logit;     // [M]
  float* logit_sum;       // [M] or null
  float* centred_sum;     // [M], as are the next two; read with kMoments alone
  float* square_sum;
  float* max_before;
  int64_t first_row, in_stride, col_offset;
  int cols;
  bool merge;
  HeadArgs<T> head;
};

// exp(from - to), 0 where `from` is -inf.
__device__ float exp_difference(float from, float to) {
  return from == negative_infinity() ? 0.f : exp2_approx((from - to) * kLog2e);
}

// How many of `cols` columns, the first `col_offset` of the vocabulary, lie before the label's; 0 of an
// ignored row.
__device__ int columns_before(int64_t label, int64_t col_offset, int cols) {
  const int64_t here = label - col_offset;
  return label < 0 || here < 0 ? 0 : static_cast<int>(here < cols ? here : cols);
}

// (from - to) as a factor of what is relative to maximum `from`; 0 where that is -inf.
__device__ float finite_difference(float from, float to) {
  return from == negative_infinity() ? 0.f : from - to;
}

// Writes or merges in the moments of a row whose earlier statistics have not been overwritten yet.
template <class T>
__device__ void write_moments(const StatsArgs<T>& a, int64_t row, const RowStats& all) {
  float centred = centred_sum(all);
  float squares = square_sum(all);
  float before = all.max_before;
  if (a.merge) {
    const float earlier = a.row_max[row];
    const float max = fmaxf(earlier, all.max);
    const float theirs = exp_difference(earlier, max);
    const float ours = exp_difference(all.max, max);
    const float their_sum = a.row_sum[row];
    const float our_sum = sum_relative_to_max(all);
    centred = theirs * fmaf(their_sum, finite_difference(earlier, max), a.centred_sum[row]) +
              ours * fmaf(our_sum, finite_difference(all.max, max), centred);
    squares = rescaled_squares(a.square_sum[row], theirs, their_sum * theirs) +
              rescaled_squares(squares, ours, our_sum * ours);
    before = fmaxf(a.max_before[row], before);
  }
  a.centred_sum[row] = centred;
  a.square_sum[row] = squares;
  a.max_before[row] = before;
}

template <class T, HeadMode kHead, bool kLogitSum, bool kMoments = false>
__global__ void __launch_bounds__(kMaxStatsThreads) logits_stats_kernel(const StatsArgs<T> a) {
  constexpr int E = kVecElems<T>;
  constexpr int kGroup = kMoments ? kLoadGroup / 2 : kLoadGroup;  // within 64 registers
  SF_DYNAMIC_SMEM(float, partials);
  const int t = static_cast<int>(threadIdx.x);
  const int threads = static_cast<int>(blockDim.x);
  const int64_t row = a.first_row + blockIdx.x;
  const T* const in = a.in + row * a.in_stride;
  const RowSpan span = RowSpan::of(in, a.cols);
  const auto* const vectors = reinterpret_cast<const uint4*>(in + span.head);
  int before = 0;  // columns of this block before the label's
  if constexpr (kMoments) before = columns_before(a.labels[row], a.col_offset, a.cols);
  RowStats stats = RowStats::empty();

  for (int i = t; i < span.vectors; i += kGroup * threads) {
    uint4 loaded[kGroup];
#pragma unroll
    for (int j = 0; j < kGroup; ++j) {
      if (i + j * threads < span.vectors) loaded[j] = load_once(vectors + i + j * threads);
    }
#pragma unroll
    for (int j = 0; j < kGroup; ++j) {
      if (i + j * threads >= span.vectors) break;
      float z[E];
      const int column = span.head + (i + j * threads) * E;
      logits_of<kHead>(loaded[j], column, a.head, z);
      accumulate<kLogitSum, kMoments>(stats, z, before - column);
    }
  }
  const int edge = span.edge_of<E>(t);
  if (edge >= 0) {
    accumulate_one<kLogitSum, kMoments>(stats, logit<kHead>(in, edge, a.head), edge < before);
  }

  const RowStats all = merge_row<kLogitSum, kMoments>(stats, partials, 0, 1);
  if (t != 0) return;
  if constexpr (kMoments) write_moments(a, row, all);
  const int64_t label = a.labels[row] - a.col_offset;
  const bool is_here = a.labels[row] >= 0 && label >= 0 && label < a.cols;
  const float label_logit = is_here ? logit<kHead>(in, static_cast<int>(label), a.head) : 0.f;
  const float sum = sum_relative_to_max(all);
  if (a.merge) {
    const float earlier = a.row_max[row];
    const float max = fmaxf(earlier, all.max);
    a.row_sum[row] = a.row_sum[row] * exp_difference(earlier, max) + sum * exp_difference(all.max, max);
    a.row_max[row] = max;
    a.label_logit[row] += label_logit;
    if (kLogitSum && a.logit_sum != nullptr) a.logit_sum[row] += all.logit_sum;
  } else {
    a.row_max[row] = all.max;
    a.row_sum[row] = sum;
    a.label_logit[row] = label_logit;
    if (kLogitSum && a.logit_sum != nullptr) a.logit_sum[row] = all.logit_sum;
  }
}

template <class T, class O>
struct FromStatsArgs {
  const T* in;             // [M, V] pitch in_stride
  O* out;                  // [M, V] pitch out_stride
  const int64_t* labels;   // [M]
  const float* row_max;    // [M]
  const float* row_sum;    // [M]
  const float* logp;       // [M]
  const float* row_scale;  // [M] or null
  const float* entropy;    // [M], as is the next; read with kEntropy alone
  const float* entropy_scale;
  int64_t rows, in_stride, out_stride, col_offset, vocab;
  int cols;
  HeadArgs<T> head;
  float label_smoothing, z_loss;
};

// Whether thread `t` (its first vector's index) writes element `v`: the edges by index, vectors by their
// place.
template <int E>
__device__ bool owns_element(const RowSpan& span, int v, int t) {
  if (v < span.head || v >= span.tail) return span.edge_of<E>(t) == v;
  const int i = (v - span.head) / E - t;
  return i >= 0 && i % kResidualThreads == 0 && i / kResidualThreads < kResidualVectors;
}

// Block (x, y): columns [x * C, (x + 1) * C) with C = kResidualThreads * kResidualVectors * E,
// rows y, y + Y, ...
// O: the residual's type, T or 16 bits for T = float.
template <class T, HeadMode kHead, class O, bool kEntropy = false>
__global__ void __launch_bounds__(kResidualThreads, 4)
    residual_from_stats_kernel(const FromStatsArgs<T, O> a) {
  constexpr int E = kVecElems<T>;
  using Out = Outgoing<T, O>;
  constexpr int kGroup = kHead == HeadMode::identity ? kLoadGroup : kLoadGroup / 2;  // within 64 registers
  const int t = static_cast<int>(blockIdx.x * kResidualThreads * kResidualVectors + threadIdx.x);

  for (int64_t row = blockIdx.y; row < a.rows; row += gridDim.y) {
    const int64_t label64 = a.labels[row];
    O* const out = a.out + row * a.out_stride;
    if (label64 >= a.vocab) {
      if (t == 0) report_bad_label(label64, row, a.vocab);
      return;
    }
    if (label64 < 0) {
      zero_row(out, a.cols, static_cast<int>(blockIdx.x * kResidualThreads + threadIdx.x),
               static_cast<int>(gridDim.x * kResidualThreads));
      continue;
    }

    // Row constants: residual = exp(z - max) * gain + offset, times the cap's derivative. The entropy's part
    // makes the gain a linear function of z - max, which is not taken from the exponent: that is rounded
    // where p is 1, and log p + H cancels there.
    const T* const in = a.in + row * a.in_stride;
    const RowSpan span = RowSpan::of(in, a.cols);
    const RowStats stats = stats_of(a.row_max[row], a.row_sum[row]);
    const float lse = stats.max + log_sum_exp(stats);
    const float shift = exponent_shift(stats.max);
    const float logp = a.logp[row];
    const float scale = a.row_scale != nullptr ? a.row_scale[row] * a.head.gradient : a.head.gradient;
    const float z_loss_factor = 2.f * a.z_loss * lse;
    const float smoothing = a.label_smoothing / static_cast<float>(a.vocab);
    float gain = scale * (1.f + z_loss_factor) / stats.sum;
    const float offset = -scale * smoothing;
    float entropy_scale = 0.f, slope = 0.f;
    if constexpr (kEntropy) {
      entropy_scale = a.entropy_scale[row] * a.head.gradient;
      slope = -entropy_scale / stats.sum;
      gain = fmaf(slope, a.entropy[row] - logf(a.row_sum[row]), gain);
    }
    const auto residual = [&](float z) {
      const float slant = kEntropy ? fmaf(finite_exponent(z - stats.max), slope, gain) : gain;
      return fmaf(exp2_approx(fmaf(z, kLog2e, -shift)), slant, offset) * cap_derivative<kHead>(z, a.head);
    };

    // The thread that owns the label's element reads its logit before anything here is overwritten.
    const int64_t label_here = label64 - a.col_offset;
    const bool is_owner =
        label_here >= 0 && label_here < a.cols && owns_element<E>(span, static_cast<int>(label_here), t);
    const float label_logit = is_owner ? logit<kHead>(in, static_cast<int>(label_here), a.head) : 0.f;

    const auto* const vectors = reinterpret_cast<const uint4*>(in + span.head);
    O* const out_vectors = out + span.head;
    const bool aligned = Out::is_aligned(out_vectors);
    for (int k = 0; k < kResidualVectors; k += kGroup) {
      uint4 loaded[kGroup];
#pragma unroll
      for (int j = 0; j < kGroup; ++j) {
        const int i = t + (k + j) * kResidualThreads;
        if (i < span.vectors) loaded[j] = load_once(vectors + i);
      }
#pragma unroll
      for (int j = 0; j < kGroup; ++j) {
        const int i = t + (k + j) * kResidualThreads;
        if (i >= span.vectors) break;
        float x[E];
        logits_of<kHead>(loaded[j], span.head + i * E, a.head, x);
#pragma unroll
        for (int e = 0; e < E; ++e) x[e] = residual(x[e]);
        const auto packed = Out::pack(x);
        if (aligned) {
          Out::store(reinterpret_cast<typename Out::Packed*>(out_vectors) + i, packed, false);
        } else {
          Out::store_elements(out_vectors + static_cast<int64_t>(i) * E, packed);
        }
      }
    }
    const int edge = span.edge_of<E>(t);
    if (edge >= 0) out[edge] = from_float<O>(residual(logit<kHead>(in, edge, a.head)));

    // The label's entry, by the thread that wrote its neighbours: program order makes it the last write.
    if (is_owner) {
      const float p = exp2_approx(logp * kLog2e);
      const float d_logit = expm1f(logp) + z_loss_factor * p + (a.label_smoothing - smoothing);
      float d_label = d_logit * scale;
      if constexpr (kEntropy) d_label -= entropy_scale * p * (finite_exponent(logp) + a.entropy[row]);
      out[label_here] = from_float<O>(d_label * cap_derivative<kHead>(label_logit, a.head));
    }
  }
}

}  // namespace

void logits_stats(const LogitsBlock& block, const int64_t* labels, const HeadTransform& head, float* row_max,
                  float* row_sum, float* label_logit, float* logit_sum, float* centred_sum, float* square_sum,
                  float* max_before, bool merge, cudaStream_t stream) {
  check_block("logits_stats", block, false);
  const bool moments = centred_sum != nullptr;
  if ((square_sum != nullptr) != moments || (max_before != nullptr) != moments) {
    throw std::invalid_argument(
        "logits_stats: centred_sum, square_sum and max_before must all be given or all be null");
  }
  dispatch_dtype(block.dtype, [&](auto zero) {
    using T = decltype(zero);
    StatsArgs<T> args{static_cast<const T*>(block.in),
                      labels,
                      row_max,
                      row_sum,
                      label_logit,
                      logit_sum,
                      centred_sum,
                      square_sum,
                      max_before,
                      0,
                      block.in_stride,
                      block.col_offset,
                      static_cast<int>(block.cols),
                      merge,
                      head_args<T>(head)};
    // Whole warps, one load group per thread where the row is short.
    const int64_t groups = block.cols / (kVecElems<T> * kLoadGroup) + 1;
    const int threads = static_cast<int>(std::min<int64_t>((groups + 31) / 32 * 32, kMaxStatsThreads));
    LaunchShape shape;
    shape.threads = threads;
    shape.smem_bytes = stats_exchange_bytes(1, threads, moments);
    const auto launch = [&](auto kernel) {
      for (int64_t first = 0; first < block.rows; first += kMaxBlocks) {
        args.first_row = first;
        shape.blocks = std::min(block.rows - first, kMaxBlocks);
        launch_clustered(kernel, shape, stream, args);
        check_launch("logits_stats", block.rows, block.cols);
      }
    };
    if (moments) return launch(&logits_stats_kernel<T, HeadMode::dynamic, true, true>);
    dispatch_head(head_mode(head), [&](auto tag) {
      constexpr HeadMode kHead = decltype(tag)::value;
      if constexpr (kHead == HeadMode::identity) {
        if (logit_sum == nullptr) return launch(&logits_stats_kernel<T, kHead, false>);
      }
      launch(&logits_stats_kernel<T, kHead, true>);
    });
  });
}

void residual_from_stats(const LogitsBlock& block, const int64_t* labels, const HeadTransform& head,
                         const TokenLoss& token_loss, const float* row_max, const float* row_sum,
                         const float* logp, const float* row_scale, const float* entropy,
                         const float* entropy_scale, cudaStream_t stream) {
  check_block("residual_from_stats", block, true);
  if (token_loss.vocab < block.col_offset + block.cols) {
    throw std::invalid_argument("residual_from_stats: vocab must be at least col_offset + cols = " +
                                std::to_string(block.col_offset + block.cols) + ", got " +
                                std::to_string(token_loss.vocab));
  }
  if ((entropy != nullptr) != (entropy_scale != nullptr)) {
    throw std::invalid_argument(
        "residual_from_stats: entropy and entropy_scale must both be given or both be null");
  }
  if (block.rows == 0) return;
  dispatch_dtypes(block, [&](auto zero, auto out_zero) {
    using T = decltype(zero);
    using O = decltype(out_zero);
    const FromStatsArgs<T, O> args{static_cast<const T*>(block.in),
                                   static_cast<O*>(block.out),
                                   labels,
                                   row_max,
                                   row_sum,
                                   logp,
                                   row_scale,
                                   entropy,
                                   entropy_scale,
                                   block.rows,
                                   block.in_stride,
                                   block.out_stride,
                                   block.col_offset,
                                   token_loss.vocab,
                                   static_cast<int>(block.cols),
                                   head_args<T>(head),
                                   static_cast<float>(token_loss.label_smoothing),
                                   static_cast<float>(token_loss.z_loss)};
    constexpr int64_t kBlockCols = int64_t{kResidualThreads} * kResidualVectors * kVecElems<T>;
    const dim3 grid(static_cast<unsigned>((block.cols + kBlockCols - 1) / kBlockCols),
                    static_cast<unsigned>(std::min<int64_t>(block.rows, kMaxGridRows)));
    const auto launch = [&](auto kernel) {
      SF_LAUNCH(kernel, grid, dim3(kResidualThreads), 0, stream, args);
    };
    if (entropy != nullptr) return launch(&residual_from_stats_kernel<T, HeadMode::dynamic, O, true>);
    dispatch_head(head_mode(head),
                  [&](auto tag) { launch(&residual_from_stats_kernel<T, decltype(tag)::value, O>); });
  });
  check_launch("residual_from_stats", block.rows, block.cols);
}

}  // namespace slime_fused::cuda
