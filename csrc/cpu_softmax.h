// Softmax of blocks of logits, and the column sums of probabilities. A block's rows are complete, so the softmax needs no
// rescaling.
#pragma once

#include "cpu_simd.h"
#include "cpu_kernels.h"

namespace madtp::cpu::MADTP_ISA {
namespace {

// Lanes of a row's last vector that a mask hides: kept where lane < n.
MADTP_INLINE vf hide_from(vf x, int64_t n) {
  alignas(64) float lanes[kLanes];
  store(lanes, x);
  for (int64_t i = n; i < kLanes; ++i) lanes[i] = -__builtin_inff();
  return load(lanes);
}

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLog2ERest = static_cast<float>(1.4426950408889634 - static_cast<double>(kLog2E));
constexpr double kLn2 = 0.6931471805599453;

// e^x. Rounding log2(e) alone would give all probabilities the same relative error, which sums do not average out.
MADTP_INLINE vf exponential(vf x) { return exp2(fma(x, broadcast(kLog2E), x * broadcast(kLog2ERest))); }

// weights[0, size) = 2^(row log2(e) + shift); returns their sum before rounding. `size` is a multiple of kLanes.
MADTP_INLINE float exponentials(const float* row, int64_t size, float shift_value, float* weights) {
  vf sum[2] = {broadcast(0.0f), broadcast(0.0f)};
  const vf factor = broadcast(kLog2E), shift = broadcast(shift_value);
  int64_t j = 0;
  for (; j + 2 * kLanes <= size; j += 2 * kLanes) {
    for (int u = 0; u < 2; ++u) {
      const vf w = exp2(fma(load(row + j + u * kLanes), factor, shift));
      store(weights + j + u * kLanes, w);
      sum[u] = sum[u] + w;
    }
  }
  if (j < size) {
    const vf w = exp2(fma(load(row + j), factor, shift));
    store(weights + j, w);
    sum[0] = sum[0] + w;
  }
  return sum_lanes(sum[0] + sum[1]);
}

#if defined(__AVX512BF16__)
MADTP_INLINE float exponentials(const float* row, int64_t size, float shift_value, bf16* weights) {
  vf sum[2] = {broadcast(0.0f), broadcast(0.0f)};
  const vf factor = broadcast(kLog2E), shift = broadcast(shift_value);
  int64_t j = 0;
  for (; j + 2 * kLanes <= size; j += 2 * kLanes) {
    const vf w0 = exp2_short(fma(load(row + j), factor, shift)), w1 = exp2_short(fma(load(row + j + kLanes), factor, shift));
    _mm512_storeu_si512(weights + j, (__m512i)_mm512_cvtne2ps_pbh(w1, w0));
    sum[0] = sum[0] + w0;
    sum[1] = sum[1] + w1;
  }
  if (j < size) {
    const vf w = exp2_short(fma(load(row + j), factor, shift));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(weights + j), (__m256i)_mm512_cvtneps_pbh(w));
    sum[0] = sum[0] + w;
  }
  return sum_lanes(sum[0] + sum[1]);
}
#endif

// log2 of a positive normal number, to about 1e-9: the series of artanh, on a mantissa in [sqrt(1/2), sqrt(2)).
MADTP_INLINE double log2_of(float x) {
  const uint32_t offset = as_bits(x) - 0x3f3504f3u;  // bits of sqrt(1/2)
  const double exponent = static_cast<int32_t>(offset) >> 23;
  const double mantissa = as_float((offset & 0x7fffffu) + 0x3f3504f3u);
  const double t = (mantissa - 1.0) / (mantissa + 1.0), square = t * t;
  const double series = 1.0 + square * (1.0 / 3 + square * (1.0 / 5 + square * (1.0 / 7 + square * (1.0 / 9))));
  return exponent + 2.8853900817779268 * t * series;  // 2 / ln 2
}

template <class Element>
void softmax(const SoftmaxBlock& block) {
  const int64_t padded = (block.columns + kLanes - 1) / kLanes * kLanes;
  for (int64_t r = 0; r < block.rows; ++r) {
    const float* row = block.logits + r * block.stride;
    Element* weights = static_cast<Element*>(block.weights) + r * block.stride;
    const int64_t seen = larger(0, smaller(block.columns, block.visible + r));
    const int64_t size = (seen + kLanes - 1) / kLanes * kLanes;
    if (seen < block.columns && seen < size) {
      float* last = const_cast<float*>(row) + size - kLanes;
      store(last, hide_from(load(last), kLanes - (size - seen)));
    }

    vf top = broadcast(-__builtin_inff());
    for (int64_t j = 0; j < size; j += kLanes) top = maximum(top, load(row + j));
    const float row_top = max_lanes(top);
    const bool is_first = r == 0 && block.first_weights != nullptr;
    if (row_top == -__builtin_inff()) {
      std::memset(weights, 0, static_cast<size_t>(padded) * sizeof(Element));
      if (is_first) std::memset(block.first_weights, 0, static_cast<size_t>(block.columns) * sizeof(float));
      block.inverse_sum[r] = 0.0f;
      block.lse[r] = -__builtin_inff();
      continue;
    }

    // Rounding the shift is harmless: the log-sum-exp takes the rounded one back.
    const float shift = -row_top * kLog2E;
    const float sum = exponentials(row, size, shift, weights);
    std::memset(weights + size, 0, static_cast<size_t>(padded - size) * sizeof(Element));
    const float lse = static_cast<float>((log2_of(sum) - shift) * kLn2);
    block.inverse_sum[r] = 1.0f / sum;
    block.lse[r] = lse;

    const vf offset = broadcast(lse);
    if (is_first) {
      for (int64_t j = 0; j < block.columns; j += kLanes) {
        const vf p = j < size ? exponential(load(row + j) - offset) : broadcast(0.0f);
        store_n(block.first_weights + j, p, smaller(kLanes, block.columns - j));
      }
    } else if (block.best != nullptr) {
      float* best = block.best + r * block.stride;
      int64_t j = 0;
      for (; j + 2 * kLanes <= size; j += 2 * kLanes) {
        const vf a = maximum(load(best + j), load(row + j) - offset);
        const vf b = maximum(load(best + j + kLanes), load(row + j + kLanes) - offset);
        store(best + j, a);
        store(best + j + kLanes, b);
      }
      if (j < size) store(best + j, maximum(load(best + j), load(row + j) - offset));
    }
  }
}

MADTP_INLINE void exp_column_sums(const float* x, int64_t stride, int64_t rows, int64_t columns, int64_t visible,
                                   float* sums) {
  for (int64_t j = 0; j < columns; j += kLanes) {
    vf sum = broadcast(0.0f);
    for (int64_t r = larger(0, j + 1 - visible); r < rows; ++r) {
      vf value = load(x + r * stride + j);
      if (visible + r < j + kLanes) value = hide_from(value, visible + r - j);
      sum = sum + exponential(value);
    }
    const int64_t n = smaller(kLanes, columns - j);
    store_n(sums + j, load_n(sums + j, n) + sum, n);
  }
}

template <class Source>
float norm_weighted_mean(const Source* out, int64_t head_stride, int64_t heads, int64_t head_dim, const float* p,
                         int64_t p_stride) {
  float weighted = 0.0f, total = 0.0f;
  for (int64_t h = 0; h < heads; ++h) {
    const Source* row = out + h * head_stride;
    vf squares = broadcast(0.0f);
    int64_t i = 0;
    for (; i + kLanes <= head_dim; i += kLanes) {
      const vf x = load(row + i);
      squares = fma(x, x, squares);
    }
    if (i < head_dim) {
      const vf x = load_n(row + i, head_dim - i);
      squares = fma(x, x, squares);
    }
    const float norm = __builtin_sqrtf(sum_lanes(squares));
    weighted += norm * p[h * p_stride];
    total += norm;
  }
  return weighted / (total + 1e-8f);
}

}  // namespace
}  // namespace madtp::cpu::MADTP_ISA
