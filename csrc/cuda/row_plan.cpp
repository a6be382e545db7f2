#include "row_plan.h"

#include <algorithm>
#include <stdexcept>
#include <string>

namespace slime_fused::cuda {
namespace {

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

// Data-centre Hopper and Blackwell. Other devices of capability 12.x take no cluster above one block.
bool has_clusters(int capability) { return capability >= 90 && capability < 120; }

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

void require(bool ok, const char* field, const char* expected, int64_t got) {
  if (!ok) {
    throw std::invalid_argument(std::string("row plan: ") + field + " must be " + expected + ", got " +
                                std::to_string(got));
  }
}

}  // namespace

RowPlan choose_row_plan(int64_t cols, int elem_bytes, int capability) {
  const int64_t row_bytes = cols * elem_bytes;
  const int64_t vectors = divide_up(row_bytes, 16);
  RowPlan plan;

  // Blocks per row: 64 KB a block, so that three rows' slices share a multiprocessor and the writes of one
  // overlap the reads of another.
  if (has_clusters(capability)) {
    while (plan.cluster < 8 && row_bytes > int64_t{64} * 1024 * plan.cluster) plan.cluster *= 2;
  }

  // At least 4 vectors in flight per thread, whole warps.
  const int64_t per_block = divide_up(vectors, plan.cluster);
  const int64_t wanted = divide_up(divide_up(per_block, 4), 32) * 32;
  plan.threads = static_cast<int>(std::clamp<int64_t>(wanted, 32, kMaxSharedThreads));

  const int64_t fits = staging_bytes(capability) / (16 * plan.threads);
  plan.shared_vectors = static_cast<int>(std::min(divide_up(per_block, plan.threads), fits));
  return plan;
}

void check_row_plan(const RowPlan& plan) {
  const bool in_registers = plan.stage == RowStage::registers;
  const int limit = in_registers ? kMaxRegisterThreads : kMaxSharedThreads;
  require(plan.threads >= 32 && plan.threads % 32 == 0, "threads", "a positive multiple of 32", plan.threads);
  require(plan.threads <= limit, "threads", "at most 512 (shared) or 1024 (registers)", plan.threads);
  require(plan.cluster >= 1 && plan.cluster <= 16, "cluster", "between 1 and 16", plan.cluster);
  require(plan.shared_vectors >= 0 && plan.shared_vectors * plan.threads * 16 <= 227 * 1024, "shared_vectors",
          "small enough for 227 KB per block", plan.shared_vectors);
  require(plan.pad_bytes >= 0, "pad_bytes", "non-negative", plan.pad_bytes);
  require(plan.max_blocks >= 0, "max_blocks", "non-negative", plan.max_blocks);
}

}  // namespace slime_fused::cuda
