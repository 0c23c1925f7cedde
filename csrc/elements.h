// Element types as the kernels see them, and the type each is computed in.
#pragma once
#include <stdint.h>
#include <string.h>

namespace fused_res {

struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};

template <class T>
struct Acc {
  using type = float;
};
template <>
struct Acc<double> {
  using type = double;
};
template <class T>
using AccOf = typename Acc<T>::type;

static inline float half_to_float(uint16_t h) {
  const uint32_t sign = (uint32_t)(h & 0x8000) << 16, exponent = (h >> 10) & 31,
                 fraction = h & 1023;
  uint32_t bits;
  if (exponent == 31)
    bits = sign | 0x7f800000u | fraction << 13;
  else if (exponent != 0)
    bits = sign | (exponent + 112) << 23 | fraction << 13;
  else {  // zero and subnormals: fraction * 2^-24, exact in float
    const float value = (float)fraction * 5.9604644775390625e-08f;
    memcpy(&bits, &value, 4);
    bits |= sign;
  }
  float f;
  memcpy(&f, &bits, 4);
  return f;
}

static inline uint16_t float_to_half(float f) {  // to nearest, ties to even
  uint32_t bits;
  memcpy(&bits, &f, 4);
  const uint16_t sign = (bits >> 16) & 0x8000;
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return sign | 0x7e00;   // NaN
  if (magnitude >= 0x477ff000u) return sign | 0x7c00;  // rounds to 2^16 or more: infinity
  if (magnitude < 0x38800000u) {                       // subnormal in half: let the adder round
    const uint32_t magic_bits = 0x3f000000u;           // 0.5, whose last place is 2^-24
    float magic, value;
    memcpy(&magic, &magic_bits, 4);
    memcpy(&value, &magnitude, 4);
    value += magic;
    memcpy(&bits, &value, 4);
    return sign | (uint16_t)(bits - magic_bits);
  }
  const uint32_t rounded = magnitude + 0xfff + ((magnitude >> 13) & 1);
  return sign | (uint16_t)((rounded - 0x38000000u) >> 13);
}

static inline float load_element(const bf16* p) {
  const uint32_t bits = (uint32_t)p->bits << 16;
  float f;
  memcpy(&f, &bits, 4);
  return f;
}
static inline float load_element(const fp16* p) { return half_to_float(p->bits); }
static inline float load_element(const float* p) { return *p; }
static inline double load_element(const double* p) { return *p; }

static inline void store_element(double v, bf16* p) {
  const float f = (float)v;
  uint32_t bits;
  memcpy(&bits, &f, 4);
  p->bits = f != f ? 0x7fc0 : (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
static inline void store_element(double v, fp16* p) { p->bits = float_to_half((float)v); }
static inline void store_element(double v, float* p) { *p = (float)v; }
static inline void store_element(double v, double* p) { *p = v; }

}  // namespace fused_res
