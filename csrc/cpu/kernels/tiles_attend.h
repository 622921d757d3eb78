// A block of attention by AMX tiles.
//
// A strip is a tile of 16 queries with all keys of a sample: its logits, tile after tile, stay in the second-level cache, and
// every pass over them reads memory in order. Of all rows of a strip at once:
//
//   top = max_j s_j     w_j = 2^((s_j - top) log2(e)), in bfloat16     lse = top + ln sum_j w_j     out = sum_j w_j v_j / sum_j w_j
//
// The running maximum over heads of s - lse is read and written for a few heads together: memory is what bounds it.
#pragma once

#include "cpu/kernels/attend.h"
#include "cpu/kernels/tiles.h"

namespace madtp::cpu::MADTP_ISA {
namespace {

constexpr int64_t kMostHeadsTogether = 2;
// The logits of these heads and their running maximum, beside a head's keys and values.
constexpr int64_t kStripBytes = 512 * 1024;

// Tiles of a strip. Weights are tiles of 32 keys: where the number of tiles of 16 is odd, one half of the last is zero.
struct StripSize {
  int64_t logits, weights;
  MADTP_INLINE StripSize of(int64_t keys) { return {tiles_of(keys, kTile), tiles_of(keys, kTileDepth)}; }
};

MADTP_INLINE int64_t strip_floats(int64_t keys) { return tiles_of(keys, kTile) * kTileSums; }

MADTP_INLINE int64_t heads_together(int64_t rows, int64_t length) {
  const int64_t bytes = larger(1, tiles_of(rows, kTile) * strip_floats(length) * 4);
  return larger(1, smaller(kMostHeadsTogether, kStripBytes / bytes - 1));
}

// Where the parts of a block's working memory start, in bytes.
struct TileScratch {
  int64_t queries, sums, logits, weights, total;

  MADTP_INLINE TileScratch of(int64_t rows, int64_t length, int64_t head_dim) {
    const int64_t strips = tiles_of(rows, kTile);
    TileScratch at{0, 0, 0, 0, 0};
    at.sums = at.queries + strips * kTile * round_up(head_dim, kTileDepth) * 2;
    at.logits = at.sums + strips * kTile * round_up(head_dim, kTile) * 4;
    at.weights = at.logits + heads_together(rows, length) * strips * strip_floats(length) * 4;
    at.total = at.weights + strips * tiles_of(length, kTileDepth) * kTileFactors * 2;
    return at;
  }
};

// Combines the lanes of each of 16 vectors: lane r of the result is that of vector r.
template <class Combine>
MADTP_INLINE vf combine_lanes(const vf (&v)[16], Combine&& combine) {
  vf pairs[8], fours[4];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    pairs[i] = combine(_mm512_unpacklo_ps(v[2 * i], v[2 * i + 1]), _mm512_unpackhi_ps(v[2 * i], v[2 * i + 1]));
  }
  const auto halves = [&](vf a, vf b) {
    const __m512d x = _mm512_castps_pd(a), y = _mm512_castps_pd(b);
    return combine(_mm512_castpd_ps(_mm512_unpacklo_pd(x, y)), _mm512_castpd_ps(_mm512_unpackhi_pd(x, y)));
  };
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) fours[i] = halves(pairs[2 * i], pairs[2 * i + 1]);  // 128-bit parts: four rows each
  const auto parts = [&](vf a, vf b) {
    return combine(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
  };
  return parts(parts(fours[0], fours[1]), parts(fours[2], fours[3]));
}

// log2 of eight positive normal numbers, to about 1e-9: see log2_of.
MADTP_INLINE __m512d log2_lanes(__m512d x) {
  const __m512d one = _mm512_set1_pd(1.0);
  __m512d mantissa = _mm512_getmant_pd(x, _MM_MANT_NORM_1_2, _MM_MANT_SIGN_src), exponent = _mm512_getexp_pd(x);
  const __mmask8 high = _mm512_cmp_pd_mask(mantissa, _mm512_set1_pd(1.4142135623730951), _CMP_GT_OQ);
  mantissa = _mm512_mask_mul_pd(mantissa, high, mantissa, _mm512_set1_pd(0.5));
  exponent = _mm512_mask_add_pd(exponent, high, exponent, one);
  const __m512d t = _mm512_div_pd(_mm512_sub_pd(mantissa, one), _mm512_add_pd(mantissa, one)), square = _mm512_mul_pd(t, t);
  __m512d series = _mm512_set1_pd(1.0 / 9);
  constexpr double kTerms[] = {1.0 / 7, 1.0 / 5, 1.0 / 3, 1.0};
  for (const double term : kTerms) series = _mm512_fmadd_pd(series, square, _mm512_set1_pd(term));
  return _mm512_fmadd_pd(_mm512_mul_pd(t, series), _mm512_set1_pd(2.8853900817779268), exponent);
}

// The rows of a strip, one per lane. `unit` turns what stands in the logits into s: the scale, or 1 where a pass has left s.
struct StripSoftmax {
  float* logits;
  bf16* weights;
  int64_t columns;  // keys
  float unit;
  vf inverse_sum;  // 1 / sum of the weights, 0 for a row that sees nothing
  vf lse;

  // Lanes where lse is NaN or +inf: there s - lse can be NaN.
  bool is_special() const {
    return _mm512_fpclass_ps_mask(lse, 0x01 | 0x80 | 0x08) != 0;  // quiet and signalling NaN, +inf
  }
};

// Hides the keys from `seen` on in one row of a strip.
MADTP_INLINE void hide_keys(float* row, int64_t seen, int64_t columns) {
  for (int64_t j = seen / kTile * kTile; j < columns; j += kTile) {
    float* const at = row + j * kTile;
    store(at, hide_from(load(at), larger(0, seen - j)));
  }
}

// s = scale * logits + bias, in place.
MADTP_INLINE void add_bias(float* logits, int64_t columns, float scale, const float* bias) {
  const vf factor = broadcast(scale);
  for (int64_t j = 0; j < columns; j += kTile) {
    const vf shift = load(bias + j);
#pragma GCC unroll 16
    for (int r = 0; r < kTile; ++r) {
      float* const at = logits + j * kTile + r * kTile;
      store(at, fma(load(at), factor, shift));
    }
  }
}

// The largest entry of each row; a NaN may be dropped.
MADTP_INLINE vf row_maxima(const float* logits, int64_t columns) {
  vf top[kTile];
#pragma GCC unroll 16
  for (int r = 0; r < kTile; ++r) top[r] = broadcast(-__builtin_inff());
  for (int64_t j = 0; j < columns; j += kTile) {
#pragma GCC unroll 16
    for (int r = 0; r < kTile; ++r) top[r] = maximum(top[r], load(logits + j * kTile + r * kTile));
  }
  return combine_lanes(top, [](vf a, vf b) { return maximum(a, b); });
}

// weights = 2^(factor * logits + shift) with a shift per row; returns the sums of each row before rounding.
MADTP_INLINE vf weights_of(const float* logits, int64_t columns, float factor_value, vf shift_lanes, bf16* weights) {
  alignas(64) float shift[kTile];
  store(shift, shift_lanes);
  const vf factor = broadcast(factor_value);
  vf sum[kTile];
#pragma GCC unroll 16
  for (int r = 0; r < kTile; ++r) sum[r] = broadcast(0.0f);
  int64_t j = 0;
  for (; j + kTile < columns; j += 2 * kTile) {
#pragma GCC unroll 16
    for (int r = 0; r < kTile; ++r) {
      const float* const at = logits + j * kTile + r * kTile;
      const vf first = weight_exp2<bf16>(fma(load(at), factor, broadcast(shift[r])));
      const vf second = weight_exp2<bf16>(fma(load(at + kTileSums), factor, broadcast(shift[r])));
      store_pair(weights + j * kTile + r * kTileDepth, first, second);
      sum[r] = (sum[r] + first) + second;
    }
  }
  if (j < columns) {
#pragma GCC unroll 16
    for (int r = 0; r < kTile; ++r) {
      const vf first = weight_exp2<bf16>(fma(load(logits + j * kTile + r * kTile), factor, broadcast(shift[r])));
      store_pair(weights + j * kTile + r * kTileDepth, first, broadcast(0.0f));
      sum[r] = sum[r] + first;
    }
  }
  return combine_lanes(sum, [](vf a, vf b) { return a + b; });
}

// Softmax of the strip's logits, which `strip` is given with.
MADTP_INLINE void strip_softmax(StripSoftmax& strip) {
  const vf lowest = broadcast(-__builtin_inff());
  const float factor = strip.unit * kLog2E;
  const vf top = row_maxima(strip.logits, strip.columns);
  // A row that sees nothing has no maximum to subtract. Rounding the shift is harmless: the log-sum-exp takes it back.
  const __mmask16 sees = _mm512_cmp_ps_mask(top, lowest, _CMP_NEQ_UQ);
  const vf shift = _mm512_maskz_mul_ps(sees, top, broadcast(-factor));
  const vf sum = weights_of(strip.logits, strip.columns, factor, shift, strip.weights);

  const __mmask16 something = _mm512_cmp_ps_mask(sum, broadcast(0.0f), _CMP_NEQ_UQ);
  strip.inverse_sum = _mm512_maskz_div_ps(something, broadcast(1.0f), sum);
  const auto lse_of = [](__m256 sums, __m256 shifts) {
    const __m512d log2 = _mm512_sub_pd(log2_lanes(_mm512_cvtps_pd(sums)), _mm512_cvtps_pd(shifts));
    return _mm512_cvtpd_ps(_mm512_mul_pd(log2, _mm512_set1_pd(kLn2)));
  };
  const auto half = [](vf a) { return _mm512_extractf32x8_ps(a, 1); };
  const __m256 low = lse_of(_mm512_castps512_ps256(sum), _mm512_castps512_ps256(shift)), high = lse_of(half(sum), half(shift));
  strip.lse = _mm512_mask_mov_ps(lowest, something, _mm512_insertf32x8(_mm512_castps256_ps512(low), high, 1));

  __mmask16 unordered = _mm512_cmp_ps_mask(sum, sum, _CMP_UNORD_Q);
  if (__builtin_expect(unordered != 0, 0)) {
    alignas(64) float lse[kTile], row[kTile];
    store(lse, strip.lse);
    for (; unordered != 0; unordered &= unordered - 1) {
      const int r = __builtin_ctz(unordered);
      lse[r] = -__builtin_inff();
      for (int64_t j = 0; j < strip.columns; j += kTile) {
        store(row, load(strip.logits + j * kTile + r * kTile) * broadcast(strip.unit));
        for (const float s : row) lse[r] = lse[r] != lse[r] || s <= lse[r] ? lse[r] : s;
      }
      if (lse[r] != __builtin_inff()) lse[r] = __builtin_nanf("");
    }
    strip.lse = load(lse);
  }
}

// best = max over kHeads heads of s - lse, and of what stands there already if kMore.
template <int kHeads, bool kMore, bool kSpecial>
MADTP_INLINE void update_best(const StripSoftmax* const (&strips)[kMostHeadsTogether], float* best) {
  alignas(64) float offset[kHeads][kTile];
#pragma GCC unroll 4
  for (int h = 0; h < kHeads; ++h) {
    // Where nothing is seen all logits are -inf, and stay it.
    const __mmask16 sees = _mm512_cmp_ps_mask(strips[h]->lse, broadcast(-__builtin_inff()), _CMP_NEQ_UQ);
    store(offset[h], _mm512_maskz_sub_ps(sees, _mm512_setzero_ps(), strips[h]->lse));
  }
  const vf unit = broadcast(strips[0]->unit);
  const int64_t size = strips[0]->columns * kTile;
  for (int64_t tile = 0; tile < size; tile += kTileSums) {
#pragma GCC unroll 16
    for (int r = 0; r < kTile; ++r) {
      float* const to = best + tile + r * kTile;
      vf top = kMore ? load(to) : broadcast(-__builtin_inff());
#pragma GCC unroll 4
      for (int h = 0; h < kHeads; ++h) {
        const vf value = fma(load(strips[h]->logits + tile + r * kTile), unit, broadcast(offset[h][r]));
        top = kSpecial ? maximum_or_nan(value, top) : maximum(value, top);  // a NaN in `top` stays
      }
      store(to, top);
    }
  }
}

template <int kHeads>
MADTP_INLINE void update_best(const StripSoftmax* const (&strips)[kMostHeadsTogether], float* best, bool more) {
  bool special = false;
  for (int h = 0; h < kHeads; ++h) special |= strips[h]->is_special();
  if (__builtin_expect(special, 0)) {
    more ? update_best<kHeads, true, true>(strips, best) : update_best<kHeads, false, true>(strips, best);
  } else {
    more ? update_best<kHeads, true, false>(strips, best) : update_best<kHeads, false, false>(strips, best);
  }
}

// One block of up to two strips.
class TileBlock {
 public:
  explicit TileBlock(const AttentionBlock& block)
      : block_(block),
        at_(TileScratch::of(block.queries.rows, block.length, block.queries.depth)),
        strips_(tiles_of(block.queries.rows, kTile)),
        together_(block.best == nullptr ? 1 : heads_together(block.queries.rows, block.length)) {}

  void attend() {
    const Tiles tiles;
    for (int64_t head = 0; head < block_.heads; head += together_) {
      const int64_t count = smaller(together_, block_.heads - head);
      for (int64_t h = 0; h < count; ++h) attend_head(head + h, h);
      if (block_.best != nullptr) update(count, head > 0);
    }
  }

 private:
  static constexpr int64_t kMostStrips = 2;

  template <class T>
  T* scratch(int64_t bytes) const { return reinterpret_cast<T*>(block_.scratch + bytes); }

  // `slot` of the heads that are together.
  void attend_head(int64_t head, int64_t slot) {
    const int64_t rows = block_.queries.rows, head_dim = block_.queries.depth, columns = block_.columns;
    const int64_t depth = round_up(head_dim, kTileDepth), floats = strip_floats(block_.length);
    auto* const queries = scratch<bf16>(at_.queries);
    auto* const logits = scratch<float>(at_.logits) + slot * strips_ * floats;
    auto* const weights = scratch<bf16>(at_.weights);
    RowsToLoad source = block_.queries;
    source.source = static_cast<const char*>(source.source) + head * block_.head_bytes;
    load_rows<bf16, ProductBF16>(source, queries, depth);
    if (head + 1 < block_.heads) prefetch_rows<bf16>(source, block_.head_bytes);
    const void* const keys = static_cast<const char*>(block_.keys) + head * block_.keys_bytes;
    tiles_product(row_major_tiles({queries, depth, rows}), packed_tiles(keys, head_dim), strips_, tiles_of(columns, kTile),
                  depth / kTileDepth, {logits, floats, kTileSums, 64});

    const int64_t weights_step = tiles_of(block_.length, kTileDepth) * kTileFactors;
    for (int64_t i = 0; i < strips_; ++i) {
      StripSoftmax& strip = strip_[slot][i];
      strip.logits = logits + i * floats;
      strip.weights = weights + i * weights_step;
      strip.columns = columns;
      strip.unit = block_.biased ? 1.0f : block_.scale;
      if (block_.biased) add_bias(strip.logits, columns, block_.scale, block_.bias);
      for (int64_t r = 0; r < kTile; ++r) {
        hide_keys(strip.logits + r * kTile, larger(0, smaller(block_.visible + i * kTile + r, columns)),
                  round_up(columns, kTile));
      }
      strip_softmax(strip);
      const int64_t count = smaller(kTile, rows - i * kTile);
      store_n(block_.lse + head * block_.lse_stride + i * kTile, strip.lse, count);
    }
    if (block_.first_weights != nullptr) store_first_weights(head, strip_[slot][0]);

    auto* const sums = scratch<float>(at_.sums);
    const int64_t sums_stride = round_up(head_dim, kTile);
    const void* const values = static_cast<const char*>(block_.values) + head * block_.values_bytes;
    tiles_product({weights, weights_step, kTileFactors, 64}, packed_tiles(values, block_.length), strips_,
                  sums_stride / kTile, tiles_of(columns, kTileDepth), {sums, kTile * sums_stride, kTile, sums_stride * 4});
    store_out(head, sums, sums_stride, slot);
  }

  void store_first_weights(int64_t head, const StripSoftmax& strip) const {
    float* const to = block_.first_weights + head * block_.first_stride;
    alignas(64) float lse[kTile];
    store(lse, strip.lse);
    const vf offset = broadcast(lse[0] == -__builtin_inff() ? 0.0f : lse[0]);
    for (int64_t j = 0; j < block_.columns; j += kTile) {
      const vf s = load(strip.logits + j * kTile) * broadcast(strip.unit);
      store_n(to + j, exponential(s - offset), smaller(kTile, block_.columns - j));
    }
    store_unseen(block_, head);
  }

  void store_out(int64_t head, const float* sums, int64_t sums_stride, int64_t slot) const {
    const int64_t head_dim = block_.queries.depth;
    auto* to = static_cast<bf16*>(block_.out) + head * head_dim;
    for (int64_t i = 0; i < strips_; ++i) {
      alignas(64) float inverse_sum[kTile];
      store(inverse_sum, strip_[slot][i].inverse_sum);
      const int64_t count = smaller(kTile, block_.queries.rows - i * kTile);
      for (int64_t r = 0; r < count; ++r, to += block_.out_stride, sums += sums_stride) {
        const vf scale = broadcast(inverse_sum[r]);
        int64_t j = 0;
        for (; j + 2 * kLanes <= head_dim; j += 2 * kLanes) {
          store_pair(to + j, load(sums + j) * scale, load(sums + j + kLanes) * scale);
        }
        for (; j < head_dim; j += kLanes) store_n(to + j, load(sums + j) * scale, smaller(kLanes, head_dim - j));
      }
    }
  }

  // The running maximum over the heads that are together, and over earlier ones if there were any.
  void update(int64_t count, bool more) {
    const int64_t floats = strip_floats(block_.length);
    for (int64_t i = 0; i < strips_; ++i) {
      float* const best = block_.best + i * floats;
      const StripSoftmax* const strips[kMostHeadsTogether] = {&strip_[0][i], &strip_[1][i]};
      if (count == 1) {
        update_best<1>(strips, best, more);
      } else {
        update_best<2>(strips, best, more);
      }
      if (more) continue;
      const int64_t done = round_up(block_.columns, kTile) * kTile;
      for (int64_t j = done; j < floats; j += kLanes) store(best + j, broadcast(-__builtin_inff()));
    }
  }

  const AttentionBlock& block_;
  const TileScratch at_;
  const int64_t strips_, together_;
  StripSoftmax strip_[kMostHeadsTogether][kMostStrips];
};

void attend_by_tiles(const AttentionBlock& block) { TileBlock(block).attend(); }

// See CpuKernels::best_column_sums.
void best_column_sums_by_tiles(const float* best, int64_t first_row, int64_t rows, int64_t length, float* sums) {
  const int64_t floats = strip_floats(length);
  for (int64_t j = 0; j < length; j += kTile) {
    vf sum = broadcast(0.0f);
    for (int64_t r = first_row; r < rows; ++r) {
      sum = sum + exponential(load(best + r / kTile * floats + j * kTile + r % kTile * kTile));
    }
    const int64_t n = smaller(kTile, length - j);
    store_n(sums + j, load_n(sums + j, n) + sum, n);
  }
}

}  // namespace
}  // namespace madtp::cpu::MADTP_ISA
