// What other operations take of linear layers.
#pragma once

#include <string_view>

#include "cpu/ops/norm.h"
#include "cpu/ops/ops.h"

namespace madtp::cpu {

// linear(norm(x)), or linear(x) where the norm is none.
Tensor normed_linear(const Tensor& x, const Norm& norm, const Tensor& weight, const OptionalTensor& bias,
                     const OptionalTensor& cu_seqlens, std::string_view activation, const OptionalTensor& residual);

}  // namespace madtp::cpu
