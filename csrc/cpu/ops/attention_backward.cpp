// Gradients of ragged attention, from the probabilities recomputed out of the log-sum-exp.
//
//   P[h, i, j] = exp(scale * <q_hi, k_hj> + key_bias_j - lse[h, i])
//   dS = P * (<dout_hi, v_hj> - <dout_hi, out_hi> + dlse[h, i])
//   dq_hi = scale * sum_j dS k_hj    dk_hj = scale * sum_i dS q_hi    dv_hj = sum_i P dout_hi    dkey_bias_j = sum_hi dS
//
// A work item is a head of a sample: it writes all of these but the sum over heads, and depends on no other sample.
#include <ATen/ops/empty.h>

#include "cpu/ops/operands.h"
#include "cpu/ops/ops.h"

namespace madtp::cpu {

namespace {

// A gradient that arrives can be an expanded or a transposed view.
Tensor with_adjacent_elements(const Tensor& tensor) {
  return tensor.dim() > 0 && tensor.size(-1) > 1 && tensor.stride(-1) != 1 ? tensor.contiguous() : tensor;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> attention_backward(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out, const Tensor& lse, const Tensor& cu_seqlens_q,
    const Tensor& cu_seqlens_k, int64_t, int64_t, double scale, bool causal, const OptionalTensor& key_bias,
    const Tensor& d_out, const Tensor& d_lse) {
  const CpuKernels& kernels = cpu_kernels();
  const HeadRows queries("q", q);
  check_operand("k", k, {k.size(0), q.size(1), q.size(2)}, q.scalar_type());
  check_operand("v", v, k.sizes(), q.scalar_type());
  check_operand("out", out, q.sizes(), q.scalar_type());
  check_operand("d_out", d_out, q.sizes(), q.scalar_type());
  const Tensor d_out_rows = with_adjacent_elements(d_out);
  const HeadRows keys("k", k), values("v", v), outputs("out", out), d_outputs("d_out", d_out_rows);
  const Offsets offsets_q("cu_seqlens_q", cu_seqlens_q, q.size(0)), offsets_k("cu_seqlens_k", cu_seqlens_k, k.size(0));
  check_operand("lse", lse, {q.size(1), q.size(0)}, at::kFloat);
  check_operand("d_lse", d_lse, lse.sizes(), at::kFloat);
  check_operand("cu_seqlens_k", cu_seqlens_k, cu_seqlens_q.sizes(), at::kInt);
  check_operand("key_bias", key_bias, {k.size(0)}, at::kFloat);
  const Tensor lse_dense = lse.contiguous(), d_lse_dense = d_lse.contiguous();
  const bool biased = key_bias.has_value();
  const Tensor bias = biased ? key_bias->contiguous() : Tensor();

  Tensor d_q = at::empty(q.sizes(), q.options()), d_k = at::empty(k.sizes(), k.options());
  Tensor d_v = at::empty(v.sizes(), v.options());
  Tensor d_bias = at::empty({biased ? k.size(0) : 0}, lse.options());
  const int64_t heads = queries.heads, stride = heads * queries.head_dim, tokens = k.size(0);
  const Buffer shares(biased ? heads * tokens * 4 : 0);  // of d_bias, by head
  if (biased) std::fill_n(shares.at<float>(), heads * tokens, 0.0f);
  clear_rows(d_q, offsets_q.total(), q.size(0));
  clear_rows(d_k, offsets_k.total(), tokens);
  clear_rows(d_v, offsets_k.total(), tokens);

  std::vector<std::pair<int64_t, int64_t>> items;  // sample, head
  int64_t most_queries = 0;
  for (const int64_t b : offsets_k.longest_first()) {
    if (offsets_q.length(b) == 0 || offsets_k.length(b) == 0) {
      clear_rows(d_q, offsets_q.start(b), offsets_q.start(b) + offsets_q.length(b));
      clear_rows(d_k, offsets_k.start(b), offsets_k.start(b) + offsets_k.length(b));
      clear_rows(d_v, offsets_k.start(b), offsets_k.start(b) + offsets_k.length(b));
      continue;
    }
    most_queries = std::max(most_queries, offsets_q.length(b));
    for (int64_t head = 0; head < heads; ++head) items.emplace_back(b, head);
  }
  share_items(static_cast<int64_t>(items.size()), [&](const auto& next) {
    const Buffer scratch(kernels.attention_gradient_bytes(queries.type, most_queries, queries.head_dim));
    for (size_t item = next(); item < items.size(); item = next()) {
      const auto [b, head] = items[item];
      const int64_t q0 = offsets_q.start(b), length_q = offsets_q.length(b), k0 = offsets_k.start(b), length_k = offsets_k.length(b);
      const auto result = [&, head = head](const Tensor& tensor, int64_t row) {
        return static_cast<std::byte*>(tensor.mutable_data_ptr()) + (row * stride + head * queries.head_dim) * queries.bytes;
      };
      kernels.attention_gradient({.q = queries.rows(q0, length_q, head),
                                  .out = outputs.rows(q0, length_q, head),
                                  .d_out = d_outputs.rows(q0, length_q, head),
                                  .k = keys.rows(k0, length_k, head),
                                  .v = values.rows(k0, length_k, head),
                                  .lse = lse_dense.const_data_ptr<float>() + head * q.size(0) + q0,
                                  .d_lse = d_lse_dense.const_data_ptr<float>() + head * q.size(0) + q0,
                                  .bias = biased ? bias.const_data_ptr<float>() + k0 : nullptr,
                                  .ahead = causal ? length_k - length_q : length_k,
                                  .scale = static_cast<float>(scale),
                                  .d_q = result(d_q, q0),
                                  .d_k = result(d_k, k0),
                                  .d_v = result(d_v, k0),
                                  .d_stride = stride,
                                  .d_bias = biased ? shares.at<float>() + head * tokens + k0 : nullptr,
                                  .scratch = scratch.at<std::byte>()});
    }
  });
  if (biased) {
    float* const to = d_bias.mutable_data_ptr<float>();
    for (int64_t j = 0; j < tokens; ++j) {
      double sum = 0.0;
      for (int64_t head = 0; head < heads; ++head) sum += shares.at<float>()[head * tokens + j];
      to[j] = static_cast<float>(sum);
    }
  }
  return {d_q, d_k, d_v, d_bias};
}

}  // namespace madtp::cpu
