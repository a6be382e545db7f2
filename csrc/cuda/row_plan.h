// How the row kernel is laid out on the device: a pure function of the row's size and the device's
// capability, so that it can be printed, tested and overridden by benchmarks.
#pragma once

#include <cstdint>
#include <vector>

namespace slime_fused::cuda {

// Where a row waits between its two visits. What does not fit is read again through L2.
enum class RowStage : int { shared = 0, registers = 1 };

struct RowPlan {
  RowStage stage = RowStage::shared;
  int cluster = 1;         // blocks that share one row (above 1: compute capability 9.x and 10.x only)
  int threads = 512;       // per block, a multiple of 32
  int shared_vectors = 0;  // 16-byte vectors per thread that stay in shared memory (stage `shared`)
  int pad_bytes = 0;       // shared memory to take at least, to hold fewer blocks on a multiprocessor
  bool streaming = false;  // store the residual with the evict-first hint
  int64_t max_blocks = 0;  // 0: one cluster per row; else rows are strided over this many blocks
};

// Vectors per thread that stage `registers` holds.
inline constexpr int kRegisterVectors = 8;
inline constexpr int kMaxSharedThreads = 512;
inline constexpr int kMaxRegisterThreads = 1024;

// 16-byte vectors of a row that one of the `cluster` blocks owns; whole lines of 128 bytes, so that no two
// blocks write to one.
constexpr int64_t block_vectors_of(int64_t row_vectors, int cluster) {
  return ((row_vectors + cluster - 1) / cluster + 7) / 8 * 8;
}

// Shared memory through which the warps of a row's blocks exchange their statistics: a barrier,
// [cluster * warps] pairs (max, sum), then as many sums of logits, float32; three more where moments are
// kept.
inline constexpr int kExchangeHeader = 16;
constexpr int stats_exchange_bytes(int cluster, int threads, bool moments = false) {
  return (kExchangeHeader + (moments ? 24 : 12) * cluster * (threads / 32) + 127) / 128 * 128;
}

// Whether devices of this capability (10 * major + minor) run clusters of several blocks.
bool has_clusters(int capability);

// The plan for rows of `cols` elements of `elem_bytes` bytes; `capability` is 10 * major + minor.
RowPlan choose_row_plan(int64_t cols, int elem_bytes, int capability);

// Plans worth measuring for such rows, the chosen one first; each passes check_row_plan.
std::vector<RowPlan> row_plan_candidates(int64_t cols, int elem_bytes, int capability);

// Throws std::invalid_argument naming the field if no device could run the plan.
void check_row_plan(const RowPlan& plan);

}  // namespace slime_fused::cuda
