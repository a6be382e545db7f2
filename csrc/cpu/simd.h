// A small vector layer over the GCC vector extensions: one source for 16-, 32- and 64-byte registers.
//
// Purpose   loads and stores of f32, bf16, f16 and f64 elements as vectors of the accumulation type, and exp
//           and tanh on those vectors. The width comes from the flags of the file that includes this.
// Accuracy  exp: below 2 ulp, zero below -87.7 (float) or -708.7 (double); inf and NaN as in libm.
//           tanh: below 3 ulp (float), libm (double). Both are swept against float64 in the tests.
// Rounding  bf16 and f16 stores round to nearest even; NaN stays NaN, overflow of f16 gives inf.
//
// Everything sits in an anonymous namespace inside a namespace named after the instruction set, and no
// standard template is used: an inline function compiled here with AVX-512 must never be the copy the linker
// picks for the rest of the module.
#pragma once

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "slime_fused.h"

namespace slime_fused::cpu::SLIME_FUSED_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kBytes = 64;
#elif defined(__AVX2__)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif

typedef float VecF __attribute__((vector_size(kBytes)));
typedef uint32_t VecU32 __attribute__((vector_size(kBytes)));
typedef int32_t VecI32 __attribute__((vector_size(kBytes)));
typedef double VecD __attribute__((vector_size(kBytes)));
typedef uint64_t VecU64 __attribute__((vector_size(kBytes)));
typedef int64_t VecI64 __attribute__((vector_size(kBytes)));
typedef uint16_t HalfU16 __attribute__((vector_size(kBytes / 2)));  // as many lanes as VecF

// What the row kernels need to know of an accumulation type.
template <typename Scalar>
struct Acc;
template <>
struct Acc<float> {
  using Vec = VecF;
  using Index = VecI32;
  static constexpr int kLanes = kBytes / 4;
};
template <>
struct Acc<double> {
  using Vec = VecD;
  using Index = VecI64;
  static constexpr int kLanes = kBytes / 8;
};

template <typename Scalar>
using Vec = typename Acc<Scalar>::Vec;

inline VecF broadcast(float x) { return x - VecF{}; }
inline VecD broadcast(double x) { return x - VecD{}; }

// x as a register holds it. A product that the compiler fuses with the subtraction after it is not the number
// whose maximum was taken: at z = 5e4 a probability of 1 came out as 0.998.
template <typename V>
inline V as_rounded(V x) {
#if defined(__x86_64__)
  asm("" : "+v"(x));
#elif defined(__aarch64__)
  asm("" : "+w"(x));
#endif
  return x;
}

template <typename To, typename From>
inline To bit_cast_to(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof(to));
  return to;
}

// ---- Lane reductions, in a fixed order
// ---------------------------------------------------------------------

template <typename Scalar>
inline Scalar horizontal_sum(Vec<Scalar> x) {
  Scalar sum = 0;
  for (int i = 0; i < Acc<Scalar>::kLanes; ++i) sum += x[i];
  return sum;
}

template <typename Scalar>
inline Scalar horizontal_max(Vec<Scalar> x) {
  Scalar best = x[0];
  for (int i = 1; i < Acc<Scalar>::kLanes; ++i) best = x[i] > best ? x[i] : best;
  return best;
}

// a > b ? a : b and a < b ? a : b, so b where either is NaN: one instruction, which GCC 12 does not find.
#if defined(__AVX512F__)
inline VecF larger(VecF a, VecF b) { return (VecF)_mm512_max_ps((__m512)a, (__m512)b); }
inline VecF smaller(VecF a, VecF b) { return (VecF)_mm512_min_ps((__m512)a, (__m512)b); }
#else
inline VecF larger(VecF a, VecF b) { return a > b ? a : b; }
inline VecF smaller(VecF a, VecF b) { return a < b ? a : b; }
#endif
inline VecD larger(VecD a, VecD b) { return a > b ? a : b; }
inline VecD smaller(VecD a, VecD b) { return a < b ? a : b; }

inline bool any_greater(VecF a, float b) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask((__m512)a, _mm512_set1_ps(b), _CMP_GT_OQ) != 0;
#elif defined(__AVX2__)
  return _mm256_movemask_ps(_mm256_cmp_ps((__m256)a, _mm256_set1_ps(b), _CMP_GT_OQ)) != 0;
#elif defined(__x86_64__)
  return _mm_movemask_ps(_mm_cmpgt_ps((__m128)a, _mm_set1_ps(b))) != 0;
#else
  return horizontal_max<float>(a) > b;
#endif
}

inline bool any_greater(VecD a, double b) { return horizontal_max<double>(a) > b; }

// ---- 16-bit floats
// -----------------------------------------------------------------------------------------

inline VecF bf16_to_float(HalfU16 h) { return bit_cast_to<VecF>(__builtin_convertvector(h, VecU32) << 16); }

// Rounded to bf16 in the upper half of each lane; the lower half is left over.
inline VecU32 round_to_bf16(VecF x) {
  const VecU32 bits = bit_cast_to<VecU32>(x);
  const VecU32 rounded = bits + 0x7FFFu + ((bits >> 16) & 1u);
  const VecU32 quiet_nan = bits | 0x00400000u;  // rounding could carry a NaN's mantissa over to infinity
  return x == x ? rounded : quiet_nan;
}

inline HalfU16 float_to_bf16(VecF x) { return __builtin_convertvector(round_to_bf16(x) >> 16, HalfU16); }

inline VecF f16_to_float(HalfU16 h) {
#if defined(__AVX512F__)
  return (VecF)_mm512_cvtph_ps((__m256i)h);
#elif defined(__F16C__)
  return (VecF)_mm256_cvtph_ps((__m128i)h);
#else
  const VecU32 wide = __builtin_convertvector(h, VecU32);
  const VecU32 magnitude = (wide & 0x7FFFu) << 13;
  const VecU32 exponent = magnitude & 0x0F800000u;
  const VecU32 normal = magnitude + (112u << 23);  // rebias: 127 - 15
  const VecU32 special = magnitude | 0x7F800000u;
  // A subnormal half is mantissa * 2^-24: give it the exponent of 2^-14 and take that implicit one off again.
  const VecU32 one_up = magnitude + (113u << 23);
  const VecF subnormal = bit_cast_to<VecF>(one_up) - bit_cast_to<float>(113u << 23);
  const VecU32 finite = exponent == 0u ? bit_cast_to<VecU32>(subnormal) : normal;
  const VecU32 result = exponent == 0x0F800000u ? special : finite;
  return bit_cast_to<VecF>(result | ((wide & 0x8000u) << 16));
#endif
}

inline HalfU16 float_to_f16(VecF x) {
#if defined(__AVX512F__)
  return (HalfU16)_mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__F16C__)
  return (HalfU16)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT);
#else
  const VecU32 bits = bit_cast_to<VecU32>(x);
  const VecU32 sign = (bits >> 16) & 0x8000u;
  const VecU32 magnitude = bits & 0x7FFFFFFFu;
  const VecU32 normal = (magnitude - (112u << 23) + 0xFFFu + ((magnitude >> 13) & 1u)) >> 13;
  // Adding 0.5 aligns the mantissa so that the adder itself rounds a subnormal half to nearest even.
  const VecF aligned = bit_cast_to<VecF>(magnitude) + 0.5f;
  const VecU32 subnormal = bit_cast_to<VecU32>(aligned) - bit_cast_to<uint32_t>(0.5f);
  VecU32 result = magnitude < (113u << 23) ? subnormal : normal;
  result = magnitude >= 0x477FF000u ? VecU32{} + 0x7C00u : result;  // 65520 and above round to infinity
  result = magnitude > 0x7F800000u ? VecU32{} + 0x7E00u : result;
  return __builtin_convertvector(result | sign, HalfU16);
#endif
}

// ---- Elements in memory: load and store kLanes of them, unaligned
// ------------------------------------------

template <DType kType>
struct Storage;
template <>
struct Storage<DType::f32> {
  static constexpr DType kType = DType::f32;
  using Elem = float;
  using Scalar = float;
  using Packed = VecF;
  static VecF widen(Packed x) { return x; }
  static Packed narrow(VecF x) { return x; }
};
template <>
struct Storage<DType::bf16> {
  static constexpr DType kType = DType::bf16;
  using Elem = uint16_t;
  using Scalar = float;
  using Packed = HalfU16;
  static VecF widen(Packed x) { return bf16_to_float(x); }
  static Packed narrow(VecF x) { return float_to_bf16(x); }
};
template <>
struct Storage<DType::f16> {
  static constexpr DType kType = DType::f16;
  using Elem = uint16_t;
  using Scalar = float;
  using Packed = HalfU16;
  static VecF widen(Packed x) { return f16_to_float(x); }
  static Packed narrow(VecF x) { return float_to_f16(x); }
};
template <>
struct Storage<DType::f64> {
  static constexpr DType kType = DType::f64;
  using Elem = double;
  using Scalar = double;
  using Packed = VecD;
  static VecD widen(Packed x) { return x; }
  static Packed narrow(VecD x) { return x; }
};

// `count` elements from p (all lanes by default); the remaining lanes are 0.
template <typename S>
inline Vec<typename S::Scalar> load(const typename S::Elem* p, int count = Acc<typename S::Scalar>::kLanes) {
  typename S::Packed packed{};
  if (count == Acc<typename S::Scalar>::kLanes) {
    __builtin_memcpy(&packed, p, sizeof(packed));
  } else {
    typename S::Elem lanes[Acc<typename S::Scalar>::kLanes] = {};
    for (int i = 0; i < count; ++i) lanes[i] = p[i];
    __builtin_memcpy(&packed, lanes, sizeof(packed));
  }
  return S::widen(packed);
}

// Two vectors at once, of 2 * kLanes elements from p. Their order is the storage's own, the same in load_pair
// and store_pair: bf16 elements at even and at odd positions, which a shift and a mask tell apart, where
// widening or narrowing in order would move every element across the register.
template <typename Vector>
struct Pair {
  Vector first, second;
};

template <typename S>
inline Pair<Vec<typename S::Scalar>> load_pair(const typename S::Elem* p) {
  if constexpr (S::kType == DType::bf16) {
    VecU32 packed;
    __builtin_memcpy(&packed, p, sizeof(packed));
    return {bit_cast_to<VecF>(packed << 16), bit_cast_to<VecF>(packed & 0xFFFF0000u)};
  } else {
    return {load<S>(p), load<S>(p + Acc<typename S::Scalar>::kLanes)};
  }
}

template <typename S>
inline void store(typename S::Elem* p, Vec<typename S::Scalar> x,
                  int count = Acc<typename S::Scalar>::kLanes) {
  const typename S::Packed packed = S::narrow(x);
  if (count == Acc<typename S::Scalar>::kLanes) {
    __builtin_memcpy(p, &packed, sizeof(packed));
  } else {
    typename S::Elem lanes[Acc<typename S::Scalar>::kLanes];
    __builtin_memcpy(lanes, &packed, sizeof(packed));
    for (int i = 0; i < count; ++i) p[i] = lanes[i];
  }
}

template <typename S>
inline void store_pair(typename S::Elem* p, Pair<Vec<typename S::Scalar>> x) {
  if constexpr (S::kType == DType::bf16) {
    const VecU32 packed = (round_to_bf16(x.first) >> 16) | (round_to_bf16(x.second) & 0xFFFF0000u);
    __builtin_memcpy(p, &packed, sizeof(packed));
  } else {
    store<S>(p, x.first);
    store<S>(p + Acc<typename S::Scalar>::kLanes, x.second);
  }
}

// ---- exp and tanh
// ------------------------------------------------------------------------------------------

// exp(x) = 2^n exp(r) with n = round(x / ln 2) and |r| <= ln 2 / 2. Adding 1.5 * 2^23 leaves n in the low
// bits of the sum; ln 2 is split in two so that n * (its upper part) is exact. exp(r) = 1 + r + r^2 q(r),
// with q a weighted least-maximum fit (error 3e-9). x is clamped below at a number that maps to n = -127,
// where 2^n is built as +0: who multiplies exp(x) by x takes the clamped one, 0 * -inf being NaN.
inline VecF clamp_for_exp(VecF x) { return larger(broadcast(-88.0f), x); }

inline VecF exp_of_clamped(VecF clamped) {
  constexpr float kMagic = 12582912.0f;
  const VecF shifted = clamped * 1.44269504f + kMagic;
  const VecF n = shifted - kMagic;
  const VecF r = (clamped - n * 0.693145752f) - n * 1.42860677e-6f;
  const VecF q = (((1.381453825e-3f * r + 8.368745446e-3f) * r + 4.166838899e-2f) * r + 1.666652113e-1f) * r +
                 4.999999404e-1f;
  const VecF mantissa = (r * r) * q + r + 1.0f;
  const VecF power = bit_cast_to<VecF>((bit_cast_to<VecU32>(shifted) + 127u) << 23);
  return mantissa * power;
}

// As above with 1.5 * 2^52, and the Taylor series to r^13 (truncation 4e-18).
inline VecD clamp_for_exp(VecD x) { return larger(broadcast(-709.0), x); }

inline VecD exp_of_clamped(VecD clamped) {
  constexpr double kMagic = 6755399441055744.0;
  constexpr double kInverseFactorials[] = {1.0 / 6227020800, 1.0 / 479001600, 1.0 / 39916800, 1.0 / 3628800,
                                           1.0 / 362880,     1.0 / 40320,     1.0 / 5040,     1.0 / 720,
                                           1.0 / 120,        1.0 / 24,        1.0 / 6,        0.5};
  const VecD shifted = clamped * 1.4426950408889634 + kMagic;
  const VecD n = shifted - kMagic;
  const VecD r = (clamped - n * 6.93147180369123816490e-1) - n * 1.90821492927058770002e-10;
  VecD q = broadcast(kInverseFactorials[0]);
  for (int i = 1; i < 12; ++i) q = q * r + kInverseFactorials[i];
  const VecD mantissa = (r * r) * q + r + 1.0;
  const VecD power = bit_cast_to<VecD>((bit_cast_to<VecU64>(shifted) + 1023u) << 52);
  return mantissa * power;
}

template <typename V>
inline V vec_exp(V x) {
  return exp_of_clamped(clamp_for_exp(x));
}

inline float scalar_exp(float x) { return expf(x); }
inline double scalar_exp(double x) { return exp(x); }
inline float scalar_log(float x) { return logf(x); }
inline double scalar_log(double x) { return log(x); }
inline float scalar_expm1(float x) { return expm1f(x); }
inline double scalar_expm1(double x) { return expm1(x); }

// The same clamp for these: exp(-1000) is 0 in both types.
template <typename Scalar>
inline Scalar clamp_exponent(Scalar x) {
  return x < Scalar(-1000) ? Scalar(-1000) : x;
}

// exp(z - max) needs a finite shift: where all logits are -inf so far, 0 keeps their exp at 0, not NaN.
template <typename Scalar>
inline Scalar finite_shift(Scalar max) {
  return max == -Scalar(INFINITY) ? Scalar(0) : max;
}

// tanh(x) = x + x^3 P(x^2) near 0, where 1 - 2 / (exp(2x) + 1) would cancel.
inline VecF vec_tanh(VecF x) {
  const VecU32 sign = bit_cast_to<VecU32>(x) & 0x80000000u;
  const VecF magnitude = bit_cast_to<VecF>(bit_cast_to<VecU32>(x) & 0x7FFFFFFFu);
  const VecF clamped = magnitude > 10.0f ? broadcast(10.0f) : magnitude;  // tanh(10) rounds to 1
  const VecF s = clamped * clamped;
  const VecF p =
      (((-5.717032589e-3f * s + 2.065057494e-2f) * s - 5.374349281e-2f) * s + 1.333149076e-1f) * s -
      3.333328366e-1f;
  const VecF small = clamped + clamped * s * p;
  const VecF large = 1.0f - 2.0f / (vec_exp(clamped + clamped) + 1.0f);
  const VecF result = clamped < 0.625f ? small : large;
  return bit_cast_to<VecF>(bit_cast_to<VecU32>(result) | sign);
}

inline VecD vec_tanh(VecD x) {
  for (int i = 0; i < Acc<double>::kLanes; ++i) x[i] = tanh(x[i]);
  return x;
}

}  // namespace
}  // namespace slime_fused::cpu::SLIME_FUSED_ISA
