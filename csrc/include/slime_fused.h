// The native kernels' interface: one set of argument structs, implemented twice (csrc/cpu, csrc/cuda).
//
// Everything here is raw pointers and sizes. Neither torch nor CUDA is included, so one build of the
// extension serves every torch release, and the CPU module compiles where there is no CUDA toolkit.
//
// Notation: M rows of logits, V columns, S sequences, P pairs, N tokens.
// `acc` is the accumulation type of a dtype: double for f64, float for everything else. All statistics,
// log-probabilities and loss terms are `acc`.
#pragma once

#include <cstdint>

namespace slime_fused {

enum class DType : int { f32 = 0, bf16 = 1, f16 = 2, f64 = 3 };

// A block of logits. Columns are contiguous; rows are `stride` elements apart (stride >= cols).
// `out` may equal `in` (the residual is then written over the logits); otherwise they must not overlap. Its
// dtype is that of `in`, or bf16 or f16 where `in` is f32.
struct LogitsBlock {
  const void* in = nullptr;  // [M, V] dtype, logits before bias, scale and soft cap
  void* out = nullptr;       // [M, V] out_dtype, or null where nothing is written
  int64_t rows = 0;          // M
  int64_t cols = 0;          // V, the columns of this block
  int64_t in_stride = 0;     // elements between two rows of `in`
  int64_t out_stride = 0;    // elements between two rows of `out`
  int64_t col_offset = 0;    // vocabulary index of column 0 (non-zero for a shard of the vocabulary)
  DType dtype = DType::f32;
  DType out_dtype = DType::f32;
};

// What turns a raw product h W^T into the logit z of the softmax:
//   y = scale * (raw + bias);   z = T(y) / temperature,   T(y) = y where softcap == 0, else
//   softcap * tanh(y / softcap).
struct HeadTransform {
  const void* bias = nullptr;  // [V] dtype (this block's columns), or null
  double scale = 1.0;
  double softcap = 0.0;      // 0: off
  double temperature = 1.0;  // > 0
};

// The loss of one token whose gradient is formed, with z the transformed logits, y the label:
//   loss = -(1 - eps) * logp_y + eps * (lse - mean_v z_v) + z_loss * lse^2
// With eps = z_loss = 0 this is -logp_y and its gradient is softmax - onehot: "the residual".
struct TokenLoss {
  double label_smoothing = 0.0;  // eps
  double z_loss = 0.0;
  int64_t vocab = 0;  // columns of the whole vocabulary (eps is spread over these)
};

// Parameters of the SLIME loss (arXiv 2602.02383, eq. 5 to 10).
struct SlimeParams {
  double lambda_w = 0.1;
  double lambda_l = 0.1;
  double lambda_d = 1.0;
  double delta = 1.25;
  double margin_hard = 1.5;
  double margin_soft = 1.0;
  double kappa = 2.5;
  double power = 2.5;
  double pair_weight = 1.0;   // 1 / (number of pairs of the whole batch)
  double token_weight = 0.0;  // 0: the stabilizer is a mean per response ("sequence");
                              // else 1 / (rejected tokens of the whole batch) ("token")
};

}  // namespace slime_fused
