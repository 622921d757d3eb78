// Copies between tensors and the operands of cpu_gemm.h: conversion to the factor type, zero padding, packing.
#pragma once

#include "cpu_gemm.h"

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

MADTP_INLINE void load_row(const bf16* from, int64_t size, bf16* to, int64_t columns) {
  std::memcpy(to, from, static_cast<size_t>(size) * sizeof(bf16));
  for (int64_t i = size; i < columns; ++i) to[i].bits = 0;
}

template <class Source, class Element>
void load_rows(const RowsToLoad& rows, Element* to, int64_t stride) {
  const auto* from = static_cast<const Source*>(rows.source);
  for (int64_t r = 0; r < rows.rows; ++r) load_row(from + r * rows.stride, rows.depth, to + r * stride, stride);
  for (int64_t r = rows.rows; r % kTileRows != 0; ++r) load_row(from, 0, to + r * stride, stride);
}

// Where column 0 of a vector starts in the packed operand, and the distance between steps of the depth.
struct PackedVector {
  int64_t start, step;
};

MADTP_INLINE PackedVector packed_vector(int64_t vector, int64_t vectors, int64_t steps, int64_t depth_per_step) {
  const int64_t panel = vector / kPanelVectors * kPanelVectors;
  const int64_t width = smaller(kPanelVectors, vectors - panel) * kLanes * depth_per_step;
  const int64_t before = panel * kLanes * steps * depth_per_step;
  return {before + (vector - panel) * kLanes * depth_per_step, width};
}

// Source rows become columns. The values of a step (one float, or a pair of bfloat16) move as one 32-bit unit.
template <class Unit>
MADTP_INLINE void transpose_vector(const Unit* rows, int64_t rows_stride, int64_t steps, Unit* to, int64_t step) {
  for (int64_t s = 0; s < steps; ++s)
    for (int64_t c = 0; c < kLanes; ++c) to[s * step + c] = rows[c * rows_stride + s];
}

constexpr int64_t kChunk = 64;  // depths that are transposed at a time

template <class Source, class Product>
void pack_transposed(const RowsToLoad& rows, typename Product::element* to) {
  using Element = typename Product::element;
  const auto* from = static_cast<const Source*>(rows.source);
  const int64_t columns = rows.rows, vectors = (columns + kLanes - 1) / kLanes;
  const int64_t steps = (rows.depth + Product::kDepth - 1) / Product::kDepth;
  alignas(64) Element chunk[kLanes * kChunk];
  for (int64_t v = 0; v < vectors; ++v) {
    const PackedVector at = packed_vector(v, vectors, steps, Product::kDepth);
    for (int64_t s = 0; s < steps; s += kChunk / Product::kDepth) {
      const int64_t chunk_steps = smaller(kChunk / Product::kDepth, steps - s), first = s * Product::kDepth;
      const int64_t size = smaller(rows.depth - first, kChunk);
      for (int64_t c = 0; c < kLanes; ++c) {
        const int64_t column = v * kLanes + c;
        load_row(from + column * (column < columns ? rows.stride : 0) + first, column < columns ? size : 0,
                 chunk + c * kChunk, chunk_steps * Product::kDepth);
      }
      transpose_vector(reinterpret_cast<const uint32_t*>(chunk), kChunk / Product::kDepth, chunk_steps,
                       reinterpret_cast<uint32_t*>(to + at.start + s * at.step), at.step / Product::kDepth);
    }
  }
}

// Source rows are the depth.
template <class Source>
void pack_f32(const RowsToLoad& rows, int64_t columns, float* to) {
  const auto* from = static_cast<const Source*>(rows.source);
  const int64_t vectors = (columns + kLanes - 1) / kLanes;
  for (int64_t v = 0; v < vectors; ++v) {
    const PackedVector at = packed_vector(v, vectors, rows.rows, 1);
    const int64_t given = smaller(kLanes, columns - v * kLanes);
    for (int64_t s = 0; s < rows.rows; ++s) {
      const Source* p = from + s * rows.stride + v * kLanes;
      store(to + at.start + s * at.step, given == kLanes ? load(p) : load_n(p, given));
    }
  }
}

#if defined(__AVX512BF16__)
MADTP_INLINE void pack_bf16(const RowsToLoad& rows, int64_t columns, bf16* to) {
  const auto* from = static_cast<const bf16*>(rows.source);
  const int64_t vectors = (columns + kLanes - 1) / kLanes, steps = (rows.rows + 1) / 2;
  for (int64_t v = 0; v < vectors; ++v) {
    const PackedVector at = packed_vector(v, vectors, steps, 2);
    const __mmask16 given = first_lanes(smaller(kLanes, columns - v * kLanes));
    for (int64_t s = 0; s < steps; ++s) {
      const bf16* even = from + 2 * s * rows.stride + v * kLanes;
      const __mmask16 has_odd = 2 * s + 1 < rows.rows ? given : 0;
      const __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(given, even));
      const __m512i high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(has_odd, even + rows.stride));
      _mm512_storeu_si512(to + at.start + s * at.step, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
    }
  }
}
#endif

}  // namespace
}  // namespace madtp::cpu::MADTP_ISA
