// What merge_redundant takes of the search for alike tokens.
#pragma once

#include "cpu/ops/merging.h"
#include "cpu/ops/ops.h"

namespace madtp::cpu {

// Of the factors of a score.
struct MergeExponents {
  double weight, novelty, size;
};

// merge_scores, lowest_tokens and nearest_kept of one sample after the other: scores [C], into [C].
std::tuple<Tensor, Tensor> find_redundant(const Tensor& keys, const Tensor& order, const OptionalTensor& weight,
                                          const OptionalTensor& sizes, const Tensor& free, const Tensor& cu_seqlens,
                                          const MergeExponents& exponents, const Choice& choice);

}  // namespace madtp::cpu
