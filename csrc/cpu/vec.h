// Vectors of kLanes elements over the compiler's vector extensions. Included only by *_kernels.cpp,
// which is compiled once per instruction set with FUSED_RES_ISA naming it: everything here lives in
// that namespace, and nothing of the standard library is instantiated, so no AVX code can be linked
// in place of a baseline function.
#pragma once
#include <stdint.h>
#include <string.h>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "../elements.h"

namespace fused_res::FUSED_RES_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#else
constexpr int kLanes = 8;  // plain code: two SSE2 or NEON registers
#endif

template <class A>
struct VecOf {
  typedef A type __attribute__((vector_size(kLanes * sizeof(A))));
};
template <class A>
using Vec = typename VecOf<A>::type;
using Int = Vec<int32_t>;
using UInt = Vec<uint32_t>;
using UShort = Vec<uint16_t>;

// Lane i of an integer vector mask is all ones or all zeros, as vector comparisons give it. AVX-512
// keeps masks in registers of their own.
template <class A>
struct MaskOf {
  using type = decltype(Vec<A>{} <= Vec<A>{});
};
#if defined(__AVX512F__)
template <>
struct MaskOf<float> {
  using type = __mmask16;
};
#endif
template <class A>
using Mask = typename MaskOf<A>::type;

template <class A>
inline Vec<A> broadcast(A value) {
  return Vec<A>{} + value;
}

// the value at p in every lane
inline Vec<float> broadcast_from(const float* p) {
#if defined(__AVX512F__)
  return (Vec<float>)_mm512_set1_ps(*p);
#elif defined(__AVX2__)
  return (Vec<float>)_mm256_broadcast_ss(p);
#else
  return broadcast(*p);
#endif
}

template <class A>
inline Vec<A> median(Vec<A> a, Vec<A> b, Vec<A> c) {
  const Vec<A> low = a < b ? a : b, high = a < b ? b : a, rest = high < c ? high : c;
  return low < rest ? rest : low;
}

template <class To, class From>
inline To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

// --- 16-bit elements

inline Vec<float> widen(UShort bits, bf16) {
  return bit_cast<Vec<float>>(__builtin_convertvector(bits, UInt) << 16);
}

inline UShort narrow(Vec<float> v, bf16) {  // to nearest, ties to even; NaN stays NaN
  const UInt bits = bit_cast<UInt>(v);
  const UInt rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const UInt is_nan = bit_cast<UInt>(v != v);
  return __builtin_convertvector((is_nan & 0x7fc0) | (~is_nan & rounded), UShort);
}

inline Vec<float> widen(UShort bits, fp16) {
#if defined(__AVX512F__)
  return (Vec<float>)_mm512_cvtph_ps((__m256i)bits);
#elif defined(__AVX2__)
  return (Vec<float>)_mm256_cvtph_ps((__m128i)bits);
#else
  Vec<float> v;
  for (int i = 0; i < kLanes; i++) v[i] = half_to_float(bits[i]);
  return v;
#endif
}

inline UShort narrow(Vec<float> v, fp16) {
#if defined(__AVX512F__)
  return (UShort)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__AVX2__)
  return (UShort)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  UShort bits;
  for (int i = 0; i < kLanes; i++) bits[i] = float_to_half(v[i]);
  return bits;
#endif
}

// --- loads and stores: a whole vector, or its first n lanes (the others read as zero)

struct Full {};
struct Part {
  int n;
};

template <class R, class E>
inline R load_raw(const E* p, Full) {
  R r;
  memcpy(&r, p, sizeof r);
  return r;
}

template <class R, class E>
inline R load_raw(const E* p, Part part) {
#if defined(__AVX512F__)
  if constexpr (sizeof(E) == 4) return (R)_mm512_maskz_loadu_ps((__mmask16)((1u << part.n) - 1), p);
  if constexpr (sizeof(E) == 2)
    return (R)_mm256_maskz_loadu_epi16((__mmask16)((1u << part.n) - 1), p);
#endif
  R r{};
  for (int i = 0; i < part.n; i++) memcpy((char*)&r + i * sizeof(E), p + i, sizeof(E));
  return r;
}

template <class R, class E>
inline void store_raw(R r, E* p, Full) {
  memcpy(p, &r, sizeof r);
}

template <class R, class E>
inline void store_raw(R r, E* p, Part part) {
#if defined(__AVX512F__)
  if constexpr (sizeof(E) == 4)
    return _mm512_mask_storeu_ps(p, (__mmask16)((1u << part.n) - 1), (__m512)r);
  if constexpr (sizeof(E) == 2)
    return _mm256_mask_storeu_epi16(p, (__mmask16)((1u << part.n) - 1), (__m256i)r);
#endif
  for (int i = 0; i < part.n; i++) memcpy(p + i, (char*)&r + i * sizeof(E), sizeof(E));
}

template <class T, class Lanes>
inline Vec<AccOf<T>> load(const T* p, Lanes lanes) {
  if constexpr (sizeof(T) == 2)
    return widen(load_raw<UShort>(p, lanes), T{});
  else
    return load_raw<Vec<T>>(p, lanes);
}

template <class T, class Lanes>
inline void store(Vec<AccOf<T>> v, T* p, Lanes lanes) {
  if constexpr (sizeof(T) == 2)
    store_raw(narrow(v, T{}), p, lanes);
  else
    store_raw(v, p, lanes);
}

// Stores past the caches: no line is read only to be overwritten. For whole vectors of float at
// multiples of a vector; `fence` comes between them and whoever reads what they wrote.
template <class T>
constexpr bool can_stream = false;
#if defined(__AVX2__)
template <>
constexpr bool can_stream<float> = true;
#endif

inline void stream(Vec<float> v, float* p) {
#if defined(__AVX512F__)
  _mm512_stream_ps(p, (__m512)v);
#elif defined(__AVX2__)
  _mm256_stream_ps(p, (__m256)v);
#endif
}

inline void fence() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}

template <class T, class Lanes>
inline void store(Vec<AccOf<T>> v, T* p, Lanes lanes, bool streamed) {
  if constexpr (can_stream<T> && sizeof(lanes) == sizeof(Full))
    if (streamed) return stream(v, p);
  store(v, p, lanes);
}

// --- masks

template <class A>
inline Vec<A> keep(Mask<A> mask, Vec<A> v) {  // v where the mask is set, else +0
#if defined(__AVX512F__)
  if constexpr (sizeof(A) == 4) return (Vec<A>)_mm512_maskz_mov_ps(mask, (__m512)v);
#endif
  if constexpr (sizeof(Mask<A>) == sizeof(v)) return bit_cast<Vec<A>>(mask & bit_cast<Mask<A>>(v));
}

template <class A>
inline Mask<A> not_below_zero(Vec<A> v) {  // !(v <= 0): NaN passes, as torch.relu lets it
#if defined(__AVX512F__)
  if constexpr (sizeof(A) == 4)
    return _mm512_cmp_ps_mask((__m512)v, _mm512_setzero_ps(), _CMP_NLE_UQ);
#elif defined(__AVX2__)
  if constexpr (sizeof(A) == 4)
    return (Mask<A>)_mm256_cmp_ps((__m256)v, _mm256_setzero_ps(), _CMP_NLE_UQ);
#endif
  if constexpr (sizeof(Mask<A>) == sizeof(v)) return ~(v <= Vec<A>{});
}

template <class A>
inline unsigned to_bits(Mask<A> mask) {
  if constexpr (sizeof(mask) == 2) {
    return mask;
  } else {
#if defined(__AVX2__) && !defined(__AVX512F__)
    if constexpr (sizeof(A) == 4) return _mm256_movemask_ps((__m256)mask);
#endif
    unsigned bits = 0;
    for (int i = 0; i < kLanes; i++) bits |= (unsigned)(mask[i] & 1) << i;
    return bits;
  }
}

template <class A>
inline Mask<A> from_bits(unsigned bits) {
  if constexpr (sizeof(Mask<A>) == 2) {
    return (Mask<A>)bits;
  } else {
    Mask<A> bit;
    for (int i = 0; i < kLanes; i++) bit[i] = 1 << i;
    return (bit & (Mask<A>{} + (int)bits)) != 0;
  }
}

template <class A>
inline Vec<A> first(Vec<A> v, Full) {
  return v;
}
template <class A>
inline Vec<A> first(Vec<A> v, Part part) {  // its first n lanes, the others zero
  return keep<A>(from_bits<A>((1u << part.n) - 1), v);
}

inline void store_bits(unsigned bits, uint8_t* p, Full) { memcpy(p, &bits, kLanes / 8); }
inline void store_bits(unsigned bits, uint8_t* p, Part part) {  // bits past the end are zero
  bits &= (1u << part.n) - 1;
  for (int i = 0; i < part.n; i += 8) *p++ = (uint8_t)(bits >> i);
}

inline unsigned load_bits(const uint8_t* p, Full) {
  unsigned bits = 0;
  memcpy(&bits, p, kLanes / 8);
  return bits;
}
inline unsigned load_bits(const uint8_t* p, Part part) {
  unsigned bits = 0;
  for (int i = 0; i < part.n; i += 8) bits |= (unsigned)*p++ << i;
  return bits;
}

// Sums are kept in double, half a vector of floats at a time: that fills one register.
constexpr int kHalf = kLanes / 2;
typedef double HalfDoubles __attribute__((vector_size(kHalf * sizeof(double))));

template <class A>
struct Halves {
  typedef A type __attribute__((vector_size(kHalf * sizeof(A))));
  type half[2];
};

template <class A>
inline HalfDoubles half_of(Vec<A> v, int half) {
  return __builtin_convertvector(bit_cast<Halves<A>>(v).half[half], HalfDoubles);
}

template <class A>
inline HalfDoubles doubles(const A* p) {
  return __builtin_convertvector(load_raw<typename Halves<A>::type>(p, Full{}), HalfDoubles);
}

template <class A>
inline Vec<A> load_doubles(const double* p) {  // rounded to A
  Halves<A> halves;
  for (int h = 0; h < 2; h++)
    halves.half[h] = __builtin_convertvector(load_raw<HalfDoubles>(p + h * kHalf, Full{}),
                                             typename Halves<A>::type);
  return bit_cast<Vec<A>>(halves);
}

template <int kCount>
struct Doubles {
  typedef double type __attribute__((vector_size(8 * kCount)));
};

template <int kCount>
inline double sum_halves(typename Doubles<kCount>::type v) {
  if constexpr (kCount == 2) {
    return v[0] + v[1];
  } else {
    struct Halves {
      typename Doubles<kCount / 2>::type low, high;
    };
    const Halves halves = bit_cast<Halves>(v);
    return sum_halves<kCount / 2>(halves.low + halves.high);
  }
}

template <class A>
inline double sum(Vec<A> v) {  // in double, always in this order
  return sum_halves<kHalf>(half_of<A>(v, 0) + half_of<A>(v, 1));
}

// calls step(i, Full) for every whole vector of a run of `length` elements, then step(i, Part)
template <class Step>
inline __attribute__((always_inline)) void over_run(int64_t length, const Step& step) {
  int64_t i = 0;
  for (; i + kLanes <= length; i += kLanes) step(i, Full{});
  if (i < length) step(i, Part{(int)(length - i)});
}

}  // namespace fused_res::FUSED_RES_ISA
