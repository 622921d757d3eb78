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

#include "cpu_importance_sums.h"
#include "ops.h"

namespace madtp::cpu {

std::tuple<Tensor, Tensor> attention_importance(const Tensor& q, const Tensor& k, const Tensor& out, const Tensor& lse,
                                                const Tensor& cu_seqlens, int64_t, double scale, bool causal,
                                                const OptionalTensor& key_bias) {
  const CpuKernels& kernels = cpu_kernels();
  const HeadRows queries("q", q), keys("k", k), outputs("out", out);
  const Offsets offsets(cu_seqlens);
  const Tensor lse_dense = lse.contiguous();
  const float* const lse_data = lse_dense.const_data_ptr<float>();
  const PackedKeys packed(kernels, keys, nullptr, offsets, key_bias);
  const ImportanceSums sums(kernels, offsets, queries.heads, q.size(0));

  const Factor factor = factor_of(kernels, queries.type);
  const int64_t heads = queries.heads, depth = round_up(queries.head_dim, 2);
  const float log2_scale = static_cast<float>(scale * 1.4426950408889634);
  const int64_t left_bytes = sums.most_rows() * depth * factor_bytes(factor);
  const auto& chunks = sums.chunks();

  share_items(static_cast<int64_t>(chunks.size()), [&](const auto& next) {
    const Buffer left(heads * left_bytes), offset(heads * sums.most_rows() * 4),
        tile(sums.most_rows() * kernels.panel * 4);
    for (size_t item = next(); item < chunks.size(); item = next()) {
      const auto& [b, first_block, last_block, received] = chunks[item];
      const Blocks& blocks = sums.blocks(b);
      const int64_t start = offsets.start(b), length = offsets.length(b);
      std::fill_n(received, length, 0.0f);
      for (int64_t block = first_block; block < last_block; ++block) {
        const int64_t first = blocks.first(block), rows = blocks.size(block), stride = sums.most_rows();
        for (int64_t head = 0; head < heads; ++head) {
          kernels.load_rows(factor, queries.rows(start + first, rows, head), left.at(head * left_bytes), depth);
          float* const head_offset = offset.at<float>(head * stride * 4);
          for (int64_t r = 0; r < round_up(rows, kernels.tile_rows); ++r) {
            const float value = r < rows ? lse_data[head * lse_dense.size(1) + start + first + r] : 0.0f;
            // A query that sees nothing gives nothing: s - inf.
            head_offset[r] = value == -std::numeric_limits<float>::infinity()
                                 ? std::numeric_limits<float>::infinity()
                                 : static_cast<float>(value * 1.4426950408889634);
          }
        }
        const int64_t visible = causal ? first + 1 : length;
        for (int64_t column = 0; column < std::min(visible + rows - 1, length); column += kernels.panel) {
          const int64_t columns = std::min(kernels.panel, length - column);
          const auto product = [&](int64_t head, int64_t tile_rows) {
            kernels.product_maximum(factor, {left.at(head * left_bytes), depth, tile_rows},
                                    static_cast<const std::byte*>(packed.keys(b, head)) +
                                        column / kernels.panel * packed.panel_bytes(),
                                    columns, queries.head_dim, log2_scale, packed.bias(b) + column,
                                    offset.at<float>(head * stride * 4), tile.at<float>(), kernels.panel);
          };
          const auto clear = [&](int64_t tile_rows) {
            std::fill_n(tile.at<float>(), round_up(tile_rows, kernels.tile_rows) * kernels.panel,
                        -std::numeric_limits<float>::infinity());
          };
          if (first == 0) {  // token 0, whose probabilities are wanted head by head
            for (int64_t head = 0; head < heads; ++head) {
              clear(1);
              product(head, 1);
              float* const weights = sums.first_weights(b, head) + column;
              std::fill_n(weights, columns, 0.0f);
              kernels.exp2_column_sums(tile.at<float>(), kernels.panel, 1, columns, visible - column, weights);
            }
          }
          clear(rows);
          for (int64_t head = 0; head < heads; ++head) product(head, rows);
          if (first == 0) std::fill_n(tile.at<float>(), columns, -std::numeric_limits<float>::infinity());
          kernels.exp2_column_sums(tile.at<float>(), kernels.panel, rows, columns, visible - column, received + column);
        }
        // A causal token 0 sees itself only.
        if (first == 0 && causal) {
          const int64_t done = std::min(round_up(std::min(visible + rows - 1, length), kernels.panel), length);
          for (int64_t head = 0; head < heads; ++head) {
            std::fill_n(sums.first_weights(b, head) + done, length - done, 0.0f);
          }
        }
      }
    }
  });
  return sums.finish(outputs);
}

}  // namespace madtp::cpu
