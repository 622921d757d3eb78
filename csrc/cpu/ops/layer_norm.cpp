// LayerNorm of the rows that hold tokens: out = (x - mean) / sqrt(variance + eps) * weight + bias.
#include <string>

#include "cpu/ops/norm.h"
#include "cpu/ops/ops.h"

namespace madtp::cpu {

namespace {

constexpr int64_t kRows = 32;

}  // namespace

Norm::Norm(const char* name, const OptionalTensor& weight, const OptionalTensor& bias, double eps, int64_t width)
    : kernels_(cpu_kernels()), width_(width), eps_(static_cast<float>(eps)) {
  const auto checked = [&](const char* part, const OptionalTensor& tensor) {
    if (!tensor.has_value()) return Tensor();
    check_operand((name + std::string(part)).c_str(), *tensor, {width}, tensor->scalar_type());
    return tensor->to(at::kFloat).contiguous();
  };
  weight_ = checked("weight", weight);
  bias_ = checked("bias", bias);
}

void Norm::run(Type type, const std::byte* from, int64_t from_stride, std::byte* to, int64_t to_stride, int64_t count) const {
  const float* const weight = weight_.const_data_ptr<float>();
  const float* const bias = bias_.defined() ? bias_.const_data_ptr<float>() : nullptr;
  for (int64_t row = 0; row < count; ++row) {
    kernels_.layer_norm(type, from + row * from_stride, weight, bias, eps_, to + row * to_stride, width_);
  }
}

Tensor Norm::of(const Tensor& x, int64_t count) const {
  const Type type = type_of("x", x);
  Tensor out = empty_result({x.size(0), width_}, x.options());
  const auto* const from = static_cast<const std::byte*>(x.const_data_ptr());
  auto* const to = static_cast<std::byte*>(out.mutable_data_ptr());
  const int64_t from_stride = x.stride(0) * x.element_size(), to_stride = width_ * x.element_size();
  for_each_item((count + kRows - 1) / kRows, [&](int64_t item) {
    const int64_t first = item * kRows;
    run(type, from + first * from_stride, from_stride, to + first * to_stride, to_stride, std::min(kRows, count - first));
  });
  return out;
}

Tensor layer_norm(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const Tensor& cu_seqlens, double eps) {
  check_rows("x", x, 2);
  const int64_t tokens = Offsets("cu_seqlens", cu_seqlens, x.size(0)).total();
  return Norm("", weight, bias, eps, x.size(1)).of(x, tokens);
}

}  // namespace madtp::cpu
