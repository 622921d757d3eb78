// Gradients of attention's importance, from the probabilities recomputed out of the log-sum-exp: see kernels/importance_gradient.h.
//
// A work item is a sample with all its heads, because only the head that attains the maximum of a query and key passes a gradient on.
// Factors are float32 whatever the type of the tensors.
#include <ATen/ops/empty.h>

#include "cpu/ops/operands.h"
#include "cpu/ops/ops.h"

namespace madtp::cpu {

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> attention_importance_backward(
    const Tensor& q, const Tensor& k, const Tensor& out, const Tensor& lse, const Tensor& cu_seqlens, int64_t, double scale,
    bool causal, const OptionalTensor& key_bias, const Tensor& d_received, const Tensor& d_cls) {
  const CpuKernels& kernels = cpu_kernels();
  const HeadRows queries("q", q);
  check_operand("k", k, q.sizes(), q.scalar_type());
  check_operand("out", out, q.sizes(), q.scalar_type());
  const HeadRows keys("k", k), outputs("out", out);
  const Offsets offsets("cu_seqlens", cu_seqlens, q.size(0));
  check_operand("lse", lse, {q.size(1), q.size(0)}, at::kFloat);
  check_operand("key_bias", key_bias, {q.size(0)}, at::kFloat);
  check_operand("d_received", d_received, {q.size(0)}, at::kFloat);
  check_operand("d_cls", d_cls, {q.size(0)}, at::kFloat);
  const Tensor lse_dense = lse.contiguous(), received = d_received.contiguous(), cls = d_cls.contiguous();
  const bool biased = key_bias.has_value();
  const Tensor bias = biased ? key_bias->contiguous() : Tensor();

  Tensor d_q = at::empty(q.sizes(), q.options()), d_k = at::empty(k.sizes(), k.options());
  Tensor d_out = at::empty(out.sizes(), out.options());
  Tensor d_lse = at::empty(lse.sizes(), lse.options()), d_bias = at::empty({biased ? q.size(0) : 0}, lse.options());
  const int64_t total = offsets.total(), heads = queries.heads, stride = heads * queries.head_dim, capacity = q.size(0);
  for (const Tensor& tensor : {d_q, d_k, d_out}) clear_rows(tensor, total, capacity);
  for (int64_t head = 0; head < heads; ++head) {
    std::fill_n(d_lse.mutable_data_ptr<float>() + head * capacity + total, capacity - total, 0.0f);
  }
  if (biased) std::fill_n(d_bias.mutable_data_ptr<float>() + total, capacity - total, 0.0f);

  const std::vector<int64_t> order = offsets.longest_first();
  share_items(static_cast<int64_t>(order.size()), [&](const auto& next) {
    const Buffer scratch(kernels.importance_gradient_bytes(heads, offsets.longest(), queries.head_dim));
    for (size_t item = next(); item < order.size(); item = next()) {
      const int64_t start = offsets.start(order[item]), length = offsets.length(order[item]);
      if (length == 0) continue;
      const auto rows_of = [&](const Tensor& tensor) {
        return static_cast<std::byte*>(tensor.mutable_data_ptr()) + start * stride * queries.bytes;
      };
      kernels.importance_gradient({.q = queries.rows(start, length, 0),
                                   .k = keys.rows(start, length, 0),
                                   .out = outputs.rows(start, length, 0),
                                   .q_head_bytes = queries.head_stride * queries.bytes,
                                   .k_head_bytes = keys.head_stride * keys.bytes,
                                   .out_head_bytes = outputs.head_stride * outputs.bytes,
                                   .heads = heads,
                                   .lse = lse_dense.const_data_ptr<float>() + start,
                                   .d_lse = d_lse.mutable_data_ptr<float>() + start,
                                   .lse_stride = capacity,
                                   .bias = biased ? bias.const_data_ptr<float>() + start : nullptr,
                                   .d_received = received.const_data_ptr<float>() + start,
                                   .d_cls = cls.const_data_ptr<float>() + start,
                                   .causal = causal,
                                   .scale = static_cast<float>(scale),
                                   .d_q = rows_of(d_q),
                                   .d_k = rows_of(d_k),
                                   .d_out = rows_of(d_out),
                                   .d_stride = stride,
                                   .d_bias = biased ? d_bias.mutable_data_ptr<float>() + start : nullptr,
                                   .scratch = scratch.at<std::byte>()});
    }
  });
  return {d_q, d_k, d_out, d_lse, d_bias};
}

}  // namespace madtp::cpu
