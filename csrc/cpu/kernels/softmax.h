// Softmax of blocks of logits, and the column sums of probabilities. A block's rows are complete, so the softmax needs no
// rescaling. NaN and infinite logits give what the reference gives; vectors that can meet them drop no NaN.
#pragma once

#include "cpu/kernels/kernels.h"
#include "cpu/kernels/simd.h"

namespace madtp::cpu::MADTP_ISA {
namespace {

// Softmax of a block of logits, row by row.
struct SoftmaxBlock {
  float* logits;  // [rows, stride]; becomes -inf where unseen
  float unit;     // s = unit * logits
  int64_t stride;
  int64_t rows;
  int64_t columns;
  int64_t visible;       // row r sees the first visible + r columns
  void* weights;         // [rows, stride] of the factor type: exp(s - max), zero where unseen
  float* inverse_sum;    // [rows] 1 / sum of the weights, 0 for a row that sees nothing
  float* lse;            // [rows] natural log-sum-exp
  float* best;           // [rows, stride] running maximum over heads of s - lse, or null
  float* first_weights;  // [columns] probabilities of row 0, or null
};

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLog2ERest = static_cast<float>(1.4426950408889634 - static_cast<double>(kLog2E));
constexpr double kLn2 = 0.6931471805599453;

// e^x. Rounding log2(e) alone would give all probabilities the same relative error, which sums do not average out.
MADTP_INLINE vf exponential(vf x) { return exp2(fma(x, broadcast(kLog2E), x * broadcast(kLog2ERest))); }

// The two vectors of weights at j = 0, 2 kLanes, ...
MADTP_INLINE void store_pair(float* to, vf first, vf second) {
  store(to, first);
  store(to + kLanes, second);
}

// The running maximum of s - lse that a finished row still has to enter. That needs loads and stores, exponentials need
// arithmetic: it is done along with those of the next row.
struct Pending {
  const float* row;
  float* best;  // null: nothing to do
  float unit;
  float lse;

  MADTP_INLINE void update(const Pending& pending, int64_t j) {
    const vf value = fma(load(pending.row + j), broadcast(pending.unit), broadcast(-pending.lse));
    store(pending.best + j, maximum(value, load(pending.best + j)));
  }
};

// The same at once, for a row whose log-sum-exp is no number or infinite: s - lse can be NaN, which `maximum` would drop (one
// that stands in `best` stays there).
MADTP_INLINE void update_with_nan(const Pending& pending, int64_t size) {
  for (int64_t j = 0; j < size; j += kLanes) {
    const vf value = load(pending.row + j) * broadcast(pending.unit) - broadcast(pending.lse);
    store(pending.best + j, maximum_or_nan(value, load(pending.best + j)));
  }
}

template <class Element>
MADTP_INLINE vf weight_exp2(vf x) {
  return exp2_weights(x);
}

#if defined(__AVX512BF16__)
MADTP_INLINE void store_pair(bf16* to, vf first, vf second) {
  _mm512_storeu_si512(to, (__m512i)_mm512_cvtne2ps_pbh(second, first));
}

template <>
inline __attribute__((always_inline)) vf weight_exp2<bf16>(vf x) {
  return exp2_short(x);
}
#endif

// weights[0, size) = 2^(factor row + shift); returns their sum before rounding. `size` is a multiple of kLanes.
template <bool kUpdate, class Element>
MADTP_INLINE float exponentials(const float* row, int64_t size, float factor_value, float shift_value, Element* weights,
                                const Pending& pending) {
  vf sum[2] = {broadcast(0.0f), broadcast(0.0f)};
  const vf factor = broadcast(factor_value), shift = broadcast(shift_value);
  int64_t j = 0;
  for (; j + 2 * kLanes <= size; j += 2 * kLanes) {
    const vf first = weight_exp2<Element>(fma(load(row + j), factor, shift));
    const vf second = weight_exp2<Element>(fma(load(row + j + kLanes), factor, shift));
    store_pair(weights + j, first, second);
    sum[0] = sum[0] + first;
    sum[1] = sum[1] + second;
    if constexpr (kUpdate) {
      Pending::update(pending, j);
      Pending::update(pending, j + kLanes);
    }
  }
  if (j < size) {
    const vf last = weight_exp2<Element>(fma(load(row + j), factor, shift));
    store(weights + j, last);
    sum[0] = sum[0] + last;
    if constexpr (kUpdate) Pending::update(pending, j);
  }
  return sum_lanes(sum[0] + sum[1]);
}

// log2 of a positive normal number, to about 1e-9: the series of artanh, on a mantissa in [sqrt(1/2), sqrt(2)).
MADTP_INLINE double log2_of(float x) {
  const uint32_t offset = as_bits(x) - 0x3f3504f3u;  // bits of sqrt(1/2)
  const double exponent = static_cast<int32_t>(offset) >> 23;
  const double mantissa = as_float((offset & 0x7fffffu) + 0x3f3504f3u);
  const double t = (mantissa - 1.0) / (mantissa + 1.0), square = t * t;
  const double series = 1.0 + square * (1.0 / 3 + square * (1.0 / 5 + square * (1.0 / 7 + square * (1.0 / 9))));
  return exponent + 2.8853900817779268 * t * series;  // 2 / ln 2
}

// The log-sum-exp of a row whose weights add up to NaN: infinite if a logit is and none is NaN.
MADTP_INLINE float infinite_or_nan(const float* row, float unit, int64_t columns) {
  float top = -__builtin_inff();
  for (int64_t j = 0; j < columns; ++j) {
    const float s = row[j] * unit;
    if (s != s) return s;
    top = s > top ? s : top;
  }
  return top == __builtin_inff() ? top : __builtin_nanf("");
}

template <class Element>
void softmax(const SoftmaxBlock& block) {
  const int64_t size = (block.columns + kLanes - 1) / kLanes * kLanes;
  const float factor = block.unit * kLog2E;
  Pending pending{nullptr, nullptr, 0.0f, 0.0f};
  for (int64_t r = 0; r < block.rows; ++r) {
    float* row = block.logits + r * block.stride;
    float* best = block.best == nullptr ? nullptr : block.best + r * block.stride;
    Element* weights = static_cast<Element*>(block.weights) + r * block.stride;
    const int64_t seen = larger(0, smaller(block.visible + r, block.columns));
    for (int64_t j = seen / kLanes * kLanes; j < size; j += kLanes) store(row + j, hide_from(load(row + j), larger(0, seen - j)));

    vf top = broadcast(-__builtin_inff());
    for (int64_t j = 0; j < size; j += kLanes) top = maximum(top, load(row + j));
    // Rounding the shift is harmless: the log-sum-exp takes the rounded one back. A row that sees nothing has no maximum to
    // subtract.
    const float row_top = max_lanes(top);
    const float shift = row_top == -__builtin_inff() ? 0.0f : -row_top * factor;
    const float sum = pending.best == nullptr ? exponentials<false>(row, size, factor, shift, weights, pending)
                                              : exponentials<true>(row, size, factor, shift, weights, pending);
    const bool is_number = sum == sum;
    const float lse = sum == 0.0f ? -__builtin_inff()
                      : is_number ? static_cast<float>((log2_of(sum) - shift) * kLn2)
                                  : infinite_or_nan(row, block.unit, seen);
    block.inverse_sum[r] = sum == 0.0f ? 0.0f : 1.0f / sum;
    block.lse[r] = lse;
    const bool sees_nothing = lse == -__builtin_inff();
    pending = {row, is_number && !sees_nothing ? best : nullptr, block.unit, lse};
    if (best != nullptr && !is_number) update_with_nan({row, best, block.unit, lse}, size);
    if (r == 0 && block.first_weights != nullptr) {
      const float offset = sees_nothing ? 0.0f : lse;
      for (int64_t j = 0; j < block.columns; j += kLanes) {
        const vf weight = exponential(load(row + j) * broadcast(block.unit) - broadcast(offset));
        store_n(block.first_weights + j, weight, smaller(kLanes, block.columns - j));
      }
    }
  }
  if (pending.best == nullptr) return;
  for (int64_t j = 0; j < size; j += kLanes) Pending::update(pending, j);
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
