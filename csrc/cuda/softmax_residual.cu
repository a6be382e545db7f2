// Softmax residual: the gradient of one token's loss, written over its logits in one pass through device
// memory.
//
//   z = transform(raw);  lse = log sum_v exp z_v;  logp = z_y - lse
//   loss = -(1 - eps) logp + eps (lse - mean_v z_v) + zl lse^2
//   d_raw_v = dz/draw * ( softmax(z)_v (1 + 2 zl lse) - eps/V - (1 - eps) [v = y] )
//
// | tensor                       | shape  | dtype          | access                                      |
// | raw logits                   | (M, V) | f32, bf16, f16 | read once from device memory                |
// | d_raw                        | (M, V) | same           | written once; may be the logits             |
// | labels                       | (M,)   | int64          | read; negative: an ignored row              |
// | bias                         | (V,)   | same, or null  | read                                        |
// | row_max, row_sum, logp, loss | (M,)   | f32            | written; row_sum = sum_v exp(z_v - row_max) |
//
// Bytes moved: M V (read + write) elements; about 12 instructions and 2 exponentials per element.
// A cluster of `plan.cluster` blocks owns a row. Its 16-byte vectors are dealt over all threads, which keep
// them in shared memory or in registers until the row's (max, sum) is known, so the second visit costs no
// device memory traffic; vectors beyond that room are read again, through L2. Blocks of other rows on the
// same multiprocessor fill the gap between the two visits. The label's entry is expm1(logp) + ..., formed in
// float32 and rounded once, so that it does not cancel. Deterministic: fixed merge trees, no atomics. Limits:
// V < 2^31 - 2^20. Online normaliser after Milakov and Gimelshein, arXiv 1805.02867.
#include <algorithm>

#include "dispatch.cuh"
#include "label_check.cuh"

namespace slime_fused::cuda {
namespace {

template <class T>
struct ResidualArgs {
  const T* in;            // [M, V] pitch in_stride
  T* out;                 // [M, V] pitch out_stride
  const int64_t* labels;  // [M]
  float* row_max;         // [M]
  float* row_sum;         // [M]
  float* logp;            // [M]
  float* loss;            // [M] or null
  int64_t first_row, in_stride, out_stride;
  int cols;
  int shared_vectors;
  bool streaming;
  HeadArgs<T> head;
  float label_smoothing, z_loss;
};

// Three blocks of 512 threads per multiprocessor leave 40 registers a thread, enough for the plain head on
// Hopper; other compilations would spill, and take two.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 900
constexpr int kPlainBlocks = 3;
#else
constexpr int kPlainBlocks = 2;
#endif

template <bool kRegisters>
inline constexpr int kMaxThreads = kRegisters ? kMaxRegisterThreads : kMaxSharedThreads;
template <HeadMode kHead, bool kRegisters>
inline constexpr int kMinBlocks = kRegisters ? 1 : (kHead == HeadMode::identity ? kPlainBlocks : 2);

// Loads beyond the staged part go out in groups of this many, to keep several in flight per thread.
constexpr int kLoadGroup = 2;

// The bits of a vector of -inf, which contributes nothing.
template <class T>
__device__ uint4 minus_infinity_vector() {
  float x[kVecElems<T>];
#pragma unroll
  for (int e = 0; e < kVecElems<T>; ++e) x[e] = negative_infinity();
  return VecCodec<T>::pack(x);
}

template <class T, HeadMode kHead, bool kRegisters>
__global__ void __launch_bounds__((kMaxThreads<kRegisters>), (kMinBlocks<kHead, kRegisters>))
    softmax_residual_kernel(const ResidualArgs<T> a) {
  constexpr int E = kVecElems<T>;
  constexpr bool kLogitSum = kHead != HeadMode::identity;
  SF_DYNAMIC_SMEM(unsigned char, smem);

  const int cluster = cluster_size();
  const int rank = cluster_rank();
  const int threads = static_cast<int>(blockDim.x);
  const int row_threads = cluster * threads;
  const int t = rank * threads + static_cast<int>(threadIdx.x);
  float* const exchange = reinterpret_cast<float*>(smem);
  // Slot k of this thread is stage[k * threads]: neighbours in a warp are neighbours in the banks.
  uint4* const stage = reinterpret_cast<uint4*>(smem + stats_exchange_bytes(cluster, threads)) + threadIdx.x;

  const int64_t row = a.first_row + blockIdx.x / static_cast<unsigned>(cluster);
  const int64_t label64 = a.labels[row];
  T* const out = a.out + row * a.out_stride;
  if (label64 >= a.cols) {
    if (t == 0) report_bad_label(label64, row, a.cols);
    return;
  }
  if (label64 < 0) {
    zero_row(out, a.cols, t, row_threads);
    if (t == 0) {
      a.row_max[row] = 0.f;
      a.row_sum[row] = 1.f;
      a.logp[row] = 0.f;
      if (a.loss != nullptr) a.loss[row] = 0.f;
    }
    return;
  }
  // Another block's shared memory may be written only once that block runs; the wait comes before the first
  // write.
  if (cluster > 1) cluster_arrive();

  // Loads: everything this thread owns, before anything is used.
  const int label = static_cast<int>(label64);
  const T* const in = a.in + row * a.in_stride;
  const RowSpan span = RowSpan::of(in, a.cols);
  const auto* const vectors = reinterpret_cast<const uint4*>(in + span.head);
  const int mine = t < span.vectors ? (span.vectors - t + row_threads - 1) / row_threads : 0;
  const int held = kRegisters ? kRegisterVectors : (mine < a.shared_vectors ? mine : a.shared_vectors);
  const int per_group = (held + 3) / 4;
  uint4 registers[kRegisters ? kRegisterVectors : 1];
  if constexpr (kRegisters) {
#pragma unroll
    for (int k = 0; k < kRegisterVectors; ++k) {
      registers[k] = k < mine ? load_once(vectors + t + k * row_threads) : minus_infinity_vector<T>();
    }
  } else {
    for (int group = 0; group < 4; ++group) {
      const int end = (group + 1) * per_group < held ? (group + 1) * per_group : held;
      for (int k = group * per_group; k < end; ++k) {
        copy_async_16(stage + k * threads, vectors + t + k * row_threads);
      }
      copy_async_commit();
    }
  }
  const int edge = span.edge_of<E>(t);
  const float edge_logit = edge >= 0 ? logit<kHead>(in, edge, a.head) : negative_infinity();
  const float label_logit = logit<kHead>(in, label, a.head);

  // First visit: this thread's statistics.
  RowStats stats = RowStats::empty();
  if constexpr (kRegisters) {
#pragma unroll
    for (int k = 0; k < kRegisterVectors; ++k) {
      float z[E];
      VecCodec<T>::unpack(registers[k], z);
      accumulate<false>(stats, z);
    }
  } else {
    for (int group = 0; group < 4; ++group) {
      copy_async_wait(3 - group);
      const int end = (group + 1) * per_group < held ? (group + 1) * per_group : held;
      for (int k = group * per_group; k < end; ++k) {
        float z[E];
        logits_of<kHead>(stage[k * threads], span.head + (t + k * row_threads) * E, a.head, z);
        accumulate<kLogitSum>(stats, z);
      }
    }
  }
  if constexpr (!kRegisters) {
    for (int k = held; k < mine; k += kLoadGroup) {
      uint4 loaded[kLoadGroup];
#pragma unroll
      for (int j = 0; j < kLoadGroup; ++j) {
        if (k + j < mine) loaded[j] = vectors[t + (k + j) * row_threads];
      }
#pragma unroll
      for (int j = 0; j < kLoadGroup; ++j) {
        if (k + j >= mine) break;
        float z[E];
        logits_of<kHead>(loaded[j], span.head + (t + (k + j) * row_threads) * E, a.head, z);
        accumulate<kLogitSum>(stats, z);
      }
    }
  }
  if (edge >= 0) accumulate_one<kLogitSum>(stats, edge_logit);

  if (cluster > 1) {
    __syncwarp();  // the barrier takes whole warps
    cluster_wait();
  }
  const RowStats all = merge_row<kLogitSum>(stats, exchange, rank, cluster);

  const float log_sum = log_sum_exp(all);
  const float lse = all.max + log_sum;
  const float logp = (label_logit - all.max) - log_sum;
  const auto write_statistics = [&] {
    if (t != 0) return;
    a.row_max[row] = all.max;
    a.row_sum[row] = sum_relative_to_max(all);
    a.logp[row] = logp;
    if (a.loss == nullptr) return;
    float loss = -(1.f - a.label_smoothing) * logp + a.z_loss * lse * lse;
    if (a.label_smoothing != 0.f) {
      loss += a.label_smoothing * (lse - all.logit_sum / static_cast<float>(a.cols));
    }
    a.loss[row] = loss;
  };
  // Row constants: residual = exp(z - max) * gain + offset, times the cap's derivative.
  const float z_loss_factor = 2.f * a.z_loss * lse;
  const float smoothing = a.label_smoothing / static_cast<float>(a.cols);
  const float shift = exponent_shift(all.max);
  const float gain = a.head.scale * (1.f + z_loss_factor) / all.sum;
  const float offset = -a.head.scale * smoothing;
  const auto residual = [&](float z) {
    return fmaf(exp2_approx(fmaf(z, kLog2e, -shift)), gain, offset) * cap_derivative<kHead>(z, a.head);
  };
  const auto label_residual = [&] {
    const float p = exp2_approx(logp * kLog2e);
    const float d_logit = expm1f(logp) + z_loss_factor * p + (a.label_smoothing - smoothing);
    return d_logit * a.head.scale * cap_derivative<kHead>(label_logit, a.head);
  };
  const bool owns_label = t == span.owner_of<E>(label, row_threads);

  // What single threads write, formed where the compiler finds the registers (tests/test_cuda_build.py):
  // before the second visit for 16-bit rows in shared memory, after it for others.
  constexpr bool kEarly = !kRegisters && sizeof(T) == 2;
  float label_value = 0.f;
  if constexpr (kEarly) {
    write_statistics();
    if (owns_label) label_value = label_residual();
  }

  // Second visit: the residual, element for element where the logits were.
  T* const out_vectors = out + span.head;
  const bool aligned = is_aligned_16(out_vectors);
  const auto write_vector = [&](const uint4& packed, int i) {
    float x[E];
    logits_of<kHead>(packed, span.head + i * E, a.head, x);
#pragma unroll
    for (int e = 0; e < E; ++e) x[e] = residual(x[e]);
    store_elements(out_vectors + static_cast<int64_t>(i) * E, x, aligned, a.streaming);
  };
  if constexpr (kRegisters) {
#pragma unroll
    for (int k = 0; k < kRegisterVectors; ++k) {
      forget(registers[k]);
      if (k < mine) write_vector(registers[k], t + k * row_threads);
    }
  } else {
#pragma unroll 2
    for (int k = 0; k < held; ++k) write_vector(stage[k * threads], t + k * row_threads);
  }
  if constexpr (!kRegisters) {
    for (int k = held; k < mine; k += kLoadGroup) {
      uint4 loaded[kLoadGroup];
#pragma unroll
      for (int j = 0; j < kLoadGroup; ++j) {
        if (k + j < mine) loaded[j] = load_once(vectors + t + (k + j) * row_threads);
      }
#pragma unroll
      for (int j = 0; j < kLoadGroup; ++j) {
        if (k + j < mine) write_vector(loaded[j], t + (k + j) * row_threads);
      }
    }
  }
  if (edge >= 0) out[edge] = from_float<T>(residual(edge_logit));

  // The label's entry, by the thread that wrote its neighbours: program order makes it the last write.
  if (owns_label) out[label] = from_float<T>(kEarly ? label_value : label_residual());
  if constexpr (!kEarly) write_statistics();
}

// One cluster per row; rows beyond the largest grid go to further launches.
template <class T, HeadMode kHead, bool kRegisters>
void launch(ResidualArgs<T> args, int64_t rows, const RowPlan& plan, cudaStream_t stream) {
  const int64_t limit = plan.max_blocks > 0 ? plan.max_blocks : kMaxBlocks;
  const int64_t rows_per_launch = std::max<int64_t>(1, limit / plan.cluster);
  LaunchShape shape;
  shape.cluster = plan.cluster;
  shape.threads = plan.threads;
  shape.smem_bytes = stats_exchange_bytes(plan.cluster, plan.threads) +
                     std::max(plan.pad_bytes, kRegisters ? 0 : plan.shared_vectors * plan.threads * 16);
  for (int64_t first = 0; first < rows; first += rows_per_launch) {
    args.first_row = first;
    shape.blocks = std::min(rows - first, rows_per_launch) * plan.cluster;
    launch_clustered(softmax_residual_kernel<T, kHead, kRegisters>, shape, stream, args);
    check_launch("softmax_residual", rows, args.cols);
  }
}

}  // namespace

int row_kernel_capability() {
  return compiled_capability(&softmax_residual_kernel<__nv_bfloat16, HeadMode::identity, false>);
}

void softmax_residual(const LogitsBlock& block, const int64_t* labels, const HeadTransform& head,
                      const TokenLoss& token_loss, float* row_max, float* row_sum, float* logp, float* loss,
                      const RowPlan& plan, cudaStream_t stream) {
  check_block("softmax_residual", block, true);
  check_row_plan(plan);
  if (block.rows == 0) return;
  if (plan.cluster > 1 && row_kernel_capability() < 90) {
    throw std::invalid_argument("row plan: cluster must be 1 for kernels compiled for capability " +
                                std::to_string(row_kernel_capability()) + ", got " +
                                std::to_string(plan.cluster));
  }
  const int64_t vectors = (block.cols * element_size(block.dtype) + 15) / 16;
  if (plan.stage == RowStage::registers &&
      vectors > int64_t{kRegisterVectors} * plan.cluster * plan.threads) {
    throw std::invalid_argument("row plan: stage registers must hold the row of " + std::to_string(vectors) +
                                " vectors, got cluster=" + std::to_string(plan.cluster) +
                                ", threads=" + std::to_string(plan.threads));
  }

  // Label smoothing needs the sum of the logits, which the identity head does not keep.
  HeadMode mode = head_mode(head);
  if (mode == HeadMode::identity && token_loss.label_smoothing != 0.0) mode = HeadMode::affine;
  dispatch_dtype(block.dtype, [&](auto zero) {
    using T = decltype(zero);
    const ResidualArgs<T> args{static_cast<const T*>(block.in),
                               static_cast<T*>(block.out),
                               labels,
                               row_max,
                               row_sum,
                               logp,
                               loss,
                               0,
                               block.in_stride,
                               block.out_stride,
                               static_cast<int>(block.cols),
                               plan.shared_vectors,
                               plan.streaming,
                               head_args<T>(head),
                               static_cast<float>(token_loss.label_smoothing),
                               static_cast<float>(token_loss.z_loss)};
    dispatch_head(mode, [&](auto tag) {
      constexpr HeadMode kHead = decltype(tag)::value;
      if constexpr (kHead == HeadMode::identity) {
        if (plan.stage == RowStage::registers) return launch<T, kHead, true>(args, block.rows, plan, stream);
      }
      launch<T, kHead, false>(args, block.rows, plan, stream);
    });
  });
}

}  // namespace slime_fused::cuda
