// Ragged attention.
//
//   s[h, i, j] = scale * <q_hi, k_hj> + key_bias_j      lse[h, i] = log sum_j exp s[h, i, j]
//   out[i, h] = sum_j exp(s[h, i, j] - lse[h, i]) v_hj
//
// Keys and values are packed once; a work item is a block of queries of one sample and head. A block's rows of logits are
// complete and stay in the second-level cache, so the softmax needs no rescaling.
#include <ATen/ops/empty.h>

#include "cpu_attention_block.h"
#include "ops.h"

namespace madtp::cpu {

std::tuple<Tensor, Tensor> attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cu_seqlens_q,
                                     const Tensor& cu_seqlens_k, int64_t, int64_t, double scale, bool causal,
                                     const OptionalTensor& key_bias) {
  const CpuKernels& kernels = cpu_kernels();
  const HeadRows queries("q", q), keys("k", k), values("v", v);
  const Offsets offsets_q(cu_seqlens_q), offsets_k(cu_seqlens_k);
  Tensor out = at::empty(q.sizes(), q.options());
  Tensor lse = at::empty({q.size(1), q.size(0)}, q.options().dtype(at::kFloat));
  for (const auto& samples : sample_groups(kernels, keys, offsets_k)) {
    const PackedKeys packed(kernels, keys, &values, offsets_k, key_bias, samples);
    const AttentionCall call{kernels,   queries, offsets_q, offsets_k, packed, static_cast<float>(scale),
                             causal, out,     lse};
    std::vector<AttentionCall::Block> items;
    int64_t most_rows = 0, most_columns = 0;
    for (const int64_t b : samples) {
      const Blocks blocks(kernels, offsets_q.length(b), offsets_k.length(b), 1);
      if (blocks.count == 0) continue;
      most_rows = std::max(most_rows, blocks.rows);
      most_columns = std::max(most_columns, call.stride(b));
      for (int64_t head = 0; head < queries.heads; ++head) {
        for (int64_t block = 0; block < blocks.count; ++block) {
          items.push_back({b, head, blocks.first(block), blocks.size(block)});
        }
      }
    }
    share_items(static_cast<int64_t>(items.size()), [&](const auto& next) {
      const AttentionCall::Scratch scratch(call, most_rows, most_columns);
      for (size_t item = next(); item < items.size(); item = next()) {
        // Another thread may take the next item; then the queries asked for were wasted.
        call.run(scratch, items[item], item + 1 < items.size() ? &items[item + 1] : nullptr, nullptr, nullptr);
      }
    });
  }
  return {out, lse};
}

}  // namespace madtp::cpu
