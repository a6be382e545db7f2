// From the run-time dtypes and head of a call to the templates of row_kernels.cpp.
#pragma once

#include "slime_fused.h"

namespace slime_fused::cpu::SLIME_FUSED_ISA {
namespace {

enum class Head { plain, affine, capped };

// d z / d raw where no soft cap bends it.
inline double full_scale(const HeadTransform& head) { return head.scale / head.temperature; }

Head head_kind(const HeadTransform& head) {
  if (head.softcap != 0.0) return Head::capped;
  return head.bias != nullptr || full_scale(head) != 1.0 ? Head::affine : Head::plain;
}

template <typename Call>
void with_head(const HeadTransform& head, const Call& call) {
  switch (head_kind(head)) {
    case Head::plain:
      return call.template operator()<Head::plain>();
    case Head::affine:
      return call.template operator()<Head::affine>();
    case Head::capped:
      return call.template operator()<Head::capped>();
  }
}

template <typename Call>
void with_dtype(DType dtype, const Call& call) {
  switch (dtype) {
    case DType::f32:
      return call.template operator()<DType::f32>();
    case DType::bf16:
      return call.template operator()<DType::bf16>();
    case DType::f16:
      return call.template operator()<DType::f16>();
    case DType::f64:
      return call.template operator()<DType::f64>();
  }
}

// The residual has the dtype of the logits, or 16 bits where these have 32 (checked by the caller).
template <typename Call>
void with_dtypes(const LogitsBlock& block, const Call& call) {
  if (block.out_dtype == block.dtype) {
    return with_dtype(block.dtype, [&]<DType kType>() { call.template operator()<kType, kType>(); });
  }
  if (block.out_dtype == DType::bf16) return call.template operator()<DType::f32, DType::bf16>();
  return call.template operator()<DType::f32, DType::f16>();
}

}  // namespace
}  // namespace slime_fused::cpu::SLIME_FUSED_ISA
