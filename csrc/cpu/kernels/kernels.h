// The table of vectorised block kernels, one per instruction set, and the choice made at run time.
//
// The kernels are compiled once per instruction set (avx512bf16.cpp, ...) from the same templates, know raw pointers
// only and work on one block: threads, offsets and memory belong to the operations (cpu/ops). Nothing here may
// define a function with external linkage in a header: it would be compiled with several instruction sets, and the linker
// keeps an arbitrary one.
#pragma once

#include <cstddef>
#include <cstdint>

namespace madtp::cpu {

// Element type of a tensor in memory.
enum class Type : int { f32, bf16, f16 };

// Type in which factors enter a matrix product. Sums are float32 always.
enum class Factor : int { f32, bf16 };

struct RowsToLoad {
  const void* source;  // [rows, depth] of `type`
  Type type;
  int64_t stride;  // elements between rows
  int64_t rows;
  int64_t depth;
};

// Left operand: `rows` rows (whole layout.rows in memory) of `stride` elements.
struct LeftRows {
  const void* data;
  int64_t stride;
  int64_t rows;
};

// How the products of a factor want their operands padded (with zeros): to multiples of these.
struct Layout {
  int64_t rows;        // of left operands
  int64_t columns;     // of packed right operands
  int64_t depth;       // of both
  // Not padding: at most so many queries in a block of attention, features in one of a linear layer.
  int64_t block_queries, block_features;
};

// A block of one sample's queries, head after head.
struct AttentionBlock {
  RowsToLoad queries;   // of the first head
  int64_t head_bytes;   // between the heads of a query
  int64_t heads;
  const void* keys;     // packed, of the first head
  int64_t keys_bytes;   // between heads
  const void* values;
  int64_t values_bytes;
  const float* bias;    // [length], padded to whole vectors
  bool biased;          // else the bias is zero
  int64_t length;       // keys of the sample
  int64_t columns;      // the first keys, whole panels or all: later ones are not looked at
  int64_t visible;      // row r sees the first visible + r keys
  float scale;
  void* out;            // [rows, heads, head_dim] of the queries' type
  int64_t out_stride;   // elements between rows
  float* lse;           // [heads, lse_stride]: the natural log-sum-exp
  int64_t lse_stride;
  // Where importance is wanted, else null: the maximum over heads of s - lse, in a layout that best_column_sums knows, and the
  // probabilities of the first row, [heads, first_stride].
  float* best;
  float* first_weights;
  int64_t first_stride;
  std::byte* scratch;
};

// One head of one sample, for the gradients of attention.
struct AttentionGradientBlock {
  RowsToLoad q, out, d_out;  // [queries, head_dim]
  RowsToLoad k, v;           // [keys, head_dim]
  const float* lse;          // [queries]
  const float* d_lse;        // [queries]
  const float* bias;         // [keys] or null
  int64_t ahead;             // query i sees the keys j <= i + ahead
  float scale;
  void* d_q;  // out, like d_k and d_v of the type of q, with d_stride elements between rows
  void* d_k;
  void* d_v;
  int64_t d_stride;
  float* d_bias;  // [keys] out, or null
  std::byte* scratch;
};

// One sample, for the gradients of attention's importance. Heads lie `.._head_bytes` apart; of the gradients, head_dim elements.
struct ImportanceGradientBlock {
  RowsToLoad q, k, out;  // [length, head_dim] of the first head
  int64_t q_head_bytes, k_head_bytes, out_head_bytes;
  int64_t heads;
  const float* lse;  // [heads, lse_stride]
  float* d_lse;      // out
  int64_t lse_stride;
  const float* bias;        // [length] or null
  const float* d_received;  // [length]
  const float* d_cls;       // [length]
  bool causal;
  float scale;
  void* d_q;  // out, like d_k and d_out of the type of q, with d_stride elements between rows
  void* d_k;
  void* d_out;
  int64_t d_stride;
  float* d_bias;  // [length] out, or null
  std::byte* scratch;
};

struct ScoreBlock {
  const float* alignment;  // [rows, stride]
  int64_t stride;
  int64_t rows;
  int64_t columns;        // M
  float factor;           // log2(e) / temperature
  const float* received;  // [rows]
  const float* cls;       // [rows]
  float* best;            // [rows] out: max_m alignment
  float* state;           // [5, stride] running: column maximum m; sums of w, w received, w best, w cls; w = e^((G - m)/t)
};

enum class Activation : int { none, gelu, gelu_tanh, quick_gelu, silu };

// activation(weight x tokens + bias) + residual for some output features and any number of tokens.
struct LinearBlock {
  const void* weight;  // [features, weight_stride] of the factor type, a left operand
  int64_t weight_stride;
  int64_t features;   // at most layout.block_features
  const void* packed;  // the tokens, packed panel by panel as the columns of a right operand
  int64_t tokens;
  int64_t depth;
  const float* bias;  // [features] up to whole vectors, or null
  Activation activation;
  Type type;             // of residual and out
  const void* residual;  // [tokens, residual_stride] or null
  int64_t residual_stride;
  void* out;  // [tokens, out_stride]
  int64_t out_stride;
  const void* next_weight;  // as many rows as a whole block that will be needed soon, or null
};

struct CpuKernels {
  const char* name;
  int64_t lanes;      // floats in a vector
  int64_t panel;  // columns in a packed panel (the last panel may be narrower: whole vectors only)
  int64_t linear_panel;  // tokens in a panel of a linear layer, packed on its own
  bool bf16_products;
  Layout layouts[2];  // by factor

  // Copies rows into a left operand, converted and zero padded to whole layout.rows and to `stride` columns.
  void (*load_rows)(Factor, const RowsToLoad&, void* to, int64_t stride);
  // Packs part of a right operand R[depth, columns] of packed_size(columns, depth) elements: the columns from first_column on,
  // a multiple of the lanes, each a source row (K, a dictionary); or the depths from first_depth on, even, each a source
  // row (V).
  void (*pack_transposed)(Factor, const RowsToLoad&, int64_t first_column, int64_t columns, void* to);
  void (*pack)(Factor, const RowsToLoad&, int64_t first_depth, int64_t depth, void* to);

  // c = left right + bias (a vector per column, whole vectors). c has rows up to whole layout.rows.
  void (*product)(Factor, const LeftRows&, const void* right, int64_t columns, int64_t depth, const float* bias, float* c,
                  int64_t c_stride);
  // best = max(best, scale * left right + bias - row_offset) for the columns of one panel.
  void (*product_maximum)(Factor, const LeftRows&, const void* panel, int64_t columns, int64_t depth, float scale,
                          const float* bias, const float* row_offset, float* best, int64_t best_stride);
  // sums[c] += sum_r e^x[r, c], where row r counts the first visible + r columns only.
  void (*exp_column_sums)(const float* x, int64_t stride, int64_t rows, int64_t columns, int64_t visible, float* sums);

  void (*attend)(Factor, const AttentionBlock&);
  // Working memory of such a block, and of its `best`, in bytes.
  int64_t (*scratch_bytes)(Factor, int64_t rows, int64_t length, int64_t head_dim);
  int64_t (*best_bytes)(Factor, int64_t rows, int64_t length);
  // sums[c] += sum_r e^best[r, c] over the rows [first_row, rows) of a block's `best`.
  void (*best_column_sums)(Factor, const float* best, int64_t first_row, int64_t rows, int64_t length, float* sums);

  void (*attention_gradient)(const AttentionGradientBlock&);
  // Working memory of such a block, in bytes.
  int64_t (*attention_gradient_bytes)(Type, int64_t queries, int64_t head_dim);
  void (*importance_gradient)(const ImportanceGradientBlock&);
  int64_t (*importance_gradient_bytes)(int64_t heads, int64_t length, int64_t head_dim);

  // cls = sum_h p[h] |out_h| / (sum_h |out_h| + 1e-8) of one token; p is strided by p_stride.
  float (*norm_weighted_mean)(Type, const void* out, int64_t head_stride, int64_t heads, int64_t head_dim,
                              const float* p, int64_t p_stride);

  void (*linear)(Factor, const LinearBlock&);

  void (*score)(const ScoreBlock&);

  void (*accumulate_row)(Type, const void* row, float weight, float* sums, int64_t size);  // sums += weight * row
  void (*store_scaled)(Type, const float* sums, float scale, void* row, int64_t size);     // row = scale * sums
  void (*layer_norm)(Type, const void* row, const float* weight, const float* bias, float eps, void* out, int64_t size);

  float (*sum_of_squares)(Type, const void* row, int64_t size);
  // Raises *best to the largest x[i] * scale[i] and returns the first i that attains it; -1 if none is above *best.
  int64_t (*best_scaled)(const float* x, const float* scale, int64_t size, float* best);
};

// The best table that this processor can run.
const CpuKernels& cpu_kernels();

static inline int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

static inline const Layout& layout_of(const CpuKernels& kernels, Factor factor) {
  return kernels.layouts[static_cast<int>(factor)];
}

// Elements of a packed right operand.
static inline int64_t packed_size(const Layout& layout, int64_t columns, int64_t depth) {
  return round_up(columns, layout.columns) * round_up(depth, layout.depth);
}

}  // namespace madtp::cpu
