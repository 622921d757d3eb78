// Ragged attention.
//
//   s[h, i, j] = scale * <q_hi, k_hj> + key_bias_j      lse[h, i] = log sum_j exp s[h, i, j]
//   out[i, h] = sum_j exp(s[h, i, j] - lse[h, i]) v_hj
//
// Keys and values are packed once; a work item is a block of queries of one sample and head. A block's rows of logits are
// complete and stay in the second-level cache, so the softmax needs no rescaling.
#include <ATen/ops/empty.h>

#include "cpu/ops/attention_block.h"
#include "cpu/ops/ops.h"

namespace madtp::cpu {

std::tuple<Tensor, Tensor> attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cu_seqlens_q,
                                     const Tensor& cu_seqlens_k, int64_t, int64_t, double scale, bool causal,
                                     const OptionalTensor& key_bias) {
  const CpuKernels& kernels = cpu_kernels();
  const HeadRows queries("q", q), keys("k", k), values("v", v);
  const Offsets offsets_q("cu_seqlens_q", cu_seqlens_q, q.size(0)), offsets_k("cu_seqlens_k", cu_seqlens_k, k.size(0));
  check_operand("k", k, {k.size(0), q.size(1), q.size(2)}, q.scalar_type());
  check_operand("v", v, k.sizes(), q.scalar_type());
  check_operand("cu_seqlens_k", cu_seqlens_k, cu_seqlens_q.sizes(), at::kInt);
  check_operand("key_bias", key_bias, {k.size(0)}, at::kFloat);
  Tensor out = empty_result(q.sizes(), q.options());
  Tensor lse = at::empty({q.size(1), q.size(0)}, q.options().dtype(at::kFloat));
  for (const auto& samples : sample_groups(kernels, keys, offsets_k)) {
    const PackedKeys packed(kernels, keys, &values, offsets_k, key_bias, samples, causal);
    const AttentionCall call{kernels,   queries, offsets_q, offsets_k, packed, static_cast<float>(scale),
                             causal, out,     lse};
    std::vector<AttentionCall::Block> items;
    int64_t scratch_bytes = 0;
    for (const int64_t b : samples) {
      const Blocks blocks(layout_of(kernels, call.factor()), offsets_q.length(b), offsets_k.length(b), 1);
      if (blocks.count == 0) continue;
      scratch_bytes = std::max(scratch_bytes, call.scratch_bytes(blocks.rows, offsets_k.length(b)));
      for (int64_t head = 0; head < queries.heads; ++head) {
        for (int64_t block = 0; block < blocks.count; ++block) {
          items.push_back({b, blocks.first(block), blocks.size(block), head, 1});
        }
      }
    }
    share_items(static_cast<int64_t>(items.size()), [&](const auto& next) {
      const Buffer scratch(scratch_bytes);
      for (size_t item = next(); item < items.size(); item = next()) {
        // Another thread may take the next item; then the queries asked for were wasted.
        if (item + 1 < items.size()) call.prefetch(items[item + 1]);
        call.run(items[item], {}, scratch);
      }
    });
  }
  return {out, lse};
}

}  // namespace madtp::cpu
