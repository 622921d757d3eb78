// Norms of keys, and the best of a row of their products.
#pragma once

#include "cpu/kernels/kernels.h"
#include "cpu/kernels/simd.h"

namespace madtp::cpu::MADTP_ISA {
namespace {

template <class Source>
float sum_of_squares(const Source* row, int64_t size) {
  vf sums[4];
  for (auto& sum : sums) sum = broadcast(0.0f);
  int64_t i = 0;
  for (; i + 4 * kLanes <= size; i += 4 * kLanes) {
    for (int v = 0; v < 4; ++v) {
      const vf x = load(row + i + v * kLanes);
      sums[v] = fma(x, x, sums[v]);
    }
  }
  for (; i < size; i += kLanes) {
    const vf x = load_n(row + i, smaller(kLanes, size - i));
    sums[0] = fma(x, x, sums[0]);
  }
  return sum_lanes((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

// Raises *best to the largest x[i] * scale[i] and returns the first i that attains it; -1 if none is above *best.
MADTP_INLINE int64_t best_scaled(const float* x, const float* scale, int64_t size, float* best) {
  const auto products = [&](int64_t i) {
    const int64_t left = size - i;
    return left >= kLanes ? load(x + i) * load(scale + i) : hide_from(load_n(x + i, left) * load_n(scale + i, left), left);
  };
  vf even = broadcast(*best), odd = even;  // two, so that one maximum need not wait for the other
  int64_t i = 0;
  for (; i + kLanes < size; i += 2 * kLanes) {
    even = maximum(even, products(i));
    odd = maximum(odd, products(i + kLanes));
  }
  if (i < size) even = maximum(even, products(i));
  const float top = max_lanes(maximum(even, odd));
  if (!(top > *best)) return -1;
  *best = top;
  for (i = 0; i < size; i += kLanes) {
    if (const int lane = first_equal(products(i), broadcast(top)); lane < kLanes) return i + lane;
  }
  return -1;  // not reached: one of them is the largest
}

}  // namespace
}  // namespace madtp::cpu::MADTP_ISA
