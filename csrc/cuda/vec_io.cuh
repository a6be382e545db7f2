// 16-byte access to rows of any length and any alignment.
//
// A row is cut into an unaligned head (fewer than E elements), 16-byte vectors, and a tail (fewer than E),
// with E = 16 / sizeof(T). Vectors are dealt round robin over the threads of a row; the head and the tail go
// one element each to its first 2 E threads. Who owns an element is therefore a pure function of its index,
// and the thread that wrote a vector is the one that may patch an element of it later without a barrier.
#pragma once

#include "intrinsics.cuh"

namespace slime_fused::cuda {

template <class T>
inline constexpr int kVecElems = 16 / static_cast<int>(sizeof(T));

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float to_float(__half x) { return __half2float(x); }

template <class T>
__device__ inline T from_float(float x);
template <>
__device__ inline float from_float<float>(float x) {
  return x;
}
template <>
__device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ inline __half from_float<__half>(float x) {
  return __float2half_rn(x);
}

// The elements of a vector as floats, and back.
template <class T>
struct VecCodec {
  static constexpr int kPerWord = 4 / static_cast<int>(sizeof(T));

  union Word {
    uint32_t bits;
    T elems[kPerWord];
    __device__ Word() {}
  };

  __device__ static void unpack(const uint4& v, float (&x)[kVecElems<T>]) {
    const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      Word word;
      word.bits = words[w];
#pragma unroll
      for (int e = 0; e < kPerWord; ++e) x[w * kPerWord + e] = to_float(word.elems[e]);
    }
  }

  __device__ static uint4 pack(const float (&x)[kVecElems<T>]) {
    uint32_t words[4];
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      Word word;
#pragma unroll
      for (int e = 0; e < kPerWord; ++e) word.elems[e] = from_float<T>(x[w * kPerWord + e]);
      words[w] = word.bits;
    }
    return make_uint4(words[0], words[1], words[2], words[3]);
  }
};

// Elements before the first 16-byte boundary at or after `p`.
template <class T>
__device__ inline int elements_to_boundary(const T* p) {
  const auto misaligned = static_cast<int>(reinterpret_cast<uintptr_t>(p) & 15);
  return ((16 - misaligned) & 15) / static_cast<int>(sizeof(T));
}

template <class T>
__device__ inline bool is_aligned_16(const T* p) {
  return (reinterpret_cast<uintptr_t>(p) & 15) == 0;
}

// How one row of `cols` elements is cut, and which element of its edges a thread owns.
struct RowSpan {
  int head;     // elements before the first vector
  int vectors;  // 16-byte vectors
  int tail;     // index of the first element after the last vector
  int cols;

  template <class T>
  __device__ static RowSpan of(const T* row, int cols) {
    constexpr int E = kVecElems<T>;
    const int to_boundary = elements_to_boundary(row);
    const int head = to_boundary < cols ? to_boundary : cols;
    const int vectors = (cols - head) / E;
    return {head, vectors, head + vectors * E, cols};
  }

  // The element of the head or tail that thread `t` owns, or -1.
  template <int E>
  __device__ int edge_of(int t) const {
    if (t < head) return t;
    if (t >= E && t - E < cols - tail) return tail + t - E;
    return -1;
  }

  // The thread that owns element `v` when `threads` threads share the row.
  template <int E>
  __device__ int owner_of(int v, int threads) const {
    if (v < head) return v;
    if (v >= tail) return E + v - tail;
    return ((v - head) / E) % threads;
  }
};

// Zeroes a row; thread `t` of `threads`.
template <class T>
__device__ inline void zero_row(T* row, int cols, int t, int threads) {
  constexpr int E = kVecElems<T>;
  const RowSpan span = RowSpan::of(row, cols);
  auto* vectors = reinterpret_cast<uint4*>(row + span.head);
  for (int i = t; i < span.vectors; i += threads) vectors[i] = make_uint4(0, 0, 0, 0);
  const int edge = span.edge_of<E>(t);
  if (edge >= 0) row[edge] = from_float<T>(0.f);
}

// Writes E consecutive elements, as one vector where the address allows it.
template <class T>
__device__ inline void store_elements(T* address, const float (&x)[kVecElems<T>], bool aligned,
                                      bool streaming) {
  if (aligned) {
    store_16(reinterpret_cast<uint4*>(address), VecCodec<T>::pack(x), streaming);
  } else {
#pragma unroll
    for (int e = 0; e < kVecElems<T>; ++e) address[e] = from_float<T>(x[e]);
  }
}

}  // namespace slime_fused::cuda
