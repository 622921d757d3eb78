// Scoring and compaction in one call: what a layer does to its tokens after attention. Formulas: scoring.cpp, compaction.cpp.
//
// Attention comes before it in a call of its own: the projection of its result lies between them, and belongs to the model.
#include "cpu/ops/operands.h"
#include "cpu/ops/ops.h"

namespace madtp::cpu {

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, int64_t, int64_t> prune(
    const Tensor& x, const Tensor& entering, const Tensor& dictionary, const OptionalTensor& bias, const Tensor& received,
    const Tensor& cls, const Tensor& cu_seqlens, int64_t max_seqlen, double temperature, const OptionalTensor& is_protected,
    const OptionalTensor& groups, const OptionalTensor& min_keep, const OptionalTensor& ids, const OptionalTensor& sizes,
    int64_t merged_id, const OptionalTensor& norm_weight, const OptionalTensor& norm_bias, double norm_eps, bool exact) {
  TORCH_CHECK_VALUE(x.sizes() == entering.sizes(), "entering: expected ", x.sizes(), ", got ", entering.sizes());
  auto [importance, threshold] = score_tokens(entering, dictionary, received, cls, cu_seqlens, max_seqlen, temperature, bias);
  const Offsets before("cu_seqlens", cu_seqlens, x.size(0));
  if (!all_finite(importance, before.total()) || !all_finite(threshold, before.samples)) {
    return {Tensor(), Tensor(), Tensor(), Tensor(), Tensor(), importance, threshold, 0, 0};
  }
  auto [values, cu_out, ids_out, sizes_out, normed] =
      compact(x, importance, threshold, {}, cu_seqlens, max_seqlen, is_protected, groups, min_keep, ids, sizes, merged_id,
              norm_weight, norm_bias, norm_eps, exact);
  const Offsets after("cu_seqlens", cu_out, x.size(0));
  return {values, cu_out, ids_out, sizes_out, normed, importance, threshold, after.total(), after.longest()};
}

}  // namespace madtp::cpu
