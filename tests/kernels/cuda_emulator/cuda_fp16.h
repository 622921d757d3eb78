// float16 for the emulator.
#pragma once

#include <c10/util/Half.h>

struct __half {
  uint16_t bits;
  explicit operator float() const { return c10::detail::fp16_ieee_to_fp32_value(bits); }
};

inline float __half2float(__half x) { return static_cast<float>(x); }
inline __half __float2half_rn(float x) { return {c10::detail::fp16_ieee_from_fp32_value(x)}; }
