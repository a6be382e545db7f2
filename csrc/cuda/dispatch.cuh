// From the run-time dtype and head of a call to the template that serves it, and the checks all row kernels
// share.
#pragma once

#include <type_traits>

#include "kernels.h"
#include "online_softmax.cuh"

namespace slime_fused::cuda {

template <HeadMode kMode>
using HeadTag = std::integral_constant<HeadMode, kMode>;

template <class Fn>
void dispatch_dtype(DType dtype, Fn&& fn) {
  switch (dtype) {
    case DType::f32:
      return fn(float{});
    case DType::bf16:
      return fn(__nv_bfloat16{});
    case DType::f16:
      return fn(__half{});
    default:
      throw std::invalid_argument(
          "dtype must be f32, bf16 or f16 on CUDA, got f64: use the cpu backend for float64");
  }
}

// Of the logits and of their residual, which may be narrower than f32 logits (check_block).
template <class Fn>
void dispatch_dtypes(const LogitsBlock& block, Fn&& fn) {
  if (block.out_dtype == block.dtype) return dispatch_dtype(block.dtype, [&](auto zero) { fn(zero, zero); });
  if (block.out_dtype == DType::bf16) return fn(float{}, __nv_bfloat16{});
  fn(float{}, __half{});
}

template <class Fn>
void dispatch_head(HeadMode mode, Fn&& fn) {
  switch (mode) {
    case HeadMode::identity:
      return fn(HeadTag<HeadMode::identity>{});
    case HeadMode::affine:
      return fn(HeadTag<HeadMode::affine>{});
    case HeadMode::softcap:
      return fn(HeadTag<HeadMode::softcap>{});
    case HeadMode::dynamic:
      break;  // never what a head needs
  }
}

inline int64_t element_size(DType dtype) { return dtype == DType::f64 ? 8 : (dtype == DType::f32 ? 4 : 2); }

inline void check_block(const char* kernel, const LogitsBlock& block, bool writes) {
  const auto fail = [&](const char* what, int64_t got) {
    throw std::invalid_argument(std::string(kernel) + ": " + what + ", got " + std::to_string(got));
  };
  if (block.rows < 0) fail("rows must be non-negative", block.rows);
  if (block.cols < 1 || block.cols > kMaxCols) fail("cols must lie in [1, 2^31 - 2^20]", block.cols);
  if (block.in_stride < block.cols) fail("in_stride must be at least cols", block.in_stride);
  const bool is_narrower =
      block.dtype == DType::f32 && (block.out_dtype == DType::bf16 || block.out_dtype == DType::f16);
  if (writes && block.out_dtype != block.dtype && !is_narrower) {
    fail("out_dtype must be that of the logits, or bf16 or f16 where these are f32",
         static_cast<int64_t>(block.out_dtype));
  }
  if (writes && block.out_dtype != block.dtype && block.rows > 0 && block.in == block.out) {
    fail("out must not be logits of another dtype, rows", block.rows);
  }
  if (writes && block.out_stride < block.cols) fail("out_stride must be at least cols", block.out_stride);
  if (block.rows > 0 && block.in == nullptr) fail("logits must not be null with rows", block.rows);
  if (writes && block.rows > 0 && block.out == nullptr) fail("out must not be null with rows", block.rows);
}

}  // namespace slime_fused::cuda
