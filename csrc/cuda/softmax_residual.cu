// Softmax residual: the gradient of one token's loss, written over its logits in one pass through device
// memory.
//
//   z = transform(raw);  lse = log sum_v exp z_v;  logp = z_y - lse
//   loss = -(1 - eps) logp + eps (lse - mean_v z_v) + zl lse^2
//   d_raw_v = dz/draw * ( softmax(z)_v (1 + 2 zl lse) - eps/V - (1 - eps) [v = y] )
//
// | tensor                       | shape  | dtype          | access                                      |
// | raw logits                   | (M, V) | f32, bf16, f16 | read once from device memory                |
// | d_raw                        | (M, V) | same, or 16-bit | written once; may be the logits            |
// | labels                       | (M,)   | int64          | read; negative: an ignored row              |
// | bias                         | (V,)   | same, or null  | read                                        |
// | row_max, row_sum, logp, loss | (M,)   | f32            | written; row_sum = sum_v exp(z_v - row_max) |
//
// f32 logits may have a bf16 or f16 residual, which then lies elsewhere.
// Bytes moved: M V (read + write) elements; 2 exponentials per element.
// A cluster of `plan.cluster` blocks owns a row (row_slice.cuh). Its 16-byte vectors stay in shared memory or
// in registers until the row's (max, sum) is known, so the second visit costs no device memory traffic;
// vectors beyond that room are read again, through L2. Blocks of other rows on the same multiprocessor fill
// the gap between the two visits. The label's entry is expm1(logp) + ..., formed in float32 and rounded once,
// so that it does not cancel; one thread of the cluster forms it and writes the statistics. Deterministic:
// fixed merge trees, no atomics. Limits: V < 2^31 - 2^20. Online normaliser after Milakov and Gimelshein,
// arXiv 1805.02867.
//
// Instructions of a plain bf16 head on sm_90, from CUDA 13.0's machine code (tests/test_cuda_sass.py); no GPU
// has run it. A tile is 32 elements of a lane; at 3 TB/s an H100 has 40 issue slots per element.
//
// | staging of a tile | first visit | second visit | once a thread | per element             |
// |                25 |         171 |          169 |           282 | 13.4 to 13.9            |
//
// The first visit: 4 vectors x (1 load, 8 unpackings, 8 multiply-adds, 8 exponentials, 8 additions), and 39
// for maximum, rescaling, wait and loop. The exponentials alone keep an H100's units busy 40 % of the time.
// 1. The maximum is taken on packed raw elements, which is right only where they are logits: a scale below 0
//    makes the largest of them the smallest logit.
// 2. 16 vectors a thread (row_plan.cpp), because of the 282.
// 3. No fence: MEMBAR.ALL.GPU waits for all that a thread has under way (begin_exchange, merge_row).
// 4. The first tile is on its way before the label is known, so an ignored row reads a quarter of itself.
#include <algorithm>

#include "dispatch.cuh"
#include "label_check.cuh"
#include "row_slice.cuh"

namespace slime_fused::cuda {
namespace {

template <class T, class O>
struct ResidualArgs {
  const T* in;            // [M, V] pitch in_stride
  O* out;                 // [M, V] pitch out_stride
  const int64_t* labels;  // [M]
  float* row_max;         // [M]
  float* row_sum;         // [M]
  float* logp;            // [M]
  float* loss;            // [M] or null
  int64_t first_row, in_stride, out_stride;
  int cols;
  int block_vectors;            // of a row that one block of its cluster owns
  int staged;                   // of these, how many wait in shared memory
  int exchange_bytes;           // of shared memory, before them
  unsigned cluster_reciprocal;  // ceil(2^32 / cluster)
  bool streaming;
  HeadArgs<T> head;
  float label_smoothing, z_loss;
  float smoothing;  // label_smoothing / V
};

template <bool kRegisters>
inline constexpr int kMaxThreads = kRegisters ? kMaxRegisterThreads : kMaxSharedThreads;
// 64 registers a thread.
template <bool kRegisters>
inline constexpr int kMinBlocks = 1024 / kMaxThreads<kRegisters>;

// O: the residual's type, T or 16 bits for T = float.
template <class T, HeadMode kHead, bool kRegisters, class O = T>
__global__ void __launch_bounds__(kMaxThreads<kRegisters>, kMinBlocks<kRegisters>)
    softmax_residual_kernel(const ResidualArgs<T, O> a) {
  constexpr int E = kVecElems<T>;
  using Out = Outgoing<T, O>;
  constexpr bool kLogitSum = kHead != HeadMode::identity;
  constexpr int kRegisterTiles = kRegisterVectors / kTile;
  SF_DYNAMIC_SMEM(unsigned char, smem);

  const int cluster = cluster_size();
  const int rank = cluster_rank();
  const int threads = static_cast<int>(blockDim.x);
  const int tid = static_cast<int>(threadIdx.x);
  const int lane = tid & 31;
  uint4* const stage = reinterpret_cast<uint4*>(smem + a.exchange_bytes);

  // %clusterid is formed from blockIdx in float32, which is exact for 2^24 blocks only.
  const unsigned cluster_index = cluster == 1 ? blockIdx.x : __umulhi(blockIdx.x, a.cluster_reciprocal);
  const int64_t row = a.first_row + cluster_index;
  const int64_t label64 = a.labels[row];
  const T* const in = a.in + row * a.in_stride;
  O* const out = a.out + row * a.out_stride;
  const Slice slice = Slice::of(in, a.cols, rank, a.block_vectors);
  const auto* const vectors = reinterpret_cast<const uint4*>(in + slice.span.head) + slice.begin;

  // This lane's part of its warp's first tile; the tiles of a warp lie `step` apart.
  const int first = (tid - lane) * kTile + lane;
  const int step = threads * kTile;
  const int staged = kRegisters ? slice.count : (slice.count < a.staged ? slice.count : a.staged);

  // Loads: the first tile before the label is known, the others after.
  uint4 registers[kRegisters ? kRegisterTiles : 1][kTile];
  const auto is_full = [&](int i, int end) { return i - lane + kTileVectors <= end; };
  const auto stage_tile = [&](int i) {
    const uint4* const from = vectors + i;
    uint4* const to = stage + i;
    if (is_full(i, staged)) {
      copy_async_16<0>(to, from);
      copy_async_16<32>(to, from);
      copy_async_16<64>(to, from);
      copy_async_16<96>(to, from);
    } else {
#pragma unroll 1
      for (int j = 0; i + j < staged; j += 32) copy_async_16(to + j, from + j);
    }
    copy_async_commit();
  };
  if constexpr (!kRegisters) stage_tile(first);

  if (label64 >= a.cols) {
    if (rank == 0 && tid == 0) report_bad_label(label64, row, a.cols);
    return;
  }
  if (label64 < 0) {
    // The row may be the output: no thread still reads it when another writes.
    copy_async_wait(0);
    __syncthreads();
    zero_slice(out, a.cols, rank, a.block_vectors);
    if (rank == 0 && tid == 0) {
      a.row_max[row] = 0.f;
      a.row_sum[row] = 1.f;
      a.logp[row] = 0.f;
      if (a.loss != nullptr) a.loss[row] = 0.f;
    }
    return;
  }
  begin_exchange<kLogitSum>(smem, cluster);

  int groups = 1;
  if constexpr (kRegisters) {
#pragma unroll
    for (int m = 0; m < kRegisterTiles; ++m) {
#pragma unroll
      for (int j = 0; j < kTile; ++j) {
        const int i = first + m * step + 32 * j;
        registers[m][j] = i < staged ? load_once(vectors + i) : VecCodec<T>::minus_infinity();
      }
    }
  } else {
    for (int i = first + step; i - lane < staged; i += step, ++groups) stage_tile(i);
  }
  const int edge = slice.edge_of<E>(tid, rank);
  const float edge_logit = edge >= 0 ? logit<kHead>(in, edge, a.head) : negative_infinity();
  // One thread of the cluster has what is asked of the label, read before anything is overwritten.
  const int label = static_cast<int>(label64);
  const bool owns_label = slice.is_owner<E>(label, tid, threads, rank, staged);
  const float label_logit = owns_label ? logit<kHead>(in, label, a.head) : 0.f;

  // First visit: this thread's statistics.
  RowStats stats = RowStats::empty();
  const auto column_of = [&](int i) { return slice.span.head + (slice.begin + i) * E; };
  const auto visit = [&](int i, int end, const uint4* source, const auto& load) {
    if constexpr (kHead == HeadMode::identity) {
      uint4 tile[kTile];
      if (is_full(i, end)) {
#pragma unroll
        for (int j = 0; j < kTile; ++j) tile[j] = load(source + i + 32 * j);
      } else {
#pragma unroll
        for (int j = 0; j < kTile; ++j) {
          tile[j] = VecCodec<T>::minus_infinity();
          if (i + 32 * j < end) tile[j] = load(source + i + 32 * j);
        }
      }
      accumulate_packed<T>(stats, tile);
    } else {
#pragma unroll 1
      for (int j = 0; j < kTile && i + 32 * j < end; ++j) {
        float z[E];
        logits_of<kHead>(load(source + i + 32 * j), column_of(i + 32 * j), a.head, z);
        accumulate<kLogitSum>(stats, z);
      }
    }
  };
  const auto from_stage = [](const uint4* address) { return *address; };
  const auto from_memory = [](const uint4* address) { return load_once(address); };
  if constexpr (kRegisters) {
#pragma unroll
    for (int m = 0; m < kRegisterTiles; ++m) accumulate_packed<T>(stats, registers[m]);
  } else {
#pragma unroll 1
    for (int i = first; i - lane < staged; i += step) {
      copy_async_wait(--groups);
      visit(i, staged, stage, from_stage);
    }
#pragma unroll 1
    for (int i = staged + first; i - lane < slice.count; i += step)
      visit(i, slice.count, vectors, from_memory);
  }
  if (edge >= 0) accumulate_one<kLogitSum>(stats, edge_logit);

  const RowStats all = merge_row<kLogitSum>(stats, smem, rank, cluster);

  // Row constants: residual = exp(z - max) * gain + offset, times the cap's derivative.
  const float z_loss_factor = a.z_loss == 0.f ? 0.f : 2.f * a.z_loss * (all.max + log_sum_exp(all));
  const float shift = exponent_shift(all.max);
  const float gain = __fdividef(a.head.gradient * (1.f + z_loss_factor), all.sum);
  const float offset = -a.head.gradient * a.smoothing;
  const auto residual = [&](float z) {
    return fmaf(exp2_approx(fmaf(z, kLog2e, -shift)), gain, offset) * cap_derivative<kHead>(z, a.head);
  };

  float label_value = 0.f;
  if (owns_label) {
    const float log_sum = log_sum_exp(all);
    const float lse = all.max + log_sum;
    const float logp = (label_logit - all.max) - log_sum;
    a.row_max[row] = all.max;
    a.row_sum[row] = sum_relative_to_max(all);
    a.logp[row] = logp;
    if (a.loss != nullptr) {
      float loss = -(1.f - a.label_smoothing) * logp + a.z_loss * lse * lse;
      if (a.label_smoothing != 0.f) {
        loss += a.label_smoothing * (lse - all.logit_sum / static_cast<float>(a.cols));
      }
      a.loss[row] = loss;
    }
    const float p = exp2_approx(logp * kLog2e);
    const float d_logit = expm1f(logp) + z_loss_factor * p + (a.label_smoothing - a.smoothing);
    label_value = d_logit * a.head.gradient * cap_derivative<kHead>(label_logit, a.head);
  }

  // Second visit: the residual, element for element where the logits were.
  O* const out_vectors = out + column_of(0);
  const auto residual_of = [&](const uint4& packed, int i) {
    float x[E];
    logits_of<kHead>(packed, column_of(i), a.head, x);
#pragma unroll
    for (int e = 0; e < E; ++e) x[e] = residual(x[e]);
    return Out::pack(x);
  };
  auto* const targets = reinterpret_cast<typename Out::Packed*>(out_vectors);
  const auto write_tile = [&](int i, int end, const uint4* source, const auto& load) {
    if (kHead == HeadMode::identity && is_full(i, end)) {
      uint4 tile[kTile];
#pragma unroll
      for (int j = 0; j < kTile; ++j) tile[j] = load(source + i + 32 * j);
#pragma unroll
      for (int j = 0; j < kTile; ++j) {
        Out::store(targets + i + 32 * j, residual_of(tile[j], i + 32 * j), a.streaming);
      }
    } else {
#pragma unroll 1
      for (int v = i; v < end && v < i + kTileVectors; v += 32) {
        Out::store(targets + v, residual_of(load(source + v), v), a.streaming);
      }
    }
  };
  if (!Out::is_aligned(out_vectors)) {
    // The output is aligned otherwise, so it is not the input, which can be read again.
#pragma unroll 1
    for (int from = 0; from < slice.count; from = from < staged ? staged : slice.count) {
      const int end = from < staged ? staged : slice.count;
#pragma unroll 1
      for (int i = from + first; i < end; i += step) {
#pragma unroll 1
        for (int v = i; v < end && v < i + kTileVectors; v += 32) {
          Out::store_elements(out_vectors + static_cast<int64_t>(v) * E,
                              residual_of(load_once(vectors + v), v));
        }
      }
    }
  } else if constexpr (kRegisters) {
#pragma unroll
    for (int m = 0; m < kRegisterTiles; ++m) {
#pragma unroll
      for (int j = 0; j < kTile; ++j) {
        const int i = first + m * step + 32 * j;
        forget(registers[m][j]);
        if (i < staged) Out::store(targets + i, residual_of(registers[m][j], i), a.streaming);
      }
    }
  } else {
#pragma unroll 1
    for (int i = first; i - lane < staged; i += step) write_tile(i, staged, stage, from_stage);
#pragma unroll 1
    for (int i = staged + first; i - lane < slice.count; i += step) {
      write_tile(i, slice.count, vectors, from_memory);
    }
  }
  if (edge >= 0) out[edge] = from_float<O>(residual(edge_logit));

  // The label's entry, by the thread that wrote its neighbours: program order makes it the last write.
  if (owns_label) out[label] = from_float<O>(label_value);
}

// So many that the multiplication by 2^32 / cluster is still a division.
constexpr int64_t kMostBlocks = int64_t{1} << 28;

// One cluster per row; rows beyond the largest grid go to further launches.
template <class T, HeadMode kHead, bool kRegisters, class O>
void launch(ResidualArgs<T, O> args, int64_t rows, const RowPlan& plan, cudaStream_t stream) {
  const int64_t limit = plan.max_blocks > 0 ? std::min(plan.max_blocks, kMostBlocks) : kMostBlocks;
  const int64_t rows_per_launch = std::max<int64_t>(1, limit / plan.cluster);
  LaunchShape shape;
  shape.cluster = plan.cluster;
  shape.threads = plan.threads;
  shape.smem_bytes = args.exchange_bytes + std::max(plan.pad_bytes, args.staged * 16);
  for (int64_t first = 0; first < rows; first += rows_per_launch) {
    args.first_row = first;
    shape.blocks = std::min(rows - first, rows_per_launch) * plan.cluster;
    launch_clustered(softmax_residual_kernel<T, kHead, kRegisters, O>, shape, stream, args);
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
  if (plan.cluster > 1 && !has_clusters(row_kernel_capability())) {
    throw std::invalid_argument("row plan: cluster must be 1 for kernels compiled for capability " +
                                std::to_string(row_kernel_capability()) + ", got " +
                                std::to_string(plan.cluster));
  }
  const int64_t block_vectors = block_vectors_of(block.cols * element_size(block.dtype) / 16, plan.cluster);
  const bool in_registers = plan.stage == RowStage::registers;
  if (in_registers && block_vectors > int64_t{kRegisterVectors} * plan.threads) {
    throw std::invalid_argument("row plan: stage registers must hold the " + std::to_string(block_vectors) +
                                " vectors of a block, got cluster=" + std::to_string(plan.cluster) +
                                ", threads=" + std::to_string(plan.threads));
  }
  const int64_t room = in_registers ? 0 : int64_t{plan.shared_vectors} * plan.threads;

  // Label smoothing needs the sum of the logits, which the identity head does not keep.
  HeadMode mode = head_mode(head);
  if (mode == HeadMode::identity && token_loss.label_smoothing != 0.0) mode = HeadMode::affine;
  if (in_registers && block.out_dtype != block.dtype) {
    throw std::invalid_argument("row plan: stage registers takes a residual of the dtype of the logits");
  }
  dispatch_dtypes(block, [&](auto zero, auto out_zero) {
    using T = decltype(zero);
    using O = decltype(out_zero);
    const ResidualArgs<T, O> args{
        static_cast<const T*>(block.in),
        static_cast<O*>(block.out),
        labels,
        row_max,
        row_sum,
        logp,
        loss,
        0,
        block.in_stride,
        block.out_stride,
        static_cast<int>(block.cols),
        static_cast<int>(block_vectors),
        static_cast<int>(std::min(room, block_vectors)),
        stats_exchange_bytes(plan.cluster, plan.threads),
        static_cast<unsigned>((int64_t{1} << 32) / plan.cluster + ((int64_t{1} << 32) % plan.cluster != 0)),
        plan.streaming,
        head_args<T>(head),
        static_cast<float>(token_loss.label_smoothing),
        static_cast<float>(token_loss.z_loss),
        static_cast<float>(token_loss.label_smoothing) / static_cast<float>(block.cols)};
    dispatch_head(mode, [&](auto tag) {
      constexpr HeadMode kHead = decltype(tag)::value;
      if constexpr (kHead == HeadMode::identity && std::is_same_v<T, O>) {
        if (in_registers) return launch<T, kHead, true>(args, block.rows, plan, stream);
      }
      launch<T, kHead, false>(args, block.rows, plan, stream);
    });
  });
}

}  // namespace slime_fused::cuda
