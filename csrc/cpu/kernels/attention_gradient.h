// Gradients of attention for one head of one sample. For some keys at a time and all queries, keys along the rows:
//
//   P_ji = exp(scale <q_i, k_j> + bias_j - lse_i)      dS_ji = P_ji (<dout_i, v_j> + dlse_i - <dout_i, out_i>)
//   dv_j = sum_i P_ji dout_i    dk_j = scale sum_i dS_ji q_i    dbias_j = sum_i dS_ji    dq_i += scale sum_j dS_ji k_j
//
// So keys and values are finished as they come, and the terms of a query are adjacent in a vector.
#pragma once

#include <cstring>

#include "cpu/kernels/attend.h"
#include "cpu/kernels/gemm.h"
#include "cpu/kernels/pack.h"
#include "cpu/kernels/score.h"
#include "cpu/kernels/softmax.h"

namespace madtp::cpu::MADTP_ISA {
namespace {

// What the probabilities of a query subtract, and what its dP does: [queries] up to whole blocks of kQueries. A query that sees no
// key, and one that does not exist, has no probabilities.
template <class Source>
void load_query_terms(const AttentionGradientBlock& block, int64_t padded, float* lse, float* shift) {
  const int64_t queries = block.q.rows, head_dim = block.q.depth;
  for (int64_t i = 0; i < queries; ++i) {
    const auto* out = static_cast<const Source*>(block.out.source) + i * block.out.stride;
    const auto* d_out = static_cast<const Source*>(block.d_out.source) + i * block.d_out.stride;
    vf mean = broadcast(0.0f);
    int64_t c = 0;
    for (; c + kLanes <= head_dim; c += kLanes) mean = fma(load(out + c), load(d_out + c), mean);
    if (c < head_dim) mean = fma(load_n(out + c, head_dim - c), load_n(d_out + c, head_dim - c), mean);
    shift[i] = block.d_lse[i] - sum_lanes(mean);
    lse[i] = block.lse[i] == -__builtin_inff() ? __builtin_inff() : block.lse[i];
  }
  for (int64_t i = queries; i < padded; ++i) {
    lse[i] = __builtin_inff();
    shift[i] = 0.0f;
  }
}

// How many of the first queries do not see key j: query i sees the keys j <= i + block.ahead.
MADTP_INLINE int64_t blind_queries(const AttentionGradientBlock& block, int64_t j) { return larger(0, j - block.ahead); }

// The probabilities of queries [i, i + kLanes), 0 for the blind ones.
MADTP_INLINE vf seen_only(vf p, int64_t i, int64_t blind) { return i < blind ? zero_before(p, smaller(kLanes, blind - i)) : p; }

template <class Source>
MADTP_INLINE RowsToLoad rows_from(RowsToLoad rows, int64_t first, int64_t count) {
  rows.source = static_cast<const Source*>(rows.source) + first * rows.stride;
  rows.rows = count;
  return rows;
}

constexpr int64_t kGradientKeys = 24;  // at a time: they and all queries should stay in the first-level cache
constexpr int64_t kTurnedRows = 2 * kTileRows;  // of a tile, at most

// Where the parts of a block's working memory start, in bytes.
struct GradientScratch {
  int64_t queries_turned, d_out_turned, queries, d_out, d_q, lse, shift, p, d_s, keys, values, keys_packed, total;

  MADTP_INLINE GradientScratch of(int64_t queries, int64_t head_dim) {
    GradientScratch at{};
    const auto reserve = [&](int64_t floats) {
      const int64_t start = at.total;
      at.total += round_up(floats * 4, 64);
      return start;
    };
    // Tiles of rows may reach beyond the last query.
    const int64_t width = round_up(head_dim, kLanes), length = round_up(queries, kLanes), stride = logits_stride(queries) + kTurnedRows;
    at.queries_turned = reserve(length * head_dim);
    at.d_out_turned = reserve(length * head_dim);
    at.queries = reserve(queries * width);
    at.d_out = reserve(queries * width);
    at.d_q = reserve((queries + kTurnedRows) * width);
    at.lse = reserve(length);
    at.shift = reserve(length);
    at.p = reserve(kGradientKeys * stride);
    at.d_s = reserve(kGradientKeys * stride);
    at.keys = reserve(kGradientKeys * head_dim);
    at.values = reserve(kGradientKeys * head_dim);
    at.keys_packed = reserve(kGradientKeys * width);
    return at;
  }
};

// P and dS of some keys in place of the products that they are made of, [keys, stride].
MADTP_INLINE void gradient_logits(const AttentionGradientBlock& block, int64_t first_key, int64_t keys, const float* lse,
                                  const float* shift, float* p, float* d_s, int64_t stride) {
  const vf scale = broadcast(block.scale);
  for (int64_t r = 0; r < keys; ++r, p += stride, d_s += stride) {
    const vf bias = broadcast(block.bias == nullptr ? 0.0f : block.bias[first_key + r]);
    const int64_t blind = blind_queries(block, first_key + r);
    vf sum = broadcast(0.0f);
    for (int64_t i = 0; i < block.q.rows; i += kLanes) {
      const vf probability = seen_only(exponential(fma(load(p + i), scale, bias) - load(lse + i)), i, blind);
      const vf gradient = probability * (load(d_s + i) + load(shift + i));
      store(p + i, probability);
      store(d_s + i, gradient);
      sum = sum + gradient;
    }
    if (block.d_bias != nullptr) block.d_bias[first_key + r] = sum_lanes(sum);
  }
}

// c += left^T right: left [depth, stride] with a row of c per column, right one panel of kVectors.
template <int kVectors>
MADTP_INLINE void add_turned_panel(const float* left, int64_t stride, int64_t rows, const float* panel, int64_t depth, float* c,
                                   int64_t c_stride) {
  constexpr int kRows = tall_rows(kVectors);
  for (int64_t row = 0; row < rows; row += kRows) {
    float* const to = c + row * c_stride;
    const auto add = [&](int r, int v, vf sum) {
      float* const at = to + r * c_stride + v * kLanes;
      store(at, load(at) + sum);
    };
    tile<ProductF32, kRows, kVectors>(left + row, 1, panel, depth, add, stride);
  }
}

// The same for all panels of a packed right operand.
MADTP_INLINE void add_turned_product(const float* left, int64_t stride, int64_t rows, const float* right, int64_t columns,
                                     int64_t depth, float* c, int64_t c_stride) {
  for (int64_t column = 0; column < columns; column += kPanelVectors * kLanes) {
    const int64_t vectors = smaller((columns - column + kLanes - 1) / kLanes, kPanelVectors);
    if (vectors == 1) add_turned_panel<1>(left, stride, rows, right, depth, c + column, c_stride);
    if (vectors == 2) add_turned_panel<2>(left, stride, rows, right, depth, c + column, c_stride);
    if constexpr (kPanelVectors > 2) {
      if (vectors == 3) add_turned_panel<3>(left, stride, rows, right, depth, c + column, c_stride);
      if (vectors == 4) add_turned_panel<4>(left, stride, rows, right, depth, c + column, c_stride);
    }
    right += vectors * kLanes * depth;
  }
}

template <class Source>
void attention_gradient(const AttentionGradientBlock& block) {
  const int64_t queries = block.q.rows, keys = block.k.rows, head_dim = block.q.depth;
  const int64_t width = round_up(head_dim, kLanes), stride = logits_stride(queries) + kTurnedRows;
  const GradientScratch at = GradientScratch::of(queries, head_dim);
  const auto scratch = [&](int64_t bytes) { return reinterpret_cast<float*>(block.scratch + bytes); };
  float* const lse = scratch(at.lse);
  float* const shift = scratch(at.shift);
  float* const p = scratch(at.p);
  float* const d_s = scratch(at.d_s);
  float* const d_q = scratch(at.d_q);

  load_query_terms<Source>(block, round_up(queries, kLanes), lse, shift);
  pack_transposed<Source, ProductF32>(block.q, 0, queries, scratch(at.queries_turned));
  pack_transposed<Source, ProductF32>(block.d_out, 0, queries, scratch(at.d_out_turned));
  pack_f32<Source>(block.q, 0, queries, scratch(at.queries));
  pack_f32<Source>(block.d_out, 0, queries, scratch(at.d_out));
  std::memset(d_q, 0, static_cast<size_t>((queries + kTurnedRows) * width) * 4);
  float ones[kGradientKeys], scales[kGradientKeys];
  for (int64_t r = 0; r < kGradientKeys; ++r) ones[r] = 1.0f, scales[r] = block.scale;

  for (int64_t first = 0; first < keys; first += kGradientKeys) {
    const int64_t count = smaller(kGradientKeys, keys - first);
    const RowsToLoad k = rows_from<Source>(block.k, first, count), v = rows_from<Source>(block.v, first, count);
    load_rows<Source, ProductF32>(k, scratch(at.keys), head_dim);
    load_rows<Source, ProductF32>(v, scratch(at.values), head_dim);
    plain_product<ProductF32>({scratch(at.keys), head_dim, count}, scratch(at.queries_turned), queries, head_dim, p, stride);
    plain_product<ProductF32>({scratch(at.values), head_dim, count}, scratch(at.d_out_turned), queries, head_dim, d_s, stride);
    gradient_logits(block, first, count, lse, shift, p, d_s, stride);

    scaled_product<ProductF32>({p, stride, count}, scratch(at.d_out), head_dim, queries, queries, ones,
                               static_cast<Source*>(block.d_v) + first * block.d_stride, block.d_stride);
    scaled_product<ProductF32>({d_s, stride, count}, scratch(at.queries), head_dim, queries, queries, scales,
                               static_cast<Source*>(block.d_k) + first * block.d_stride, block.d_stride);
    pack_f32<Source>(k, 0, count, scratch(at.keys_packed));
    add_turned_product(d_s, stride, queries, scratch(at.keys_packed), head_dim, count, d_q, width);
  }
  for (int64_t i = 0; i < queries; ++i) {
    store_scaled(d_q + i * width, block.scale, static_cast<Source*>(block.d_q) + i * block.d_stride, head_dim);
  }
}

}  // namespace
}  // namespace madtp::cpu::MADTP_ISA
