// 16-byte access to rows of any length and any alignment.
//
// A row is cut into an unaligned head (fewer than E elements), 16-byte vectors, and a tail (fewer than E),
// with E = 16 / sizeof(T). Vectors are dealt round robin over the threads of a row; the head and the tail go
// one element each to its first 2 E threads. Who owns an element is therefore a pure function of its index,
// and the thread that wrote a vector is the one that may patch an element of it later without a barrier.
#pragma once

#include <cstring>
#include <type_traits>

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

template <class Pair>
__device__ inline uint32_t bits_of(const Pair& pair) {
  static_assert(sizeof(Pair) == 4);
  uint32_t bits;
  memcpy(&bits, &pair, 4);
  return bits;
}

template <class Pair>
__device__ inline Pair from_bits(uint32_t bits) {
  static_assert(sizeof(Pair) == 4);
  Pair pair;
  memcpy(static_cast<void*>(&pair), &bits, 4);
  return pair;
}

// One 32-bit word of a vector as floats, and back; `max` is elementwise and ignores NaN where it can.
template <class T>
struct WordCodec;

template <>
struct WordCodec<float> {
  static constexpr uint32_t kMinusInfinity = 0xff800000u;
  __device__ static void unpack(uint32_t bits, float* x) { x[0] = __uint_as_float(bits); }
  __device__ static uint32_t pack(const float* x) { return __float_as_uint(x[0]); }
  __device__ static uint32_t max(uint32_t a, uint32_t b) {
    return __float_as_uint(fmaxf(__uint_as_float(a), __uint_as_float(b)));
  }
};

// A bfloat16 is the upper half of a float: one shift or one mask each, where a conversion would take two.
template <>
struct WordCodec<__nv_bfloat16> {
  static constexpr uint32_t kMinusInfinity = 0xff80ff80u;
  __device__ static void unpack(uint32_t bits, float* x) {
    x[0] = __uint_as_float(bits << 16);
    x[1] = __uint_as_float(bits & 0xffff0000u);
  }
  __device__ static uint32_t pack(const float* x) { return bits_of(__floats2bfloat162_rn(x[0], x[1])); }
  __device__ static uint32_t max(uint32_t a, uint32_t b) {
    return bits_of(__hmax2(from_bits<__nv_bfloat162>(a), from_bits<__nv_bfloat162>(b)));
  }
};

template <>
struct WordCodec<__half> {
  static constexpr uint32_t kMinusInfinity = 0xfc00fc00u;
  __device__ static void unpack(uint32_t bits, float* x) {
    const float2 both = __half22float2(from_bits<__half2>(bits));
    x[0] = both.x;
    x[1] = both.y;
  }
  __device__ static uint32_t pack(const float* x) { return bits_of(__floats2half2_rn(x[0], x[1])); }
  __device__ static uint32_t max(uint32_t a, uint32_t b) {
    return bits_of(__hmax2(from_bits<__half2>(a), from_bits<__half2>(b)));
  }
};

// The elements of a vector as floats, and back.
template <class T>
struct VecCodec {
  static constexpr int kPerWord = 4 / static_cast<int>(sizeof(T));

  __device__ static void unpack(const uint4& v, float (&x)[kVecElems<T>]) {
    WordCodec<T>::unpack(v.x, x);
    WordCodec<T>::unpack(v.y, x + kPerWord);
    WordCodec<T>::unpack(v.z, x + 2 * kPerWord);
    WordCodec<T>::unpack(v.w, x + 3 * kPerWord);
  }

  __device__ static uint4 pack(const float (&x)[kVecElems<T>]) {
    return make_uint4(WordCodec<T>::pack(x), WordCodec<T>::pack(x + kPerWord),
                      WordCodec<T>::pack(x + 2 * kPerWord), WordCodec<T>::pack(x + 3 * kPerWord));
  }

  // Contributes nothing to a sum of exponentials.
  __device__ static uint4 minus_infinity() {
    constexpr uint32_t kWord = WordCodec<T>::kMinusInfinity;
    return make_uint4(kWord, kWord, kWord, kWord);
  }

  // The largest element of N vectors, NaN aside; NaN or -inf where there is nothing else.
  template <int N>
  __device__ static float max(const uint4 (&v)[N]) {
    uint32_t word = v[0].x;
#pragma unroll
    for (int j = 0; j < N; ++j) {
      if (j > 0) word = WordCodec<T>::max(word, v[j].x);
      word = WordCodec<T>::max(word, WordCodec<T>::max(v[j].y, WordCodec<T>::max(v[j].z, v[j].w)));
    }
    float x[kPerWord];
    WordCodec<T>::unpack(word, x);
    if constexpr (kPerWord == 2) return fmaxf(x[0], x[1]);
    return x[0];
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

  __device__ bool has_edges() const { return head != 0 || tail != cols; }

  // The element of the head or tail that thread `t` owns, or -1.
  template <int E>
  __device__ int edge_of(int t) const {
    if (t < head) return t;
    if (t >= E && t - E < cols - tail) return tail + t - E;
    return -1;
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

// As many elements of type O as a vector of T has, on their way to memory: 16 bytes, or 8 where O is half as
// wide.
template <class T, class O>
struct Outgoing {
  static constexpr int kElems = kVecElems<T>;
  static constexpr int kBytes = kElems * static_cast<int>(sizeof(O));
  static_assert(kBytes == 16 || kBytes == 8);
  using Packed = std::conditional_t<kBytes == 16, uint4, uint2>;

  __device__ static Packed pack(const float (&x)[kElems]) {
    if constexpr (kBytes == 16) {
      return VecCodec<O>::pack(x);
    } else {
      return make_uint2(WordCodec<O>::pack(x), WordCodec<O>::pack(x + 2));
    }
  }

  __device__ static bool is_aligned(const O* p) {
    return (reinterpret_cast<uintptr_t>(p) & (kBytes - 1)) == 0;
  }

  __device__ static void store(Packed* address, const Packed& packed, bool streaming) {
    if constexpr (kBytes == 16) {
      store_16(address, packed, streaming);
    } else {
      store_8(address, packed, streaming);
    }
  }

  // One by one, where the address allows no more.
  __device__ static void store_elements(O* address, const Packed& packed) {
    constexpr int kPerWord = 4 / static_cast<int>(sizeof(O));
    uint32_t words[kBytes / 4];
    memcpy(words, &packed, kBytes);
#pragma unroll
    for (int w = 0; w < kBytes / 4; ++w) {
      O elems[kPerWord];
      memcpy(elems, &words[w], 4);
#pragma unroll
      for (int e = 0; e < kPerWord; ++e) address[w * kPerWord + e] = elems[e];
    }
  }
};

}  // namespace slime_fused::cuda
