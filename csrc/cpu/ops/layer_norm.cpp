// LayerNorm of the rows that hold tokens: out = (x - mean) / sqrt(variance + eps) * weight + bias.
#include <ATen/ops/empty.h>

#include "cpu/ops/operands.h"
#include "cpu/ops/ops.h"

namespace madtp::cpu {

namespace {

constexpr int64_t kRows = 32;

}  // namespace

Tensor layer_norm(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const Tensor& cu_seqlens, double eps) {
  const CpuKernels& kernels = cpu_kernels();
  const Type type = type_of("x", x);
  check_rows("x", x, 2);
  const int64_t tokens = Offsets("cu_seqlens", cu_seqlens, x.size(0)).total(), width = x.size(1);
  check_operand("weight", weight, {width}, weight.scalar_type());
  if (bias.has_value()) check_operand("bias", *bias, {width}, bias->scalar_type());
  const Tensor scale = weight.to(at::kFloat).contiguous();
  const Tensor shift = bias.has_value() ? bias->to(at::kFloat).contiguous() : Tensor();
  const float* const scale_data = scale.const_data_ptr<float>();
  const float* const shift_data = shift.defined() ? shift.const_data_ptr<float>() : nullptr;
  Tensor out = at::empty({x.size(0), width}, x.options());
  const auto* const from = static_cast<const std::byte*>(x.const_data_ptr());
  auto* const to = static_cast<std::byte*>(out.mutable_data_ptr());
  const int64_t from_stride = x.stride(0) * x.element_size(), to_stride = width * x.element_size();
  for_each_item((tokens + kRows - 1) / kRows, [&](int64_t item) {
    const int64_t last = std::min((item + 1) * kRows, tokens);
    for (int64_t row = item * kRows; row < last; ++row) {
      kernels.layer_norm(type, from + row * from_stride, scale_data, shift_data, static_cast<float>(eps), to + row * to_stride,
                         width);
    }
  });
  return out;
}

}  // namespace madtp::cpu
