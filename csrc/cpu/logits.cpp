#include "logits.h"

#include <algorithm>

#include "checks.h"
#include "dispatch.h"
#include "thread_pool.h"

namespace slime_fused::cpu {
namespace {

// Waking a thread costs tens of microseconds; a part of 2^16 logits takes about as long.
constexpr int64_t kLogitsPerPart = 1 << 16;

template <typename Args>
void spread_rows(const Args& args, int num_threads, void (*kernel)(const Args&, int64_t, int64_t)) {
  const int64_t rows_per_part = std::max<int64_t>(kLogitsPerPart / args.block.cols, 1);
  parallel_for(args.block.rows, rows_per_part, num_threads,
               [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

}  // namespace

void softmax_residual(const SoftmaxResidualArgs& args, int num_threads) {
  check_block(args.block, /*writes=*/true);
  check_head(args.head);
  check_at_least(num_threads, 1, "num_threads");
  if (args.block.rows == 0) return;
  check_labels(args.labels, args.block.rows, args.block.cols);
  check_pointer(args.row_max, "row_max");
  check_pointer(args.row_sum, "row_sum");
  check_pointer(args.logp, "logp");
  spread_rows(args, num_threads, active_kernels().softmax_residual);
}

void logits_stats(const LogitsStatsArgs& args, int num_threads) {
  check_block(args.block, /*writes=*/false);
  check_head(args.head);
  check_at_least(num_threads, 1, "num_threads");
  if (args.block.rows == 0) return;
  check_pointer(args.labels, "labels");
  check_pointer(args.row_max, "row_max");
  check_pointer(args.row_sum, "row_sum");
  check_pointer(args.label_logit, "label_logit");
  if (args.centred_sum != nullptr || args.square_sum != nullptr || args.max_before != nullptr) {
    check_pointer(args.centred_sum, "centred_sum");
    check_pointer(args.square_sum, "square_sum");
    check_pointer(args.max_before, "max_before");
  }
  spread_rows(args, num_threads, active_kernels().logits_stats);
}

void residual_from_stats(const ResidualFromStatsArgs& args, int num_threads) {
  check_block(args.block, /*writes=*/true);
  check_head(args.head);
  check_at_least(num_threads, 1, "num_threads");
  check_at_least(args.token_loss.vocab, args.block.col_offset + args.block.cols, "vocab_size");
  if (args.block.rows == 0) return;
  check_labels(args.labels, args.block.rows, args.token_loss.vocab);
  check_pointer(args.row_max, "row_max");
  check_pointer(args.row_sum, "row_sum");
  check_pointer(args.logp, "logp");
  if (args.entropy != nullptr || args.entropy_scale != nullptr) {
    check_pointer(args.entropy, "entropy");
    check_pointer(args.entropy_scale, "entropy_scale");
  }
  spread_rows(args, num_threads, active_kernels().residual_from_stats);
}

}  // namespace slime_fused::cpu
