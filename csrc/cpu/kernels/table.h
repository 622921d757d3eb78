// Fills a CpuKernels table with the kernels of the instruction set the including file is compiled for. Define MADTP_ISA (the
// namespace and the name) first.
#pragma once

#include "cpu/kernels/alike.h"
#include "cpu/kernels/attend.h"
#include "cpu/kernels/attention_gradient.h"
#include "cpu/kernels/gemm.h"
#include "cpu/kernels/importance_gradient.h"
#include "cpu/kernels/kernels.h"
#include "cpu/kernels/linear.h"
#include "cpu/kernels/pack.h"
#include "cpu/kernels/score.h"
#include "cpu/kernels/softmax.h"
#if defined(__AMX_BF16__)
#include "cpu/kernels/tiles.h"
#include "cpu/kernels/tiles_attend.h"
#include "cpu/kernels/tiles_attention_gradient.h"
#endif

namespace madtp::cpu::MADTP_ISA {
namespace {

// Calls f with a null pointer to the element type.
template <class F>
MADTP_INLINE auto with_type(Type type, F&& f) {
  if (type == Type::bf16) return f(static_cast<bf16*>(nullptr));
  if (type == Type::f16) return f(static_cast<f16*>(nullptr));
  return f(static_cast<float*>(nullptr));
}

// Calls f with the product that takes this factor type.
template <class F>
MADTP_INLINE auto with_product(Factor factor, F&& f) {
#if defined(__AVX512BF16__) && !defined(__AMX_BF16__)
  if (factor == Factor::bf16) return f(ProductBF16{});
#endif
  (void)factor;
  return f(ProductF32{});
}

template <class Product>
constexpr Layout layout_for(int64_t block_queries, int64_t block_features) {
  return {Product::kRows, kLanes, Product::kDepthUnit, block_queries, block_features};
}

#define MADTP_TEXT(x) MADTP_TEXT_(x)
#define MADTP_TEXT_(x) #x

// With bfloat16 factors the source is bfloat16 too: other types are multiplied in float32.
CpuKernels make_table() {
  CpuKernels table;
  table.name = MADTP_TEXT(MADTP_ISA);
  table.lanes = kLanes;
  table.panel = kPanelVectors * kLanes;
  table.linear_panel = kLinearVectors * kLanes;
  table.layouts[static_cast<int>(Factor::f32)] = layout_for<ProductF32>(72, kFeatures);
#if defined(__AVX512BF16__)
  table.bf16_products = true;
  table.layouts[static_cast<int>(Factor::bf16)] = ProductBF16::kRows == 16 ? layout_for<ProductBF16>(32, 32) : layout_for<ProductBF16>(48, kFeatures);
#else
  table.bf16_products = false;
  table.layouts[static_cast<int>(Factor::bf16)] = {};
#endif

  table.load_rows = [](Factor factor, const RowsToLoad& rows, void* to, int64_t stride) {
#if defined(__AVX512BF16__)
    if (factor == Factor::bf16) return load_rows<bf16, ProductBF16>(rows, static_cast<bf16*>(to), stride);
#endif
    (void)factor;
    with_type(rows.type, [&]<class T>(T*) { load_rows<T, ProductF32>(rows, static_cast<float*>(to), stride); });
  };
  table.pack_transposed = [](Factor factor, const RowsToLoad& rows, int64_t first_column, int64_t columns, void* to) {
#if defined(__AVX512BF16__)
    if (factor == Factor::bf16) {
      return pack_transposed<bf16, ProductBF16>(rows, first_column, columns, static_cast<bf16*>(to));
    }
#endif
    (void)factor;
    with_type(rows.type, [&]<class T>(T*) {
      pack_transposed<T, ProductF32>(rows, first_column, columns, static_cast<float*>(to));
    });
  };
  table.pack = [](Factor factor, const RowsToLoad& rows, int64_t first_depth, int64_t depth, void* to) {
#if defined(__AVX512BF16__)
    if (factor == Factor::bf16) return pack_bf16(rows, first_depth, depth, static_cast<bf16*>(to));
#endif
    (void)factor;
    with_type(rows.type, [&]<class T>(T*) { pack_f32<T>(rows, first_depth, depth, static_cast<float*>(to)); });
  };

  table.product = [](Factor factor, const LeftRows& left, const void* right, int64_t columns, int64_t depth,
                     const float* bias, float* c, int64_t c_stride) {
#if defined(__AMX_BF16__)
    if (factor == Factor::bf16) return product_by_tiles(left, right, columns, depth, bias, c, c_stride);
#endif
    with_product(factor, [&]<class P>(P) { product<P>(left, right, columns, depth, 1.0f, bias, c, c_stride); });
  };
  table.product_maximum = [](Factor factor, const LeftRows& left, const void* panel, int64_t columns, int64_t depth,
                             float scale, const float* bias, const float* row_offset, float* best, int64_t best_stride) {
#if defined(__AMX_BF16__)
    if (factor == Factor::bf16) {
      return product_maximum_by_tiles(left, panel, columns, depth, scale, bias, row_offset, best, best_stride);
    }
#endif
    with_product(factor, [&]<class P>(P) {
      product_maximum<P>(left, panel, columns, depth, scale, bias, row_offset, best, best_stride);
    });
  };
  table.exp_column_sums = [](const float* x, int64_t stride, int64_t rows, int64_t columns, int64_t visible,
                              float* sums) { exp_column_sums(x, stride, rows, columns, visible, sums); };

  table.attend = [](Factor factor, const AttentionBlock& block) {
#if defined(__AMX_BF16__)
    if (factor == Factor::bf16) return attend_by_tiles(block);
#elif defined(__AVX512BF16__)
    if (factor == Factor::bf16) return attend<ProductBF16, bf16>(block);
#endif
    (void)factor;
    with_type(block.queries.type, [&]<class T>(T*) { attend<ProductF32, T>(block); });
  };
  table.scratch_bytes = [](Factor factor, int64_t rows, int64_t length, int64_t head_dim) {
#if defined(__AMX_BF16__)
    if (factor == Factor::bf16) return TileScratch::of(rows, length, head_dim).total;
#endif
    (void)factor;
    return AttendScratch::of(rows, length, head_dim).total;
  };
  table.best_bytes = [](Factor factor, int64_t rows, int64_t length) {
#if defined(__AMX_BF16__)
    if (factor == Factor::bf16) return tiles_of(rows, kTile) * strip_floats(length) * 4;
#endif
    (void)factor;
    return rows * logits_stride(length) * 4;
  };
  table.best_column_sums = [](Factor factor, const float* best, int64_t first_row, int64_t rows, int64_t length,
                              float* sums) {
#if defined(__AMX_BF16__)
    if (factor == Factor::bf16) return best_column_sums_by_tiles(best, first_row, rows, length, sums);
#endif
    (void)factor;
    const int64_t stride = logits_stride(length);
    exp_column_sums(best + first_row * stride, stride, rows - first_row, length, length, sums);
  };
  table.attention_gradient = [](const AttentionGradientBlock& block) {
#if defined(__AMX_BF16__)
    if (block.q.type == Type::bf16) return attention_gradient_by_tiles(block);
#endif
    with_type(block.q.type, [&]<class T>(T*) { attention_gradient<T>(block); });
  };
  table.attention_gradient_bytes = [](Type type, int64_t queries, int64_t head_dim) {
#if defined(__AMX_BF16__)
    if (type == Type::bf16) return TileGradientScratch::of(queries, head_dim).total;
#endif
    (void)type;
    return GradientScratch::of(queries, head_dim).total;
  };
  table.importance_gradient = [](const ImportanceGradientBlock& block) {
    with_type(block.q.type, [&]<class T>(T*) { ImportanceGradient<T>(block).run(); });
  };
  table.importance_gradient_bytes = [](int64_t heads, int64_t length, int64_t head_dim) {
    return ImportanceGradientScratch::of(heads, length, head_dim).total;
  };
  table.norm_weighted_mean = [](Type type, const void* out, int64_t head_stride, int64_t heads, int64_t head_dim,
                                const float* p, int64_t p_stride) {
    return with_type(type, [&]<class T>(T*) {
      return norm_weighted_mean(static_cast<const T*>(out), head_stride, heads, head_dim, p, p_stride);
    });
  };

  table.linear = [](Factor factor, const LinearBlock& block) {
#if defined(__AMX_BF16__)
    if (factor == Factor::bf16) return linear_by_tiles(block);
#elif defined(__AVX512BF16__)
    if (factor == Factor::bf16) return linear<ProductBF16, bf16>(block);
#endif
    (void)factor;
    with_type(block.type, [&]<class T>(T*) { linear<ProductF32, T>(block); });
  };

  table.score = [](const ScoreBlock& block) { score(block); };
  table.accumulate_row = [](Type type, const void* row, float weight, float* sums, int64_t size) {
    with_type(type, [&]<class T>(T*) { accumulate_row(static_cast<const T*>(row), weight, sums, size); });
  };
  table.store_scaled = [](Type type, const float* sums, float scale, void* row, int64_t size) {
    with_type(type, [&]<class T>(T*) { store_scaled(sums, scale, static_cast<T*>(row), size); });
  };
  table.layer_norm = [](Type type, const void* row, const float* weight, const float* bias, float eps, void* out,
                        int64_t size) {
    with_type(type, [&]<class T>(T*) {
      layer_norm(static_cast<const T*>(row), weight, bias, eps, static_cast<T*>(out), size);
    });
  };

  table.sum_of_squares = [](Type type, const void* row, int64_t size) {
    return with_type(type, [&]<class T>(T*) { return sum_of_squares(static_cast<const T*>(row), size); });
  };
  table.best_scaled = [](const float* x, const float* scale, int64_t size, float* best) {
    return best_scaled(x, scale, size, best);
  };
  return table;
}

}  // namespace
}  // namespace madtp::cpu::MADTP_ISA
