// Argument checks shared by the CPU entry points. Each throws std::invalid_argument (ValueError in Python)
// with the argument's name, what was expected and what came.
#pragma once

#include <cmath>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "slime_fused.h"

namespace slime_fused::cpu {

inline void check(bool holds, const std::string& message) {
  if (!holds) throw std::invalid_argument(message);
}

inline void check_pointer(const void* pointer, const char* name) {
  check(pointer != nullptr, std::string(name) + ": expected a buffer, got a null pointer");
}

inline void check_at_least(int64_t value, int64_t least, const char* name) {
  if (value < least) {
    throw std::invalid_argument(std::string(name) + ": expected at least " + std::to_string(least) +
                                ", got " + std::to_string(value));
  }
}

// Sizes, strides and pointers of a block; `writes` says whether `out` is used.
inline void check_block(const LogitsBlock& block, bool writes) {
  check_at_least(block.rows, 0, "rows");
  check_at_least(block.cols, 1, "cols");
  check_at_least(block.col_offset, 0, "col_offset");
  check_at_least(static_cast<int64_t>(block.dtype), 0, "dtype");
  check(block.dtype <= DType::f64, "dtype: expected 0 (f32), 1 (bf16), 2 (f16) or 3 (f64), got " +
                                       std::to_string(static_cast<int>(block.dtype)));
  if (block.rows == 0) return;
  check_pointer(block.in, "logits");
  if (block.rows > 1) check_at_least(block.in_stride, block.cols, "logits row stride");
  if (!writes) return;
  const DType out_dtype = block.out_dtype;
  const bool is_narrower = block.dtype == DType::f32 && (out_dtype == DType::bf16 || out_dtype == DType::f16);
  check(out_dtype == block.dtype || is_narrower,
        "out_dtype: expected that of the logits (" + std::to_string(static_cast<int>(block.dtype)) +
            "), or 1 (bf16) or 2 (f16) for 0 (f32), got " + std::to_string(static_cast<int>(out_dtype)));
  check_pointer(block.out, "out");
  if (block.rows > 1) check_at_least(block.out_stride, block.cols, "out row stride");
  check(block.in != block.out || out_dtype == block.dtype,
        "out: expected another buffer than logits of another dtype");
  check(block.in != block.out || block.rows == 1 || block.in_stride == block.out_stride,
        "out: expected the row stride of logits (" + std::to_string(block.in_stride) +
            ") where it is the same buffer, got " + std::to_string(block.out_stride));
}

inline void check_head(const HeadTransform& head) {
  check(head.temperature > 0 && std::isfinite(head.temperature),
        "temperature: expected a finite number above 0, got " + std::to_string(head.temperature));
}

// Labels lie below the vocabulary's size. Runs before anything is written, so a caller's buffers stay whole.
inline void check_labels(const int64_t* labels, int64_t rows, int64_t vocab) {
  if (rows > 0) check_pointer(labels, "labels");
  for (int64_t m = 0; m < rows; ++m) {
    if (labels[m] >= vocab) {
      throw std::invalid_argument("labels: expected values below the vocabulary size " +
                                  std::to_string(vocab) + ", got " + std::to_string(labels[m]) + " at row " +
                                  std::to_string(m));
    }
  }
}

}  // namespace slime_fused::cpu
