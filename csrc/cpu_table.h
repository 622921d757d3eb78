// Fills a CpuKernels table with the kernels of the instruction set the including file is compiled for. Define MADTP_ISA (the
// namespace and the name) first.
#pragma once

#include "cpu_alike.h"
#include "cpu_gemm.h"
#include "cpu_kernels.h"
#include "cpu_pack.h"
#include "cpu_score.h"
#include "cpu_softmax.h"

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
#if defined(__AVX512BF16__)
  if (factor == Factor::bf16) return f(ProductBF16{});
#endif
  (void)factor;
  return f(ProductF32{});
}

#define MADTP_TEXT(x) MADTP_TEXT_(x)
#define MADTP_TEXT_(x) #x

// With bfloat16 factors the source is bfloat16 too: other types are multiplied in float32.
CpuKernels make_table() {
  CpuKernels table;
  table.name = MADTP_TEXT(MADTP_ISA);
  table.lanes = kLanes;
  table.panel = kPanelVectors * kLanes;
  table.tile_rows = kTileRows;
#if defined(__AVX512BF16__)
  table.bf16_products = true;
#else
  table.bf16_products = false;
#endif

  table.load_rows = [](Factor factor, const RowsToLoad& rows, void* to, int64_t stride) {
#if defined(__AVX512BF16__)
    if (factor == Factor::bf16) return load_rows<bf16>(rows, static_cast<bf16*>(to), stride);
#endif
    (void)factor;
    with_type(rows.type, [&]<class T>(T*) { load_rows<T>(rows, static_cast<float*>(to), stride); });
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

  table.product = [](Factor factor, const LeftRows& left, const void* right, int64_t columns, int64_t depth, float scale,
                     const float* bias, float* c, int64_t c_stride) {
    with_product(factor, [&]<class P>(P) { product<P>(left, right, columns, depth, scale, bias, c, c_stride); });
  };
  table.scaled_product = [](Factor factor, const LeftRows& left, const void* right, int64_t columns, int64_t depth,
                            int64_t packed_depth, const float* row_scale, Type type, void* out, int64_t out_stride) {
    with_product(factor, [&]<class P>(P) {
      with_type(type, [&]<class T>(T*) {
        scaled_product<P>(left, right, columns, depth, packed_depth, row_scale, static_cast<T*>(out), out_stride);
      });
    });
  };
  table.product_maximum = [](Factor factor, const LeftRows& left, const void* panel, int64_t columns, int64_t depth,
                             float scale, const float* bias, const float* row_offset, float* best, int64_t best_stride) {
    with_product(factor, [&]<class P>(P) {
      product_maximum<P>(left, panel, columns, depth, scale, bias, row_offset, best, best_stride);
    });
  };

  table.softmax = [](Factor factor, const SoftmaxBlock& block) {
    with_product(factor, [&]<class P>(P) { softmax<typename P::element>(block); });
  };
  table.exp_column_sums = [](const float* x, int64_t stride, int64_t rows, int64_t columns, int64_t visible,
                              float* sums) { exp_column_sums(x, stride, rows, columns, visible, sums); };
  table.norm_weighted_mean = [](Type type, const void* out, int64_t head_stride, int64_t heads, int64_t head_dim,
                                const float* p, int64_t p_stride) {
    return with_type(type, [&]<class T>(T*) {
      return norm_weighted_mean(static_cast<const T*>(out), head_stride, heads, head_dim, p, p_stride);
    });
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
