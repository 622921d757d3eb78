// Attention between its linear layers: x + W_o attention(W_qkv norm(x)), or with the norm of the sum; and W_o attention(W_q x, W_kv y) of
// another modality y. Formulas: layer_norm.cpp, linear.cpp, attention.cpp, importance.cpp. One call instead of four, which for small
// batches take longer to make than to serve.
#include "cpu/ops/linear.h"

#include <cmath>

namespace madtp::cpu {

namespace {

// The width of a head, which the attention of every backend bounds alike.
int64_t head_width(const char* name, const Tensor& weight, int64_t parts, int64_t heads) {
  const int64_t rows = weight.dim() == 2 ? weight.size(0) : 0;
  TORCH_CHECK_VALUE(heads > 0 && rows > 0 && rows % (parts * heads) == 0, name, ": expected ", parts, " x ", heads,
                    " heads of rows, got ", weight.sizes());
  const int64_t width = rows / (parts * heads);
  TORCH_CHECK_VALUE(width <= 256, name, ": expected heads of at most 256, got ", width);
  return width;
}

double scale_of(int64_t width) { return std::pow(static_cast<double>(width), -0.5); }

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> self_attention(
    const Tensor& x, const OptionalTensor& norm_weight, const OptionalTensor& norm_bias, double norm_eps, bool norm_first,
    const Tensor& qkv_weight, const OptionalTensor& qkv_bias, const Tensor& out_weight, const OptionalTensor& out_bias, int64_t heads,
    const Tensor& cu_seqlens, int64_t max_seqlen, bool causal, const OptionalTensor& key_bias, bool importance) {
  check_rows("x", x, 2);
  const int64_t tokens = x.size(0), width = head_width("qkv_weight", qkv_weight, 3, heads);
  const Offsets samples("cu_seqlens", cu_seqlens, tokens);
  samples.check_longest("max_seqlen", max_seqlen);
  const Norm norm("norm_", norm_weight, norm_bias, norm_eps, x.size(1)), none;
  const Tensor qkv =
      normed_linear(x, norm_first ? norm : none, qkv_weight, qkv_bias, cu_seqlens, "", {}).view({tokens, 3, heads, width});
  const Tensor q = qkv.select(1, 0), k = qkv.select(1, 1), v = qkv.select(1, 2);
  const double scale = scale_of(width);
  Tensor out, lse, received, cls;
  if (importance) {
    std::tie(out, lse, received, cls) = attention_with_importance(q, k, v, cu_seqlens, max_seqlen, scale, causal, key_bias);
  } else {
    std::tie(out, lse) = attention(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, scale, causal, key_bias);
  }
  Tensor y = linear(out.flatten(1), out_weight, out_bias, cu_seqlens, "", x);
  if (norm && !norm_first) y = norm.of(y, samples.total());
  return {y, q, k, out, lse, received, cls};
}

Tensor cross_attention(const Tensor& x, const Tensor& q_weight, const OptionalTensor& q_bias, const Tensor& others,
                       const Tensor& kv_weight, const OptionalTensor& kv_bias, const Tensor& out_weight,
                       const OptionalTensor& out_bias, int64_t heads, const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k,
                       int64_t max_seqlen_q, int64_t max_seqlen_k, const OptionalTensor& key_bias) {
  check_rows("x", x, 2);
  check_rows("others", others, 2);
  const int64_t width = head_width("q_weight", q_weight, 1, heads);
  TORCH_CHECK_VALUE(head_width("kv_weight", kv_weight, 2, heads) == width, "kv_weight: expected keys and values for ",
                    q_weight.sizes(), ", got ", kv_weight.sizes());
  Offsets("cu_seqlens_q", cu_seqlens_q, x.size(0)).check_longest("max_seqlen_q", max_seqlen_q);
  Offsets("cu_seqlens_k", cu_seqlens_k, others.size(0)).check_longest("max_seqlen_k", max_seqlen_k);
  const Tensor q = linear(x, q_weight, q_bias, cu_seqlens_q, "", {}).view({x.size(0), heads, width});
  const Tensor kv = linear(others, kv_weight, kv_bias, cu_seqlens_k, "", {}).view({others.size(0), 2, heads, width});
  const Tensor out = std::get<0>(attention(q, kv.select(1, 0), kv.select(1, 1), cu_seqlens_q, cu_seqlens_k, max_seqlen_q,
                                           max_seqlen_k, scale_of(width), false, key_bias));
  return linear(out.flatten(1), out_weight, out_bias, cu_seqlens_q, "", {});
}

}  // namespace madtp::cpu
