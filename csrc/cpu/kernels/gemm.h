// Matrix products of small blocks: c = left right, where the left rows are plain and the right operand is packed.
//
// Packed layout: panels of kPanelVectors vectors of columns (the last one may have fewer); within a panel the depth runs
// outermost. float32: one vector per depth and vector of columns. bfloat16: the two values of an even and the following odd
// depth side by side in each 32-bit lane, which is what the dot-product instructions take. The depth is padded to whole
// Product::kDepthUnit, left operands to whole Product::kRows.
#pragma once

#include "cpu/kernels/kernels.h"
#include "cpu/kernels/simd.h"

namespace madtp::cpu::MADTP_ISA {
namespace {

// Rows come in whole tiles of kTileRows. A panel of kPanelVectors fills the registers with them. Where a panel has half as many
// vectors, a tile takes twice the rows while there are so many: fewer reads of the right operand, which comes from the second-level
// cache when the depth is large. Linear layers cut their tokens into such panels.
constexpr int kTileRows = 6;
constexpr int tall_rows(int vectors) { return vectors * 2 * kTileRows <= kSums ? 2 * kTileRows : kTileRows; }

struct ProductF32 {
  using element = float;
  using vector = vf;
  static constexpr int kDepth = 1;  // depths consumed by a step
  static constexpr int kDepthUnit = 1;
  // Terms added up one after the other; such sums are then added to one another. The rounding error of a single long sum grows with
  // the root of its length: at a depth of 3072 it would be four times that of PyTorch.
  static constexpr int64_t kChain = 192;
  static constexpr int kRows = kTileRows;
  static constexpr int kPanelVectors = MADTP_ISA::kPanelVectors;
  MADTP_INLINE vector left(const float* p) { return broadcast(*p); }
  MADTP_INLINE vector right(const float* p) { return load(p); }
  MADTP_INLINE vf accumulate(vector a, vector b, vf c) { return fma(a, b, c); }
};

#if defined(__AMX_BF16__)
// Products by tiles: tiles.h. A packed tile of 16 pairs of depths and 16 columns is a piece of memory.
struct ProductBF16 {
  using element = bf16;
  static constexpr int kDepth = 2;
  static constexpr int kDepthUnit = 32;
  static constexpr int kRows = 16;
  static constexpr int kPanelVectors = 1;
};
#elif defined(__AVX512BF16__)
struct ProductBF16 {
  using element = bf16;
  using vector = __m512i;
  static constexpr int kDepth = 2;
  static constexpr int kDepthUnit = 2;
  static constexpr int64_t kChain = int64_t{1} << 40;  // the factors' own rounding is far larger
  static constexpr int kRows = kTileRows;
  static constexpr int kPanelVectors = MADTP_ISA::kPanelVectors;
  MADTP_INLINE vector left(const bf16* p) {
    int pair;
    std::memcpy(&pair, p, 4);
    return _mm512_set1_epi32(pair);
  }
  MADTP_INLINE vector right(const bf16* p) { return _mm512_loadu_si512(p); }
  MADTP_INLINE vf accumulate(vector a, vector b, vf c) { return _mm512_dpbf16_ps(c, (__m512bh)a, (__m512bh)b); }
};
#endif

// One tile of kRows rows and kVectors vectors of columns, kept in registers; `finish(row, vector, sum)` stores it. `left_step`: between
// the steps of a row.
template <class Product, int kRows, int kVectors, class Finish>
MADTP_INLINE void tile(const typename Product::element* left, int64_t left_stride, const typename Product::element* right,
                       int64_t steps, Finish&& finish, int64_t left_step = Product::kDepth) {
  vf sums[kRows][kVectors], total[kRows][kVectors];
  for (int64_t done = 0; done < steps || done == 0; done += Product::kChain) {
#pragma GCC unroll 12
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        if (done == Product::kChain) total[r][v] = sums[r][v];
        if (done > Product::kChain) total[r][v] = total[r][v] + sums[r][v];
        sums[r][v] = broadcast(0.0f);
      }
    const int64_t end = smaller(steps - done, Product::kChain);
    // Unrolled so that the processor foresees the end of the loop, which a head of 64 makes short.
#pragma GCC unroll 4
    for (int64_t step = 0; step < end; ++step) {
      typename Product::vector columns[kVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) columns[v] = Product::right(right + v * kLanes * Product::kDepth);
#pragma GCC unroll 12
      for (int r = 0; r < kRows; ++r) {
        const auto row = Product::left(left + r * left_stride);
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) sums[r][v] = Product::accumulate(row, columns[v], sums[r][v]);
      }
      left += left_step;
      right += kVectors * kLanes * Product::kDepth;
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) finish(r, v, steps > Product::kChain ? total[r][v] + sums[r][v] : sums[r][v]);
}

// All rows against one panel. `finish(row, vector, sum)` gets rows up to a multiple of kTileRows.
template <class Product, int kVectors, class Finish>
MADTP_INLINE void panel_product(const LeftRows& left, const typename Product::element* panel, int64_t steps,
                                Finish&& finish) {
  const auto* rows = static_cast<const typename Product::element*>(left.data);
  int64_t row = 0;
  const auto store_tile = [&](int r, int v, vf sum) { finish(row + r, v, sum); };
  constexpr int kTall = tall_rows(kVectors);
  for (; row + kTall - kTileRows < left.rows; row += kTall) {
    tile<Product, kTall, kVectors>(rows + row * left.stride, left.stride, panel, steps, store_tile);
  }
  for (; row < left.rows; row += kTileRows) {
    tile<Product, kTileRows, kVectors>(rows + row * left.stride, left.stride, panel, steps, store_tile);
  }
}

// The same with the width of the panel known at run time.
template <class Product, class Finish>
MADTP_INLINE void any_panel_product(const LeftRows& left, const typename Product::element* panel, int64_t vectors,
                                    int64_t steps, Finish&& finish) {
  if (vectors == 1) return panel_product<Product, 1>(left, panel, steps, finish);
  if (vectors == 2) return panel_product<Product, 2>(left, panel, steps, finish);
  if constexpr (kPanelVectors > 2) {
    if (vectors == 3) return panel_product<Product, 3>(left, panel, steps, finish);
    return panel_product<Product, 4>(left, panel, steps, finish);
  }
}

// The whole product; `finish(row, column, sum)` gets the first column of each vector. Of the packed depth the first `depth`
// count.
template <class Product, class Finish>
MADTP_INLINE void block_product(const LeftRows& left, const void* right, int64_t columns, int64_t depth,
                                int64_t packed_depth, Finish&& finish) {
  const auto* panel = static_cast<const typename Product::element*>(right);
  const int64_t steps = (depth + Product::kDepth - 1) / Product::kDepth;
  const int64_t packed_steps = (packed_depth + Product::kDepth - 1) / Product::kDepth;
  for (int64_t column = 0; column < columns; column += kPanelVectors * kLanes) {
    const int64_t vectors = smaller((columns - column + kLanes - 1) / kLanes, kPanelVectors);
    any_panel_product<Product>(left, panel, vectors, steps,
                               [&](int64_t row, int v, vf sum) { finish(row, column + v * kLanes, sum); });
    panel += vectors * kLanes * packed_steps * Product::kDepth;
  }
}

// c = left right.
template <class Product>
void plain_product(const LeftRows& left, const void* right, int64_t columns, int64_t depth, float* c, int64_t c_stride) {
  block_product<Product>(left, right, columns, depth, depth,
                         [&](int64_t row, int64_t column, vf sum) { store(c + row * c_stride + column, sum); });
}

// c = scale * left right + bias.
template <class Product>
void product(const LeftRows& left, const void* right, int64_t columns, int64_t depth, float scale, const float* bias,
             float* c, int64_t c_stride) {
  const vf factor = broadcast(scale);
  block_product<Product>(left, right, columns, depth, depth, [&](int64_t row, int64_t column, vf sum) {
    store(c + row * c_stride + column, fma(sum, factor, load(bias + column)));
  });
}

// out = row_scale * left right, rows and columns exactly. Of the packed depth only the first `depth` count.
template <class Product, class Out>
void scaled_product(const LeftRows& left, const void* right, int64_t columns, int64_t depth, int64_t packed_depth,
                    const float* row_scale, Out* out, int64_t out_stride) {
  block_product<Product>(left, right, columns, depth, packed_depth, [&](int64_t row, int64_t column, vf sum) {
    if (row >= left.rows) return;
    const vf value = sum * broadcast(row_scale[row]);
    if (column + kLanes <= columns) {
      store(out + row * out_stride + column, value);
    } else {
      store_n(out + row * out_stride + column, value, columns - column);
    }
  });
}

template <class Product>
void product_maximum(const LeftRows& left, const void* panel, int64_t columns, int64_t depth, float scale,
                     const float* bias, const float* row_offset, float* best, int64_t best_stride) {
  const vf factor = broadcast(scale);
  any_panel_product<Product>(
      left, static_cast<const typename Product::element*>(panel), (columns + kLanes - 1) / kLanes,
      (depth + Product::kDepth - 1) / Product::kDepth, [&](int64_t row, int v, vf sum) {
        float* to = best + row * best_stride + v * kLanes;
        const vf value = fma(sum, factor, load(bias + v * kLanes)) - broadcast(row_offset[row]);
        store(to, maximum_or_nan(value, load(to)));
      });
}

}  // namespace
}  // namespace madtp::cpu::MADTP_ISA
