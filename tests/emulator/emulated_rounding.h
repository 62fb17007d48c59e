// 16-bit formats and TF32 in software.
#pragma once

#include <cstdint>

#include "cuda_words.h"

namespace engm::cuda {

struct Half {
  uint16_t bits;
};
struct Bf16 {
  uint16_t bits;
};

inline float to_float(float v) { return v; }
inline double to_float(double v) { return v; }
inline float to_float(Bf16 v) { return __uint_as_float(uint32_t(v.bits) << 16); }
inline float to_float(Half v) {
  const uint32_t sign = uint32_t(v.bits & 0x8000) << 16, magnitude = uint32_t(v.bits & 0x7fff) << 13;
  if (magnitude >= 31u << 23) return __uint_as_float(sign | 0x7f800000u | magnitude);  // infinite or NaN
  return __uint_as_float(sign | __float_as_uint(__uint_as_float(magnitude) * 0x1p112f));  // exact, subnormal or not
}

inline void from_float(float v, float& out) { out = v; }
inline void from_float(double v, double& out) { out = v; }

// To nearest even; NaN becomes the card's one NaN.
inline void from_float(float v, Bf16& out) {
  const uint32_t bits = __float_as_uint(v);
  out.bits = v != v ? 0x7fff : uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline void from_float(float v, Half& out) {
  const uint32_t bits = __float_as_uint(v), magnitude = bits & 0x7fffffffu, sign = (bits >> 16) & 0x8000;
  uint32_t rounded;
  if (v != v) {
    out.bits = 0x7fff;
    return;
  }
  if (magnitude >= 0x47800000u) {  // 2^16 and above, infinity
    rounded = 0x7c00;
  } else if (magnitude >= 0x38800000u) {  // normal: a carry runs into the exponent, up to infinity
    rounded = (magnitude - (112u << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  } else if (magnitude < 0x33000000u) {  // below half the least subnormal
    rounded = 0;
  } else {  // subnormal, in units of 2^-24: the significand shifted right by 14 to 24
    const uint32_t significand = (magnitude & 0x7fffffu) | 0x800000u;
    const int shift = 126 - int(magnitude >> 23);
    const uint32_t whole = significand >> shift, rest = significand & ((1u << shift) - 1), half = 1u << (shift - 1);
    rounded = whole + (rest > half || (rest == half && (whole & 1)));
  }
  out.bits = uint16_t(sign | rounded);
}

// To nearest, ties away from zero; 10 explicit bits of significand stay.
inline uint32_t to_tf32(float v) {
  const uint32_t bits = __float_as_uint(v);
  const bool finite = (bits & 0x7f800000u) != 0x7f800000u;
  if (!finite) return v != v ? 0x7fffffffu : bits;
  return (bits + 0x1000u) & 0xffffe000u;
}

}  // namespace engm::cuda
