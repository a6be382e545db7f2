// From the raw product h W^T to the logit z of the softmax, and back through its derivative.
//
//   y = scale * (raw + bias);   z = y / temperature, or softcap / temperature * tanh(y / softcap)
//   dz/draw = scale / temperature * (1 - tanh(y / softcap)^2)
//
// The host folds the constants in double, so that a temperature costs a kernel nothing. Three modes, chosen
// on the host, so that a plain head pays for nothing either: `identity`, `affine` (scale, bias) and `softcap`
// (affine, then the cap). `dynamic` is one kernel for all three, which asks once a vector whether there is a
// cap.
//
// A logit has the same bits wherever it is formed: its products are rounded before anything is added to them.
#pragma once

#include "../include/slime_fused.h"
#include "vec_io.cuh"

namespace slime_fused::cuda {

enum class HeadMode { identity, affine, softcap, dynamic };

template <class T>
struct HeadArgs {
  const T* bias;   // [V] or null
  float scale;     // of raw + bias: scale / temperature, or scale / softcap under a cap
  float cap;       // softcap / temperature, or 0: no cap
  float inv_cap;   // temperature / softcap, or 0
  float gradient;  // scale / temperature: dz/draw where no cap bends
};

inline HeadMode head_mode(const HeadTransform& head) {
  if (head.softcap != 0.0) return HeadMode::softcap;
  return head.bias != nullptr || head.scale / head.temperature != 1.0 ? HeadMode::affine : HeadMode::identity;
}

template <class T>
HeadArgs<T> head_args(const HeadTransform& head) {
  const bool has_cap = head.softcap != 0.0;
  const double gradient = head.scale / head.temperature;
  return {static_cast<const T*>(head.bias),
          static_cast<float>(has_cap ? head.scale / head.softcap : gradient),
          static_cast<float>(head.softcap / head.temperature),
          has_cap ? static_cast<float>(head.temperature / head.softcap) : 0.f, static_cast<float>(gradient)};
}

template <HeadMode kHead, class T>
__device__ inline bool has_cap(const HeadArgs<T>& head) {
  if constexpr (kHead == HeadMode::dynamic) return head.cap != 0.f;
  return kHead == HeadMode::softcap;
}

// z of a raw product whose bias is already added.
template <HeadMode kHead, class T>
__device__ inline float finish_logit(float raw, const HeadArgs<T>& head) {
  if constexpr (kHead == HeadMode::identity) return raw;
  const float y = __fmul_rn(head.scale, raw);
  return has_cap<kHead>(head) ? __fmul_rn(head.cap, tanhf(y)) : y;
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
    if (has_cap<kHead>(head)) {
#pragma unroll
      for (int e = 0; e < E; ++e) z[e] = finish_logit<HeadMode::softcap>(z[e], head);
    } else {
#pragma unroll
      for (int e = 0; e < E; ++e) z[e] = finish_logit<HeadMode::affine>(z[e], head);
    }
  }
}

// dz/draw divided by `head.gradient`, which callers fold into their row constants.
template <HeadMode kHead, class T>
__device__ inline float cap_derivative(float z, const HeadArgs<T>& head) {
  if (!has_cap<kHead>(head)) return 1.f;
  const float t = z * head.inv_cap;
  return fmaf(-t, t, 1.f);
}

}  // namespace slime_fused::cuda
