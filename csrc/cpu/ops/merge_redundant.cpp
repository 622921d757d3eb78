// What a layer of ranked novelty does to its tokens, in one call: scores, the choice of what goes, where it goes, and merging.
// Formulas: similarity.cpp, merging.cpp.
#include <ATen/ops/all.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/ge.h>
#include <ATen/ops/item.h>
#include <ATen/ops/log.h>
#include <ATen/ops/ones.h>

#include "cpu/ops/operands.h"
#include "cpu/ops/ops.h"
#include "cpu/ops/similarity.h"

namespace madtp::cpu {

namespace {

// Where numbers say what is free, 0 says no.
Tensor as_mask(const Tensor& free) {
  if (free.scalar_type() != at::kInt || free.dim() != 1) return free;
  const Tensor numbers = free.contiguous();
  Tensor mask = at::empty({free.size(0)}, free.options().dtype(at::kBool));
  const auto* const number = numbers.const_data_ptr<int32_t>();
  std::transform(number, number + free.size(0), mask.mutable_data_ptr<bool>(), [](int32_t n) { return n != 0; });
  return mask;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, std::vector<Tensor>, Tensor, Tensor, int64_t, int64_t> merge_redundant(
    const Tensor& x, const Tensor& keys, const Tensor& order, const OptionalTensor& weight, const OptionalTensor& sizes,
    const Tensor& free, const OptionalTensor& count, const Tensor& cu_seqlens, int64_t max_seqlen, std::optional<double> threshold,
    double share, int64_t uncounted, double weight_exponent, double novelty_exponent, double size_exponent, bool with_log_sizes,
    bool exact, const std::vector<Tensor>& carry) {
  TORCH_CHECK_VALUE(keys.dim() == 2 || keys.dim() == 3, "keys: expected two or three dimensions, got ", keys.sizes());
  TORCH_CHECK_VALUE(x.dim() == 2 && x.size(0) == keys.size(0), "x: expected ", keys.size(0), " rows, got ", x.sizes());
  const Tensor rows = with_rows(keys.flatten(1));
  TORCH_CHECK_VALUE(rows.size(1) > 0, "keys: expected at least one feature, got ", keys.sizes());
  const Offsets before("cu_seqlens", cu_seqlens, x.size(0));
  before.check_longest("max_seqlen", max_seqlen);
  check_operand("order", order, {x.size(0)}, at::kFloat);
  check_operand("weight", weight, {x.size(0)}, at::kFloat);
  const Choice choice(count, before.samples, threshold, share, uncounted);
  TORCH_CHECK_VALUE(!count.has_value() || count->ge(0).all().item<bool>(), "count: expected >= 0");
  const auto refused = std::make_tuple(Tensor(), Tensor(), Tensor(), Tensor(), Tensor(), std::vector<Tensor>(), Tensor(), Tensor(),
                                       int64_t{0}, int64_t{0});
  if (!all_finite(order, before.total()) || (weight.has_value() && !all_finite(*weight, before.total()))) return refused;
  const auto [scores, into] = find_redundant(rows, order, weight, sizes, as_mask(free), cu_seqlens,
                                             {weight_exponent, novelty_exponent, size_exponent}, choice);
  if (!all_finite(scores, before.total())) return refused;  // of orders below 0
  const Tensor stands_for = sizes.has_value() ? *sizes : at::ones({x.size(0)}, scores.options());
  auto [values, cu_out, sizes_out, row_of, source, carried] =
      merge_tokens(with_rows(x), into, stands_for, stands_for, cu_seqlens, max_seqlen, "", exact, carry);
  const Offsets after("cu_seqlens", cu_out, x.size(0));
  const Tensor log_sizes = with_log_sizes ? sizes_out.to(at::kFloat).log() : Tensor();
  return {values, cu_out, sizes_out, row_of, source, carried, scores, log_sizes, after.total(), after.longest()};
}

}  // namespace madtp::cpu
