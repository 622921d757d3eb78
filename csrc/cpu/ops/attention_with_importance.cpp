// Self-attention and its importance in one pass.
//
// attention.cpp and importance.cpp say what is computed. Alone, importance has to recompute the logits from the log-sum-exp.
// Here a work item takes a block of queries through all heads, and updates the running maximum of s - lse while the logits are
// at hand: a third of the matrix products falls away, and no more than one block of probabilities exists at a time.
#include <ATen/ops/empty.h>

#include "cpu/ops/attention_block.h"
#include "cpu/ops/importance_sums.h"
#include "cpu/ops/ops.h"

namespace madtp::cpu {

std::tuple<Tensor, Tensor, Tensor, Tensor> attention_with_importance(const Tensor& q, const Tensor& k, const Tensor& v,
                                                                     const Tensor& cu_seqlens, int64_t, double scale,
                                                                     bool causal, const OptionalTensor& key_bias) {
  const CpuKernels& kernels = cpu_kernels();
  const HeadRows queries("q", q), keys("k", k), values("v", v);
  const Offsets offsets("cu_seqlens", cu_seqlens, q.size(0));
  check_operand("k", k, q.sizes(), q.scalar_type());
  check_operand("v", v, q.sizes(), q.scalar_type());
  check_operand("key_bias", key_bias, {q.size(0)}, at::kFloat);
  Tensor out = empty_result(q.sizes(), q.options());
  Tensor lse = at::empty({q.size(1), q.size(0)}, q.options().dtype(at::kFloat));
  const Factor factor = factor_of(kernels, queries.type);
  const ImportanceSums sums(kernels, layout_of(kernels, factor), offsets, queries.heads, q.size(0));

  for (const auto& samples : sample_groups(kernels, keys, offsets)) {
    const PackedKeys packed(kernels, keys, &values, offsets, key_bias, samples, causal);
    const AttentionCall call{kernels, queries, offsets, offsets, packed, static_cast<float>(scale),
                             causal,  out,     lse};
    const auto chunks = sums.chunks(samples);
    int64_t scratch_bytes = 0, best_bytes = 0;
    for (const int64_t b : samples) {
      const int64_t rows = sums.blocks(b).rows, length = offsets.length(b);
      scratch_bytes = std::max(scratch_bytes, call.scratch_bytes(rows, length));
      best_bytes = std::max(best_bytes, kernels.best_bytes(factor, rows, length));
    }
    share_items(static_cast<int64_t>(chunks.size()), [&](const auto& next) {
      const Buffer scratch(scratch_bytes), best(best_bytes);
      for (size_t item = next(); item < chunks.size(); item = next()) {
        const auto& [b, first_block, last_block, received] = chunks[item];
        const Blocks& blocks = sums.blocks(b);
        std::fill_n(received, offsets.length(b), 0.0f);
        for (int64_t block = first_block; block < last_block; ++block) {
          const int64_t first = blocks.first(block), rows = blocks.size(block);
          float* const first_weights = first == 0 ? sums.first_weights(b, 0) : nullptr;
          call.run({b, first, rows, 0, queries.heads}, {best.at<float>(), first_weights, offsets.total()}, scratch);
          // Token 0 gives nothing.
          kernels.best_column_sums(factor, best.at<float>(), first == 0 ? 1 : 0, rows, offsets.length(b), received);
          if (causal) sums.spread_nan(lse, b, first, rows, received);
        }
      }
    });
  }
  const auto [received, cls] = sums.finish(HeadRows("out", out));
  return {out, lse, received, cls};
}

}  // namespace madtp::cpu
