// Gradients of attention by AMX tiles: see attention_gradient.h. P and dS enter products in bfloat16.
//
// 32 keys at a time, as two strips of 16 with all queries, tile after tile. P and dS are left operands of dv and dk as they come, with
// queries as the depth; for dq, dS is turned, with these keys as one tile of depth.
#pragma once

#include "cpu/kernels/attention_gradient.h"
#include "cpu/kernels/tiles_attend.h"

namespace madtp::cpu::MADTP_ISA {
namespace {

// Where the parts of a block's working memory start, in bytes.
struct TileGradientScratch {
  int64_t queries_turned, d_out_turned, queries, d_out, keys, values, keys_packed, p_sums, d_s_sums, p, d_s, d_s_turned, sums, d_q,
      lse, shift, total;

  MADTP_INLINE TileGradientScratch of(int64_t queries, int64_t head_dim) {
    TileGradientScratch at{};
    const auto reserve = [&](int64_t bytes) {
      const int64_t start = at.total;
      at.total += round_up(bytes, 64);
      return start;
    };
    constexpr int64_t kFactors = kTileFactors * 2, kSums = kTileSums * 4;
    const int64_t query_tiles = tiles_of(queries, kTile), query_steps = tiles_of(queries, kTileDepth);
    const int64_t dim_tiles = tiles_of(head_dim, kTile), dim_steps = tiles_of(head_dim, kTileDepth);
    at.queries_turned = reserve(query_tiles * dim_steps * kFactors);
    at.d_out_turned = reserve(query_tiles * dim_steps * kFactors);
    at.queries = reserve(dim_tiles * query_steps * kFactors);
    at.d_out = reserve(dim_tiles * query_steps * kFactors);
    at.keys = reserve(2 * dim_steps * kFactors);
    at.values = reserve(2 * dim_steps * kFactors);
    at.keys_packed = reserve(dim_tiles * kFactors);
    at.p_sums = reserve(2 * 2 * query_steps * kSums);
    at.d_s_sums = reserve(2 * 2 * query_steps * kSums);
    at.p = reserve(2 * query_steps * kFactors);
    at.d_s = reserve(2 * query_steps * kFactors);
    at.d_s_turned = reserve(2 * query_steps * kFactors);
    at.sums = reserve(2 * dim_tiles * kSums);
    at.d_q = reserve(query_tiles * dim_tiles * kSums);
    at.lse = reserve(2 * query_steps * kTile * 4);
    at.shift = reserve(2 * query_steps * kTile * 4);
    return at;
  }
};

class TileGradient {
 public:
  explicit TileGradient(const AttentionGradientBlock& block)
      : block_(block),
        at_(TileGradientScratch::of(block.q.rows, block.q.depth)),
        query_tiles_(tiles_of(block.q.rows, kTile)),
        query_steps_(tiles_of(block.q.rows, kTileDepth)),
        dim_tiles_(tiles_of(block.q.depth, kTile)),
        dim_steps_(tiles_of(block.q.depth, kTileDepth)) {}

  void run() {
    const Tiles tiles;
    const int64_t queries = block_.q.rows, keys = block_.k.rows, head_dim = block_.q.depth;
    float* const shift = scratch<float>(at_.shift);
    load_query_terms<bf16>(block_, 2 * query_steps_ * kTile, scratch<float>(at_.lse), shift);
    pack_transposed<bf16, ProductBF16>(block_.q, 0, queries, scratch<bf16>(at_.queries_turned));
    pack_transposed<bf16, ProductBF16>(block_.d_out, 0, queries, scratch<bf16>(at_.d_out_turned));
    pack_bf16(block_.q, 0, queries, scratch<bf16>(at_.queries));
    pack_bf16(block_.d_out, 0, queries, scratch<bf16>(at_.d_out));
    float* const d_q = scratch<float>(at_.d_q);
    std::memset(d_q, 0, static_cast<size_t>(query_tiles_ * dim_tiles_ * kTileSums) * 4);

    for (int64_t first = 0; first < keys; first += kTileDepth) {
      const int64_t count = smaller(kTileDepth, keys - first);
      const RowsToLoad k = rows_from<bf16>(block_.k, first, count), v = rows_from<bf16>(block_.v, first, count);
      logits(k, at_.keys, at_.queries_turned, at_.p_sums);
      logits(v, at_.values, at_.d_out_turned, at_.d_s_sums);
      for (int64_t step = 0; step < query_steps_; ++step) {
        2 * step + 1 < query_tiles_ ? probabilities<true>(first, count, step) : probabilities<false>(first, count, step);
        turn(step);
      }
      if (block_.d_bias != nullptr) sum_gradients(first, count);
      key_gradient(at_.p, at_.d_out, first, count, 1.0f, block_.d_v);
      key_gradient(at_.d_s, at_.queries, first, count, block_.scale, block_.d_k);
      pack_bf16(k, 0, count, scratch<bf16>(at_.keys_packed));
      tiles_product<true>({scratch<bf16>(at_.d_s_turned), kTileFactors, 0, 64}, packed_tiles(scratch<bf16>(at_.keys_packed), count),
                          query_tiles_, dim_tiles_, 1, {d_q, dim_tiles_ * kTileSums, kTileSums, 64});
    }
    store_rows(d_q, queries, block_.scale, static_cast<bf16*>(block_.d_q));
  }

 private:
  template <class T>
  T* scratch(int64_t bytes) const { return reinterpret_cast<T*>(block_.scratch + bytes); }

  // Strips of sums of some rows, keys or values, with what is packed for all queries.
  void logits(const RowsToLoad& rows, int64_t left, int64_t right, int64_t sums) const {
    const int64_t depth = dim_steps_ * kTileDepth;
    load_rows<bf16, ProductBF16>(rows, scratch<bf16>(left), depth);
    tiles_product(row_major_tiles({scratch<bf16>(left), depth, rows.rows}), packed_tiles(scratch<bf16>(right), rows.depth),
                  tiles_of(rows.rows, kTile), query_tiles_, dim_steps_,
                  {scratch<float>(sums), 2 * query_steps_ * kTileSums, kTileSums, 64});
  }

  // P and dS of 32 keys and 32 queries (16, unless kBoth, and zeros), from their sums. Keys that do not exist have zeros.
  template <bool kBoth>
  void probabilities(int64_t first_key, int64_t keys, int64_t step) const {
    const vf factor = broadcast(block_.scale * kLog2E), zero = broadcast(0.0f), unit = broadcast(kLog2E);
    const float* const lse = scratch<float>(at_.lse) + step * kTileDepth;
    const float* const shift = scratch<float>(at_.shift) + step * kTileDepth;
    const vf lse_even = load(lse) * unit, lse_odd = load(lse + kTile) * unit;
    const vf shift_even = load(shift), shift_odd = load(shift + kTile);
    for (int64_t r = 0; r < kTileDepth; ++r) {
      const int64_t strip = r / kTile, row = r % kTile, sums = (strip * query_steps_ + step) * 2 * kTileSums + row * kTile;
      bf16* const p = scratch<bf16>(at_.p) + (strip * query_steps_ + step) * kTileFactors + row * kTileDepth;
      bf16* const d_s = scratch<bf16>(at_.d_s) + (strip * query_steps_ + step) * kTileFactors + row * kTileDepth;
      if (r >= keys) {
        store_pair(p, zero, zero);
        store_pair(d_s, zero, zero);
        continue;
      }
      float* const products = scratch<float>(at_.p_sums) + sums;
      float* const d_products = scratch<float>(at_.d_s_sums) + sums;
      const vf bias = broadcast(block_.bias == nullptr ? 0.0f : block_.bias[first_key + r] * kLog2E);
      const int64_t blind = blind_queries(block_, first_key + r), i = step * kTileDepth;
      const vf even = seen_only(exp2_short(fma(load(products), factor, bias) - lse_even), i, blind);
      const vf d_even = even * (load(d_products) + shift_even);
      vf odd = zero, d_odd = zero;
      if constexpr (kBoth) {
        odd = seen_only(exp2_short(fma(load(products + kTileSums), factor, bias) - lse_odd), i + kTile, blind);
        d_odd = odd * (load(d_products + kTileSums) + shift_odd);
      }
      store_pair(p, even, odd);
      store_pair(d_s, d_even, d_odd);
      if (block_.d_bias != nullptr) store(d_products, d_even + d_odd);
    }
  }

  // The same dS with the 32 queries as rows and the 32 keys as depth.
  void turn(int64_t step) const {
    alignas(64) uint32_t pairs[2][kTile * kTile];  // of adjacent keys; by half of the queries
    alignas(64) static constexpr uint16_t kFirst[32] = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                                        8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
    const __m512i first = _mm512_load_si512(kFirst), second = _mm512_add_epi16(first, _mm512_set1_epi16(16));
    for (int64_t pair = 0; pair < kTile; ++pair) {
      const int64_t strip = pair / 8, row = pair % 8 * 2;
      const bf16* const d_s = scratch<bf16>(at_.d_s) + (strip * query_steps_ + step) * kTileFactors + row * kTileDepth;
      const __m512i even = _mm512_loadu_si512(d_s), odd = _mm512_loadu_si512(d_s + kTileDepth);
      _mm512_store_si512(pairs[0] + pair * kTile, _mm512_permutex2var_epi16(even, first, odd));
      _mm512_store_si512(pairs[1] + pair * kTile, _mm512_permutex2var_epi16(even, second, odd));
    }
    auto* const to = reinterpret_cast<uint32_t*>(scratch<bf16>(at_.d_s_turned) + 2 * step * kTileFactors);
    transpose_square(pairs[0], 64, to, kTile);
    transpose_square(pairs[1], 64, to + kTile * kTile, kTile);
  }

  void sum_gradients(int64_t first_key, int64_t keys) const {
    for (int64_t r = 0; r < keys; ++r) {
      const int64_t strip = r / kTile, row = r % kTile;
      vf sum = broadcast(0.0f);
      for (int64_t step = 0; step < query_steps_; ++step) {
        sum = sum + load(scratch<float>(at_.d_s_sums) + (strip * query_steps_ + step) * 2 * kTileSums + row * kTile);
      }
      block_.d_bias[first_key + r] = sum_lanes(sum);
    }
  }

  // scale * P dout, or dS q, of some keys, which are complete.
  void key_gradient(int64_t left, int64_t right, int64_t first_key, int64_t keys, float scale, void* to) const {
    float* const sums = scratch<float>(at_.sums);
    tiles_product({scratch<bf16>(left), query_steps_ * kTileFactors, kTileFactors, 64},
                  packed_tiles(scratch<bf16>(right), block_.q.rows), tiles_of(keys, kTile), dim_tiles_, query_steps_,
                  {sums, dim_tiles_ * kTileSums, kTileSums, 64});
    store_rows(sums, keys, scale, static_cast<bf16*>(to) + first_key * block_.d_stride);
  }

  // Rows of tiles of sums.
  void store_rows(const float* sums, int64_t rows, float scale_value, bf16* to) const {
    const vf scale = broadcast(scale_value);
    for (int64_t r = 0; r < rows; ++r, to += block_.d_stride) {
      const float* const row = sums + r / kTile * dim_tiles_ * kTileSums + r % kTile * kTile;
      for (int64_t tile = 0; tile < dim_tiles_; ++tile) {
        store_n(to + tile * kTile, load(row + tile * kTileSums) * scale, smaller(kTile, block_.q.depth - tile * kTile));
      }
    }
  }

  const AttentionGradientBlock& block_;
  const TileGradientScratch at_;
  const int64_t query_tiles_, query_steps_, dim_tiles_, dim_steps_;
};

void attention_gradient_by_tiles(const AttentionGradientBlock& block) { TileGradient(block).run(); }

}  // namespace
}  // namespace madtp::cpu::MADTP_ISA
