// Token scores and rows of compaction: the elementwise work on blocks of tokens.
#pragma once

#include "cpu/kernels/kernels.h"
#include "cpu/kernels/simd.h"

namespace madtp::cpu::MADTP_ISA {
namespace {

// Best alignment of each token, and one step of the online softmax over tokens of every dictionary entry. A NaN passes into
// `best`; in the maximum of an entry it may be dropped, since it stays in the sums.
MADTP_INLINE void score(const ScoreBlock& block) {
  const int64_t stride = block.stride, full = block.columns / kLanes * kLanes;
  const vf lowest = broadcast(-__builtin_inff());
  for (int64_t r = 0; r < block.rows; ++r) {
    const float* row = block.alignment + r * stride;
    vf best = lowest;
    for (int64_t m = 0; m < full; m += kLanes) best = maximum_or_nan(load(row + m), best);
    if (full < block.columns) best = maximum_or_nan(hide_from(load(row + full), block.columns - full), best);
    block.best[r] = max_lanes_or_nan(best);
  }

  const vf factor = broadcast(block.factor);
  for (int64_t m = 0; m < block.columns; m += kLanes) {
    float* state = block.state + m;
    const vf old_top = load(state);
    vf top = old_top;
    for (int64_t r = 0; r < block.rows; ++r) top = maximum(top, load(block.alignment + r * stride + m));
    // An entry that has met nothing but -inf has sums of 0 and no maximum to subtract.
    const vf base = zero_if_lowest(top);
    const vf rescale = exp2((old_top - base) * factor);  // 0 in the first block, where old_top is -inf
    vf sums[4];
    for (int k = 0; k < 4; ++k) sums[k] = load(state + (k + 1) * stride) * rescale;
    for (int64_t r = 0; r < block.rows; ++r) {
      const vf w = exp2((load(block.alignment + r * stride + m) - base) * factor);
      sums[0] = sums[0] + w;
      sums[1] = fma(w, broadcast(block.received[r]), sums[1]);
      sums[2] = fma(w, broadcast(block.best[r]), sums[2]);
      sums[3] = fma(w, broadcast(block.cls[r]), sums[3]);
    }
    store(state, top);
    for (int k = 0; k < 4; ++k) store(state + (k + 1) * stride, sums[k]);
  }
}

template <class Source>
void accumulate_row(const Source* row, float weight, float* sums, int64_t size) {
  const vf w = broadcast(weight);
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) store(sums + i, fma(load(row + i), w, load(sums + i)));
  if (i < size) store_n(sums + i, fma(load_n(row + i, size - i), w, load_n(sums + i, size - i)), size - i);
}

template <class Out>
void store_scaled(const float* sums, float scale, Out* row, int64_t size) {
  const vf s = broadcast(scale);
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) store(row + i, load(sums + i) * s);
  if (i < size) store_n(row + i, load_n(sums + i, size - i) * s, size - i);
}

// Statistics in two passes over the row, which is in the first-level cache: no cancellation.
template <class Source>
void layer_norm(const Source* row, const float* weight, const float* bias, float eps, Source* out, int64_t size) {
  const int64_t full = size / kLanes * kLanes, rest = size - full;
  vf sum = broadcast(0.0f);
  for (int64_t i = 0; i < full; i += kLanes) sum = sum + load(row + i);
  if (rest > 0) sum = sum + load_n(row + full, rest);
  const float mean_value = sum_lanes(sum) / static_cast<float>(size);
  const vf mean = broadcast(mean_value);

  vf squares = broadcast(0.0f);
  for (int64_t i = 0; i < full; i += kLanes) {
    const vf x = load(row + i) - mean;
    squares = fma(x, x, squares);
  }
  float variance = sum_lanes(squares);
  if (rest > 0) {
    alignas(64) float tail[kLanes];
    store(tail, load_n(row + full, rest) - mean);
    for (int64_t i = 0; i < rest; ++i) variance += tail[i] * tail[i];
  }
  const vf scale = broadcast(1.0f / __builtin_sqrtf(variance / static_cast<float>(size) + eps));

  for (int64_t i = 0; i < size; i += kLanes) {
    const int64_t n = smaller(kLanes, size - i);
    if (n == kLanes) {
      const vf shift = bias == nullptr ? broadcast(0.0f) : load(bias + i);
      store(out + i, fma((load(row + i) - mean) * scale, load(weight + i), shift));
    } else {
      const vf shift = bias == nullptr ? broadcast(0.0f) : load_n(bias + i, n);
      store_n(out + i, fma((load_n(row + i, n) - mean) * scale, load_n(weight + i, n), shift), n);
    }
  }
}

}  // namespace
}  // namespace madtp::cpu::MADTP_ISA
