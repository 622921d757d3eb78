// Copies between tensors and the operands of gemm.h: conversion to the factor type, zero padding, packing.
#pragma once

#include <type_traits>

#include "cpu/kernels/gemm.h"

namespace madtp::cpu::MADTP_ISA {
namespace {

// One row of a tensor as `columns` factors, zeros beyond `size`.
template <class Source>
MADTP_INLINE void load_row(const Source* from, int64_t size, float* to, int64_t columns) {
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) store(to + i, load(from + i));
  for (; i < columns; i += kLanes) {
    const int64_t given = larger(0, smaller(kLanes, size - i));
    store_n(to + i, load_n(from + i, given), smaller(kLanes, columns - i));
  }
}

#if defined(__AVX512BF16__)
MADTP_INLINE void load_row(const bf16* from, int64_t size, bf16* to, int64_t columns) {
  for (int64_t i = 0; i < columns; i += 32) {
    const auto given = static_cast<__mmask32>((1ull << larger(0, smaller(32, size - i))) - 1);
    const auto wanted = static_cast<__mmask32>((1ull << smaller(32, columns - i)) - 1);
    _mm512_mask_storeu_epi16(to + i, wanted, _mm512_maskz_loadu_epi16(given, from + i));
  }
}
#endif

template <class Source, class Product>
void load_rows(const RowsToLoad& rows, typename Product::element* to, int64_t stride) {
  const auto* from = static_cast<const Source*>(rows.source);
  for (int64_t r = 0; r < rows.rows; ++r) load_row(from + r * rows.stride, rows.depth, to + r * stride, stride);
  for (int64_t r = rows.rows; r % Product::kRows != 0; ++r) load_row(from, 0, to + r * stride, stride);
}

// Asks for the same rows `bytes` further on: the next head's lie too far apart for the processor to foresee them.
template <class Source>
MADTP_INLINE void prefetch_rows(const RowsToLoad& rows, int64_t bytes) {
  const auto* from = static_cast<const char*>(rows.source) + bytes;
  const int64_t row_bytes = rows.depth * static_cast<int64_t>(sizeof(Source));
  for (int64_t r = 0; r < rows.rows; ++r, from += rows.stride * static_cast<int64_t>(sizeof(Source))) {
    for (int64_t i = 0; i < row_bytes; i += 64) __builtin_prefetch(from + i, 0, 2);
  }
}

// Where column 0 of a vector starts in the packed operand, and the distance between steps of the depth.
struct PackedVector {
  int64_t start, step;
};

template <class Product>
MADTP_INLINE PackedVector packed_vector(int64_t vector, int64_t vectors, int64_t steps) {
  constexpr int64_t kVector = kLanes * Product::kDepth;
  const int64_t panel = vector / Product::kPanelVectors * Product::kPanelVectors;
  const int64_t width = smaller(Product::kPanelVectors, vectors - panel) * kVector;
  return {panel * kVector * steps + (vector - panel) * kVector, width};
}

// Steps of a packed depth, padding included.
template <class Product>
MADTP_INLINE int64_t packed_steps(int64_t depth) {
  return round_up(depth, Product::kDepthUnit) / Product::kDepth;
}

// to[s * step + c] = step s of row c, for kLanes rows and steps; a step is 32 bits, one float or a pair of bfloat16.
// `row_bytes` lie between rows.
#if defined(__AVX512F__)
MADTP_INLINE void transpose_square(const void* rows, int64_t row_bytes, uint32_t* to, int64_t step) {
  __m512i a[16], b[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) a[i] = _mm512_loadu_si512(static_cast<const char*>(rows) + i * row_bytes);
  // Pairs of rows, then fours: each 128-bit part k of the result holds one step of four rows.
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
    a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
    a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
    a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
  }
  // a[4 g + i] part k: rows 4 g .. 4 g + 3 of step 4 k + i. Gather the four groups of a step.
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m512i low01 = _mm512_shuffle_i32x4(a[i], a[4 + i], 0x88), low23 = _mm512_shuffle_i32x4(a[8 + i], a[12 + i], 0x88);
    const __m512i high01 = _mm512_shuffle_i32x4(a[i], a[4 + i], 0xdd), high23 = _mm512_shuffle_i32x4(a[8 + i], a[12 + i], 0xdd);
    _mm512_storeu_si512(to + i * step, _mm512_shuffle_i32x4(low01, low23, 0x88));
    _mm512_storeu_si512(to + (4 + i) * step, _mm512_shuffle_i32x4(high01, high23, 0x88));
    _mm512_storeu_si512(to + (8 + i) * step, _mm512_shuffle_i32x4(low01, low23, 0xdd));
    _mm512_storeu_si512(to + (12 + i) * step, _mm512_shuffle_i32x4(high01, high23, 0xdd));
  }
}
#else
MADTP_INLINE void transpose_square(const void* rows, int64_t row_bytes, uint32_t* to, int64_t step) {
  for (int64_t c = 0; c < kLanes; ++c) {
    uint32_t row[kLanes];
    std::memcpy(row, static_cast<const char*>(rows) + c * row_bytes, sizeof row);
    for (int64_t s = 0; s < kLanes; ++s) to[s * step + c] = row[s];
  }
}
#endif

// Source rows become columns [first_column, first_column + rows) of `columns`.
template <class Source, class Product>
void pack_transposed(const RowsToLoad& rows, int64_t first_column, int64_t columns, typename Product::element* to) {
  using Element = typename Product::element;
  constexpr int64_t kSquare = kLanes * Product::kDepth;  // depths of a square of steps
  const auto* from = static_cast<const Source*>(rows.source);
  const int64_t vectors = (columns + kLanes - 1) / kLanes;
  const int64_t steps = packed_steps<Product>(rows.depth);
  alignas(64) Element chunk[kLanes * kSquare];
  alignas(64) uint32_t turned[kLanes * kLanes];
  for (int64_t column = 0; column < rows.rows; column += kLanes) {
    const PackedVector at = packed_vector<Product>((first_column + column) / kLanes, vectors, steps);
    auto* target = reinterpret_cast<uint32_t*>(to + at.start);
    const int64_t step = at.step / Product::kDepth;
    for (int64_t s = 0; s < steps; s += kLanes, target += kLanes * step) {
      const int64_t depth = s * Product::kDepth, size = smaller(rows.depth - depth, kSquare);
      const void* square = chunk;
      int64_t row_bytes = sizeof(Element) * kSquare;
      if (std::is_same_v<Source, Element> && size == kSquare && column + kLanes <= rows.rows) {
        square = from + column * rows.stride + depth;
        row_bytes = sizeof(Element) * rows.stride;
      } else {
        for (int64_t c = 0; c < kLanes; ++c) {
          const bool exists = column + c < rows.rows;
          load_row(from + (exists ? (column + c) * rows.stride + depth : 0), exists ? size : 0, chunk + c * kSquare, kSquare);
        }
      }
      if (steps - s >= kLanes) {
        transpose_square(square, row_bytes, target, step);
      } else {
        transpose_square(square, row_bytes, turned, kLanes);
        for (int64_t i = 0; i < steps - s; ++i) std::memcpy(target + i * step, turned + i * kLanes, 4 * kLanes);
      }
    }
  }
}

// Source rows are the depths [first_depth, first_depth + rows) of `depth`.
template <class Source>
void pack_f32(const RowsToLoad& rows, int64_t first_depth, int64_t depth, float* to) {
  const auto* from = static_cast<const Source*>(rows.source);
  const int64_t columns = rows.depth, vectors = (columns + kLanes - 1) / kLanes;
  for (int64_t r = 0; r < rows.rows; ++r) {
    for (int64_t v = 0; v < vectors; ++v) {
      const PackedVector at = packed_vector<ProductF32>(v, vectors, depth);
      const Source* p = from + r * rows.stride + v * kLanes;
      const int64_t given = smaller(kLanes, columns - v * kLanes);
      store(to + at.start + (first_depth + r) * at.step, given == kLanes ? load(p) : load_n(p, given));
    }
  }
}

#if defined(__AVX512BF16__)
MADTP_INLINE void pack_bf16(const RowsToLoad& rows, int64_t first_depth, int64_t depth, bf16* to) {
  const auto* from = static_cast<const bf16*>(rows.source);
  const int64_t columns = rows.depth, vectors = (columns + kLanes - 1) / kLanes, steps = packed_steps<ProductBF16>(depth);
  // The last rows bring the padding with them.
  const int64_t padded = first_depth + rows.rows == depth ? 2 * steps - first_depth : rows.rows;
  for (int64_t r = 0; r < padded; r += 2) {
    for (int64_t v = 0; v < vectors; ++v) {
      const PackedVector at = packed_vector<ProductBF16>(v, vectors, steps);
      const __mmask16 given = first_lanes(smaller(kLanes, columns - v * kLanes));
      const __mmask16 has_even = r < rows.rows ? given : 0, has_odd = r + 1 < rows.rows ? given : 0;
      const bf16* even = from + r * rows.stride + v * kLanes;
      const __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(has_even, even));
      const __m512i high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(has_odd, even + rows.stride));
      _mm512_storeu_si512(to + at.start + (first_depth + r) / 2 * at.step, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
    }
  }
}
#endif

}  // namespace
}  // namespace madtp::cpu::MADTP_ISA
