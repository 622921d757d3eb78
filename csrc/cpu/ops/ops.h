// The operations on CPU tensors, and attention fused with its importance. Contracts (shapes, dtypes, errors) are those
// of the Python functions in madtp_kernels; the formula stands at the top of each .cpp file.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string>
#include <string_view>
#include <tuple>
#include <vector>

namespace madtp::cpu {

using at::Tensor;
using OptionalTensor = c10::optional<Tensor>;

// q [Cq, H, d], k and v [Ck, H, d] -> out [Cq, H, d], lse [H, Cq].
std::tuple<Tensor, Tensor> attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cu_seqlens_q,
                                     const Tensor& cu_seqlens_k, int64_t max_seqlen_q, int64_t max_seqlen_k,
                                     double scale, bool causal, const OptionalTensor& key_bias);

// out, lse and their gradients -> d_q [Cq, H, d], d_k and d_v [Ck, H, d], d_key_bias [Ck] (empty without a key_bias).
std::tuple<Tensor, Tensor, Tensor, Tensor> attention_backward(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out, const Tensor& lse, const Tensor& cu_seqlens_q,
    const Tensor& cu_seqlens_k, int64_t max_seqlen_q, int64_t max_seqlen_k, double scale, bool causal,
    const OptionalTensor& key_bias, const Tensor& d_out, const Tensor& d_lse);

// q, k, out [C, H, d], lse [H, C] -> received [C], cls [C].
std::tuple<Tensor, Tensor> attention_importance(const Tensor& q, const Tensor& k, const Tensor& out, const Tensor& lse,
                                                const Tensor& cu_seqlens, int64_t max_seqlen, double scale, bool causal,
                                                const OptionalTensor& key_bias);

// received, cls and their gradients -> d_q, d_k, d_out [C, H, d], d_lse [H, C], d_key_bias [C] (empty without a key_bias).
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> attention_importance_backward(
    const Tensor& q, const Tensor& k, const Tensor& out, const Tensor& lse, const Tensor& cu_seqlens, int64_t max_seqlen,
    double scale, bool causal, const OptionalTensor& key_bias, const Tensor& d_received, const Tensor& d_cls);

// Attention and its importance for self-attention in one pass, without recomputing the logits -> out, lse, received, cls.
std::tuple<Tensor, Tensor, Tensor, Tensor> attention_with_importance(const Tensor& q, const Tensor& k, const Tensor& v,
                                                                     const Tensor& cu_seqlens, int64_t max_seqlen,
                                                                     double scale, bool causal,
                                                                     const OptionalTensor& key_bias);

// x [C, D], dictionary [M, D], received [C], cls [C] -> importance [C], threshold [B].
std::tuple<Tensor, Tensor> score_tokens(const Tensor& x, const Tensor& dictionary, const Tensor& received,
                                        const Tensor& cls, const Tensor& cu_seqlens, int64_t max_seqlen,
                                        double temperature, const OptionalTensor& bias);

// x [C, D], importance [C], ... -> values, cu_out [B+1], ids_out, sizes_out, normed.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> compact(
    const Tensor& x, const Tensor& importance, const OptionalTensor& threshold, const OptionalTensor& keep_count,
    const Tensor& cu_seqlens, int64_t max_seqlen, const OptionalTensor& is_protected, const OptionalTensor& groups,
    const OptionalTensor& min_keep, const OptionalTensor& ids, const OptionalTensor& sizes, int64_t merged_id,
    const OptionalTensor& norm_weight, const OptionalTensor& norm_bias, double norm_eps, bool exact);

// Both in one call -> values, cu_out, ids_out, sizes_out, normed, importance, threshold, and of the result the number of rows in use
// and the length of the longest sample. Where a score or threshold is NaN or infinite the first five are undefined tensors.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, int64_t, int64_t> prune(
    const Tensor& x, const Tensor& entering, const Tensor& dictionary, const OptionalTensor& bias, const Tensor& received,
    const Tensor& cls, const Tensor& cu_seqlens, int64_t max_seqlen, double temperature, const OptionalTensor& is_protected,
    const OptionalTensor& groups, const OptionalTensor& min_keep, const OptionalTensor& ids, const OptionalTensor& sizes,
    int64_t merged_id, const OptionalTensor& norm_weight, const OptionalTensor& norm_bias, double norm_eps, bool exact);

// keys [C, D], kept, goes and inverse_norms [C] -> into [C]: rows.
Tensor nearest_kept(const Tensor& keys, const Tensor& kept, const Tensor& cu_seqlens, int64_t max_seqlen,
                    const OptionalTensor& goes, const OptionalTensor& inverse_norms);

// keys [C, D], rank [C] -> novelty [C], nearest [C]: rows.
std::tuple<Tensor, Tensor> novelty(const Tensor& keys, const OptionalTensor& rank, const Tensor& cu_seqlens,
                                   int64_t max_seqlen);

// keys [C, D], order, weight, sizes and free [C] -> scores [C], novelty [C], inverse_norms [C].
std::tuple<Tensor, Tensor, Tensor> merge_scores(const Tensor& keys, const Tensor& order, const OptionalTensor& weight,
                                                const OptionalTensor& sizes, const Tensor& free, const Tensor& cu_seqlens,
                                                int64_t max_seqlen, double weight_exponent, double novelty_exponent,
                                                double size_exponent);

// scores [C], count [B], free [C] -> chosen [C].
Tensor lowest_tokens(const Tensor& scores, const OptionalTensor& count, const Tensor& cu_seqlens, const Tensor& free,
                     std::optional<double> threshold, double share, int64_t uncounted);

// keys [C, D], count [B] -> into [C]: rows, similarity [C]. The first `first_free` tokens of a sample are left alone.
std::tuple<Tensor, Tensor> match_tokens(const Tensor& keys, const Tensor& cu_seqlens, int64_t max_seqlen,
                                        const OptionalTensor& count, std::optional<double> threshold, int64_t first_free);

// q [C, H, d], k [C, Hk, d], lse [H, C] -> received [sets, C]; heads: "mean" or "max".
Tensor attention_received(const Tensor& q, const Tensor& k, const Tensor& lse, const Tensor& cu_seqlens, int64_t max_seqlen,
                          double scale, bool causal, const OptionalTensor& key_bias, const std::string& heads, int64_t sets,
                          int64_t first, int64_t last, const OptionalTensor& queries);

// x [C, D], into [C]: rows, weights and sizes [C], carry [C, ...]; append: "", "sum" or "mean" -> values, cu_out [B+1],
// sizes_out, rows [C], source, carried.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, std::vector<Tensor>> merge_tokens(
    const Tensor& x, const Tensor& into, const Tensor& weights, const Tensor& sizes, const Tensor& cu_seqlens,
    int64_t max_seqlen, const std::string& append, bool exact, const std::vector<Tensor>& carry);

// merge_scores, lowest_tokens, nearest_kept and merge_tokens in one call: x [C, D], keys [C, H, d] or [C, K], order, weight, sizes and
// free [C], count [B] -> what merge_tokens returns, the scores [C], and of the result the number of rows in use and the length of the
// longest sample; with_log_sizes: also the logarithms of the sizes. Where an order, a weight or a score is NaN or infinite all are
// undefined tensors.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, std::vector<Tensor>, Tensor, Tensor, int64_t, int64_t> merge_redundant(
    const Tensor& x, const Tensor& keys, const Tensor& order, const OptionalTensor& weight, const OptionalTensor& sizes,
    const Tensor& free, const OptionalTensor& count, const Tensor& cu_seqlens, int64_t max_seqlen, std::optional<double> threshold,
    double share, int64_t uncounted, double weight_exponent, double novelty_exponent, double size_exponent, bool with_log_sizes,
    bool exact, const std::vector<Tensor>& carry);

// x [C, D], weight and bias [D] -> [C, D].
Tensor layer_norm(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const Tensor& cu_seqlens, double eps);

// x [C, K], weight [N, K], bias [N], cu_seqlens [B+1] (none: all rows), "" or an activation's name, residual [C, N]
// -> out [C, N].
Tensor linear(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& cu_seqlens,
              std::string_view activation, const OptionalTensor& residual);

// Two linear layers, the activation after the first, and a LayerNorm of what enters or of what leaves: x [C, K], weight1 [M, K],
// weight2 [N, M], residual [C, N], norm_weight and norm_bias [K] or [N] -> out [C, N], to the bit what `linear` and `layer_norm`
// return one by one.
Tensor mlp(const Tensor& x, const Tensor& weight1, const OptionalTensor& bias1, const Tensor& weight2, const OptionalTensor& bias2,
           const OptionalTensor& cu_seqlens, std::string_view activation, const Tensor& residual, const OptionalTensor& norm_weight,
           const OptionalTensor& norm_bias, double norm_eps, bool norm_first);

// The sub-layer of self-attention: x + attention(norm(x)), or norm(x + attention(x)); no norm_weight: without norm. x [C, D],
// qkv_weight [3 H d, D], out_weight [D, H d] -> y [C, D], and of the attention q, k and out [C, H, d], lse [H, C], received and cls
// [C], undefined without importance. To the bit what the operations return one by one.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> self_attention(
    const Tensor& x, const OptionalTensor& norm_weight, const OptionalTensor& norm_bias, double norm_eps, bool norm_first,
    const Tensor& qkv_weight, const OptionalTensor& qkv_bias, const Tensor& out_weight, const OptionalTensor& out_bias, int64_t heads,
    const Tensor& cu_seqlens, int64_t max_seqlen, bool causal, const OptionalTensor& key_bias, bool importance);

// Tokens x [C, D] attend to others [S, E] of another modality: q_weight [H d, D], kv_weight [2 H d, E], out_weight [N, H d], key_bias
// [S] -> W_o attention [C, N]. To the bit what `linear` and `attention` return.
Tensor cross_attention(const Tensor& x, const Tensor& q_weight, const OptionalTensor& q_bias, const Tensor& others,
                       const Tensor& kv_weight, const OptionalTensor& kv_bias, const Tensor& out_weight,
                       const OptionalTensor& out_bias, int64_t heads, const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k,
                       int64_t max_seqlen_q, int64_t max_seqlen_k, const OptionalTensor& key_bias);

// Patches of images through a linear layer, plus positions, behind a token of their own: images [B, 3, R p, S p], weight [D, 3, p, p],
// cls [D], positions [R S + 1, D] -> [B (R S + 1), D], to the bit what `linear` and sums return. Undefined where it does not serve:
// in half precision, and where weights are too large for a thread to take patches of its own.
Tensor embed_patches(const Tensor& images, const Tensor& weight, const OptionalTensor& bias, const Tensor& cls, const Tensor& positions);

// Whether none of the first rows of values [C] is NaN or infinite.
bool all_finite(const Tensor& values, int64_t rows);

}  // namespace madtp::cpu
