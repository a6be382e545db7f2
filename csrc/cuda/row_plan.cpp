#include "row_plan.h"

#include <algorithm>
#include <stdexcept>
#include <string>

namespace slime_fused::cuda {
namespace {

constexpr int64_t kMaxBlockBytes = 227 * 1024;  // of shared memory, on any device

// Dynamic shared memory that one block may use, less 8 KB for the exchange of statistics and the system's own
// share (CUDA programming guide, technical specifications per compute capability).
int staging_bytes(int capability) {
  switch (capability) {
    case 80:
    case 87:
      return (163 - 8) * 1024;
    case 86:
    case 89:
    case 120:
    case 121:
      return (99 - 8) * 1024;
    default:
      return capability >= 90 ? (227 - 8) * 1024 : 40 * 1024;
  }
}

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Whole warps with about `per_thread` vectors a thread, and at least 4 where the block has that many threads'
// worth: a thread costs 282 instructions a row beyond its vectors, so 16 vectors cut that to 2 an
// element; but a short row needs its loads in flight from more than a warp or two.
int threads_for(int64_t block_vectors, int per_thread) {
  const int64_t least = std::min<int64_t>(128, divide_up(block_vectors, 4));
  const int64_t wanted = std::max(divide_up(block_vectors, per_thread), least);
  return static_cast<int>(std::clamp<int64_t>(divide_up(wanted, 32) * 32, 32, kMaxSharedThreads));
}

// A plan that stages what fits of a row of `vectors`.
RowPlan staged_plan(int64_t vectors, int cluster, int per_thread, int capability) {
  const int64_t block_vectors = block_vectors_of(vectors, cluster);
  RowPlan plan;
  plan.cluster = cluster;
  plan.threads = threads_for(block_vectors, per_thread);
  const int64_t fits = staging_bytes(capability) / (16 * plan.threads);
  plan.shared_vectors = static_cast<int>(std::min(divide_up(block_vectors, plan.threads), fits));
  return plan;
}

// Whether three blocks share a multiprocessor of 228 KB, of which each takes 1 KB for the system: the loads
// of one then overlap the stores of another.
bool three_fit(const RowPlan& plan, int64_t vectors) {
  constexpr int64_t kThird = 228 * 1024 / 3 - 1024;
  return 16 * block_vectors_of(vectors, plan.cluster) + stats_exchange_bytes(plan.cluster, plan.threads) <=
         kThird;
}

void require(bool ok, const char* field, const char* expected, int64_t got) {
  if (!ok) {
    throw std::invalid_argument(std::string("row plan: ") + field + " must be " + expected + ", got " +
                                std::to_string(got));
  }
}

}  // namespace

// Data-centre Hopper and Blackwell. Other devices of capability 12.x take no cluster above one block.
bool has_clusters(int capability) { return capability >= 90 && capability < 120; }

RowPlan choose_row_plan(int64_t cols, int elem_bytes, int capability) {
  constexpr int kPerThread = 16;
  const int64_t vectors = divide_up(cols * elem_bytes, 16);
  RowPlan plan = staged_plan(vectors, 1, kPerThread, capability);
  // bf16 on Hopper: one block for V = 32000, 4 for 128256 and 151936 (76 KB each, the most that three may
  // take), 8 for 262144.
  while (has_clusters(capability) && plan.cluster < 8 && !three_fit(plan, vectors)) {
    plan = staged_plan(vectors, 2 * plan.cluster, kPerThread, capability);
  }
  return plan;
}

std::vector<RowPlan> row_plan_candidates(int64_t cols, int elem_bytes, int capability) {
  const int64_t vectors = divide_up(cols * elem_bytes, 16);
  std::vector<RowPlan> plans = {choose_row_plan(cols, elem_bytes, capability)};
  const auto add = [&](RowPlan plan) {
    const auto same = [&](const RowPlan& other) {
      return other.stage == plan.stage && other.cluster == plan.cluster && other.threads == plan.threads &&
             other.shared_vectors == plan.shared_vectors && other.streaming == plan.streaming;
    };
    if (std::none_of(plans.begin(), plans.end(), same)) plans.push_back(plan);
  };
  const auto add_both = [&](RowPlan plan) {
    add(plan);
    plan.streaming = true;
    add(plan);
  };
  add_both(plans.front());
  for (int cluster = 1; cluster <= (has_clusters(capability) ? 16 : 1); cluster *= 2) {
    const int64_t block_vectors = block_vectors_of(vectors, cluster);
    if (cluster > 1 && block_vectors < 512) break;  // a block of less than 8 KB
    for (const int per_thread : {8, 16, 32}) add_both(staged_plan(vectors, cluster, per_thread, capability));
    RowPlan plan;
    plan.cluster = cluster;
    add_both(plan);  // nothing staged: everything is read again
    plan.stage = RowStage::registers;
    plan.threads = static_cast<int>(divide_up(divide_up(block_vectors, kRegisterVectors), 32) * 32);
    if (plan.threads <= kMaxRegisterThreads) add_both(plan);
  }
  return plans;
}

void check_row_plan(const RowPlan& plan) {
  const bool in_registers = plan.stage == RowStage::registers;
  const int limit = in_registers ? kMaxRegisterThreads : kMaxSharedThreads;
  require(plan.threads >= 32 && plan.threads % 32 == 0, "threads", "a positive multiple of 32", plan.threads);
  require(plan.threads <= limit, "threads", "at most 512 (shared) or 1024 (registers)", plan.threads);
  require(plan.cluster >= 1 && plan.cluster <= 16, "cluster", "between 1 and 16", plan.cluster);
  const int64_t room = kMaxBlockBytes - stats_exchange_bytes(plan.cluster, plan.threads);
  require(plan.shared_vectors >= 0 && int64_t{plan.shared_vectors} * plan.threads * 16 <= room,
          "shared_vectors", "small enough for 227 KB per block", plan.shared_vectors);
  require(plan.pad_bytes >= 0 && plan.pad_bytes <= room, "pad_bytes", "small enough for 227 KB per block",
          plan.pad_bytes);
  require(plan.max_blocks >= 0, "max_blocks", "non-negative", plan.max_blocks);
}

}  // namespace slime_fused::cuda
