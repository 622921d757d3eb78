// The attention terms of MADTP's token importance.
//
//   P[h, i, j] = exp(scale * <q_hi, k_hj> + key_bias_j - lse[h, i])
//   received_j = sum_{i >= 1} max_h P[h, i, j]
//   cls_j = sum_h P[h, 0, j] |out_hj| / (sum_h |out_hj| + 1e-8)          both for j >= 1, and 0 for token 0
//
// The maximum is taken before the exponential, max_h exp(s_h - lse_h) = exp(max_h (s_h - lse_h)), so that nearly all the work
// is the matrix product: the heads pass one after the other over a tile of queries and keys that stays in the first-level
// cache.
#include <limits>

#include "cpu/ops/importance_sums.h"
#include "cpu/ops/ops.h"

namespace madtp::cpu {

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

struct ImportanceCall {
  const CpuKernels& kernels;
  const HeadRows& q;
  const Offsets& offsets;
  const PackedKeys& packed;
  const ImportanceSums& sums;
  const Tensor& lse;  // [H, C] contiguous
  float scale;
  bool causal;

  Factor factor() const { return factor_of(kernels, q.type); }
  const Layout& layout() const { return layout_of(kernels, factor()); }

  // A thread's memory for blocks of up to `rows` queries: all heads' queries and their log-sum-exp, and one tile.
  struct Scratch {
    Scratch(const ImportanceCall& call, int64_t rows)
        : queries_stride(rows * round_up(call.q.head_dim, call.layout().depth) * 4),
          lse_stride(rows * 4),
          queries(call.q.heads * queries_stride),
          lse(call.q.heads * lse_stride),
          tile_memory(rows * call.kernels.panel * 4),
          tile(tile_memory.at<float>()) {}
    int64_t queries_stride, lse_stride;
    Buffer queries, lse, tile_memory;
    float* tile;
  };

  struct Block {
    int64_t b, first, rows;  // queries [first, first + rows) of sample b
  };

  void load(const Scratch& scratch, const Block& block) const;
  // Running maximum over `head` of s - lse, in the tile of the block's first `rows` queries and the panel from `column` on.
  void maximum(const Scratch& scratch, const Block& block, int64_t rows, int64_t column, int64_t head) const;
  void run(const Scratch& scratch, const Block& block, float* received) const;
};

void ImportanceCall::load(const Scratch& scratch, const Block& block) const {
  const int64_t row = offsets.start(block.b) + block.first;
  for (int64_t head = 0; head < q.heads; ++head) {
    if (head + 1 < q.heads) q.prefetch(row, block.rows, head + 1);
    kernels.load_rows(factor(), q.rows(row, block.rows, head), scratch.queries.at(head * scratch.queries_stride),
                      round_up(q.head_dim, layout().depth));
    const float* const from = lse.const_data_ptr<float>() + head * lse.size(1) + row;
    float* const to = scratch.lse.at<float>(head * scratch.lse_stride);
    // A query that sees nothing gives nothing: s - inf.
    for (int64_t r = 0; r < block.rows; ++r) to[r] = from[r] == -kInfinity ? kInfinity : from[r];
    std::fill(to + block.rows, to + round_up(block.rows, layout().rows), 0.0f);
  }
}

void ImportanceCall::maximum(const Scratch& scratch, const Block& block, int64_t rows, int64_t column,
                             int64_t head) const {
  const int64_t columns = std::min(kernels.panel, offsets.length(block.b) - column);
  const auto* const panel = static_cast<const std::byte*>(packed.keys(block.b, head)) +
                            column / kernels.panel * packed.panel_bytes();
  kernels.product_maximum(factor(),
                          {scratch.queries.at(head * scratch.queries_stride), round_up(q.head_dim, layout().depth), rows},
                          panel, columns, q.head_dim, scale, packed.bias(block.b) + column,
                          scratch.lse.at<float>(head * scratch.lse_stride), scratch.tile, kernels.panel);
}

void ImportanceCall::run(const Scratch& scratch, const Block& block, float* received) const {
  const auto [b, first, rows] = block;
  const int64_t length = offsets.length(b), panel = kernels.panel;
  const int64_t visible = causal ? first + 1 : length;  // to the first query
  const int64_t visible_to_last = std::min(visible + rows - 1, length);
  load(scratch, block);
  for (int64_t column = 0; column < length; column += panel) {
    const int64_t columns = std::min(panel, length - column);
    if (first == 0) {  // token 0: its probabilities are wanted head by head
      for (int64_t head = 0; head < q.heads; ++head) {
        float* const weights = sums.first_weights(b, head) + column;
        std::fill_n(weights, columns, 0.0f);
        if (column >= visible) continue;
        std::fill_n(scratch.tile, layout().rows * panel, -kInfinity);
        maximum(scratch, block, 1, column, head);
        kernels.exp_column_sums(scratch.tile, panel, 1, columns, visible - column, weights);
      }
    }
    if (column >= visible_to_last) continue;
    std::fill_n(scratch.tile, round_up(rows, layout().rows) * panel, -kInfinity);
    for (int64_t head = 0; head < q.heads; ++head) maximum(scratch, block, rows, column, head);
    if (first == 0) std::fill_n(scratch.tile, panel, -kInfinity);
    kernels.exp_column_sums(scratch.tile, panel, rows, columns, visible - column, received + column);
  }
}

}  // namespace

std::tuple<Tensor, Tensor> attention_importance(const Tensor& q, const Tensor& k, const Tensor& out, const Tensor& lse,
                                                const Tensor& cu_seqlens, int64_t, double scale, bool causal,
                                                const OptionalTensor& key_bias) {
  const CpuKernels& kernels = cpu_kernels();
  const HeadRows queries("q", q), keys("k", k), outputs("out", out);
  const Offsets offsets("cu_seqlens", cu_seqlens, q.size(0));
  check_operand("k", k, q.sizes(), q.scalar_type());
  check_operand("out", out, q.sizes(), q.scalar_type());
  check_operand("lse", lse, {q.size(1), q.size(0)}, at::kFloat);
  check_operand("key_bias", key_bias, {q.size(0)}, at::kFloat);
  const Tensor lse_dense = lse.contiguous();
  const Layout& layout = layout_of(kernels, factor_of(kernels, queries.type));
  const ImportanceSums sums(kernels, layout, offsets, queries.heads, q.size(0));

  for (const auto& samples : sample_groups(kernels, keys, offsets)) {
    const PackedKeys packed(kernels, keys, nullptr, offsets, key_bias, samples, causal);
    const ImportanceCall call{kernels, queries, offsets, packed, sums, lse_dense,
                              static_cast<float>(scale), causal};
    const auto chunks = sums.chunks(samples);
    share_items(static_cast<int64_t>(chunks.size()), [&](const auto& next) {
      const ImportanceCall::Scratch scratch(call, sums.most_rows(samples));
      for (size_t item = next(); item < chunks.size(); item = next()) {
        const auto& [b, first_block, last_block, received] = chunks[item];
        const Blocks& blocks = sums.blocks(b);
        std::fill_n(received, offsets.length(b), 0.0f);
        for (int64_t block = first_block; block < last_block; ++block) {
          call.run(scratch, {b, blocks.first(block), blocks.size(block)}, received);
          if (causal) sums.spread_nan(lse_dense, b, blocks.first(block), blocks.size(block), received);
        }
      }
    });
  }
  return sums.finish(outputs);
}

}  // namespace madtp::cpu
