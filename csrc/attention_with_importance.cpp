// Self-attention and its importance in one pass.
//
// attention.cpp and importance.cpp say what is computed. Alone, importance has to recompute the logits from the log-sum-exp.
// Here a work item takes a block of queries through all heads, and after each head's softmax updates the running maximum of
// s - lse while the logits are at hand: a third of the matrix products falls away, and no more than one block of
// probabilities exists at a time.
#include <ATen/ops/empty.h>

#include <limits>

#include "cpu_attention_block.h"
#include "cpu_importance_sums.h"
#include "ops.h"

namespace madtp::cpu {

std::tuple<Tensor, Tensor, Tensor, Tensor> attention_with_importance(const Tensor& q, const Tensor& k, const Tensor& v,
                                                                     const Tensor& cu_seqlens, int64_t, double scale,
                                                                     bool causal, const OptionalTensor& key_bias) {
  const CpuKernels& kernels = cpu_kernels();
  const HeadRows queries("q", q), keys("k", k), values("v", v);
  const Offsets offsets(cu_seqlens);
  Tensor out = at::empty(q.sizes(), q.options());
  Tensor lse = at::empty({q.size(1), q.size(0)}, q.options().dtype(at::kFloat));
  const ImportanceSums sums(kernels, offsets, queries.heads, q.size(0));

  for (const auto& samples : sample_groups(kernels, keys, offsets)) {
    const PackedKeys packed(kernels, keys, &values, offsets, key_bias, samples);
    const AttentionCall call{kernels, queries, offsets, offsets, packed, static_cast<float>(scale),
                             causal,  out,     lse};
    const auto chunks = sums.chunks(samples);
    const int64_t rows_most = sums.most_rows(samples), columns = call.stride(samples.front());
    share_items(static_cast<int64_t>(chunks.size()), [&](const auto& next) {
      const AttentionCall::Scratch scratch(call, rows_most, columns);
      const Buffer memory(rows_most * columns * 4);
      float* const best = memory.at<float>();
      for (size_t item = next(); item < chunks.size(); item = next()) {
        const auto& [b, first_block, last_block, received] = chunks[item];
        const Blocks& blocks = sums.blocks(b);
        const int64_t length = offsets.length(b), width = call.stride(b);
        std::fill_n(received, length, 0.0f);
        for (int64_t block = first_block; block < last_block; ++block) {
          const int64_t first = blocks.first(block), rows = blocks.size(block);
          std::fill_n(best, rows * width, -std::numeric_limits<float>::infinity());
          for (int64_t head = 0; head < queries.heads; ++head) {
            const AttentionCall::Block now{b, head, first, rows}, following{b, head + 1, first, rows};
            call.run(scratch, now, head + 1 < queries.heads ? &following : nullptr, best,
                     first == 0 ? sums.first_weights(b, head) : nullptr);
          }
          kernels.exp_column_sums(best, width, rows, length, length, received);
        }
      }
    });
  }
  const auto [received, cls] = sums.finish(HeadRows("out", out));
  return {out, lse, received, cls};
}

}  // namespace madtp::cpu
