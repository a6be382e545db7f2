// From the raw product h W^T to the logit z of the softmax, and back through its derivative.
//
//   y = scale * (raw + bias);   z = y, or softcap * tanh(y / softcap);   dz/draw = scale * (1 - (z /
//   softcap)^2)
//
// Three modes, chosen on the host, so that a plain head pays for nothing: `identity`, `affine` (scale, bias)
// and `softcap` (affine, then the cap).
#pragma once

#include "../include/slime_fused.h"
#include "vec_io.cuh"

namespace slime_fused::cuda {

enum class HeadMode { identity, affine, softcap };

template <class T>
struct HeadArgs {
  const T* bias;      // [V] or null
  float scale;        // 1 in mode identity
  float softcap;      // 0 unless mode softcap
  float inv_softcap;  // 0 unless mode softcap
};

inline HeadMode head_mode(const HeadTransform& head) {
  if (head.softcap != 0.0) return HeadMode::softcap;
  return head.bias != nullptr || head.scale != 1.0 ? HeadMode::affine : HeadMode::identity;
}

template <class T>
HeadArgs<T> head_args(const HeadTransform& head) {
  return {static_cast<const T*>(head.bias), static_cast<float>(head.scale), static_cast<float>(head.softcap),
          head.softcap != 0.0 ? static_cast<float>(1.0 / head.softcap) : 0.f};
}

// z of a raw product whose bias is already added.
template <HeadMode kHead, class T>
__device__ inline float finish_logit(float raw, const HeadArgs<T>& head) {
  if constexpr (kHead == HeadMode::identity) return raw;
  const float y = head.scale * raw;
  if constexpr (kHead == HeadMode::softcap) return head.softcap * tanhf(y * head.inv_softcap);
  return y;
}

// z of one element; `v` is its column in this block.
template <HeadMode kHead, class T>
__device__ inline float logit(const T* row, int v, const HeadArgs<T>& head) {
  float raw = to_float(row[v]);
  if constexpr (kHead != HeadMode::identity) {
    if (head.bias != nullptr) raw += to_float(head.bias[v]);
  }
  return finish_logit<kHead>(raw, head);
}

// z of the E elements of a vector whose first column is `v`.
template <HeadMode kHead, class T>
__device__ inline void logits_of(const uint4& packed, int v, const HeadArgs<T>& head,
                                 float (&z)[kVecElems<T>]) {
  constexpr int E = kVecElems<T>;
  VecCodec<T>::unpack(packed, z);
  if constexpr (kHead != HeadMode::identity) {
    if (head.bias != nullptr) {
      const T* bias = head.bias + v;
      if (is_aligned_16(bias)) {
        float b[E];
        VecCodec<T>::unpack(*reinterpret_cast<const uint4*>(bias), b);
#pragma unroll
        for (int e = 0; e < E; ++e) z[e] += b[e];
      } else {
#pragma unroll
        for (int e = 0; e < E; ++e) z[e] += to_float(bias[e]);
      }
    }
#pragma unroll
    for (int e = 0; e < E; ++e) z[e] = finish_logit<kHead>(z[e], head);
  }
}

// dz/draw divided by the scale, which callers fold into their row constants.
template <HeadMode kHead, class T>
__device__ inline float cap_derivative(float z, const HeadArgs<T>& head) {
  if constexpr (kHead != HeadMode::softcap) return 1.f;
  const float t = z * head.inv_softcap;
  return fmaf(-t, t, 1.f);
}

}  // namespace slime_fused::cuda
