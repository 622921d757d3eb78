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
  const int64_t full = size / kLanes * kLanes;
  vf tops = broadcast(*best);
  for (int64_t i = 0; i < full; i += kLanes) tops = maximum(tops, load(x + i) * load(scale + i));
  float top = max_lanes(tops);
  for (int64_t i = full; i < size; ++i) top = top > x[i] * scale[i] ? top : x[i] * scale[i];
  if (!(top > *best)) return -1;
  *best = top;
  int64_t found = 0;
  while (x[found] * scale[found] != top) ++found;
  return found;
}

}  // namespace
}  // namespace madtp::cpu::MADTP_ISA
