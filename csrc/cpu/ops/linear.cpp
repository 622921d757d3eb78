// Linear layers with activation and residual sum.
//
//   out[i] = activation(W x[i] + b) + residual[i]          W [N, K] as it is stored
//
// Weights are not packed: they are the left operand of the block products, whose rows may lie anywhere, and the tokens are
// packed instead, some hundred at a time so that they stay in the second-level cache. So nothing derived from a weight is kept,
// and a weight that somebody changes is changed. Each sum runs over the depth in one order, whatever the number of rows or
// threads: a row's result has the same bits in any batch.
#include <ATen/ops/empty.h>

#include <optional>
#include <string_view>
#include <utility>

#include "cpu/ops/operands.h"
#include "cpu/ops/ops.h"

namespace madtp::cpu {

namespace {

constexpr int64_t kPackedBytes = int64_t{1} << 20, kMostTokens = 1024;  // of tokens, per pass over the weights

Activation activation_of(std::string_view name) {
  constexpr std::pair<std::string_view, Activation> kNames[] = {{"", Activation::none},
                                                                {"gelu", Activation::gelu},
                                                                {"gelu_tanh", Activation::gelu_tanh},
                                                                {"quick_gelu", Activation::quick_gelu},
                                                                {"silu", Activation::silu}};
  for (const auto& [known, activation] : kNames) {
    if (name == known) return activation;
  }
  TORCH_CHECK_VALUE(false, "activation: expected '', gelu, gelu_tanh, quick_gelu or silu, got ", name);
}

}  // namespace

Tensor linear(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& cu_seqlens,
              std::string_view activation, const OptionalTensor& residual) {
  const CpuKernels& kernels = cpu_kernels();
  const Type type = type_of("x", x);
  const Factor factor = factor_of(kernels, type);
  const Layout& layout = layout_of(kernels, factor);
  const Activation kind = activation_of(activation);
  TORCH_CHECK_VALUE(x.dim() == 2 && weight.dim() == 2, "x, weight: expected two dimensions, got ", x.sizes(), ", ", weight.sizes());
  const int64_t depth = x.size(1), features = weight.size(0), element = x.element_size();
  const int64_t rows = cu_seqlens.has_value() ? Offsets("cu_seqlens", *cu_seqlens, x.size(0)).total() : x.size(0);
  check_rows("x", x, 2);
  check_rows("weight", weight, 2);
  check_operand("weight", weight, {features, depth}, x.scalar_type());
  check_operand("bias", bias, {features}, x.scalar_type());
  check_operand("residual", residual, {x.size(0), features}, x.scalar_type());
  if (residual.has_value()) check_rows("residual", *residual, 2);
  Tensor out = at::empty({x.size(0), features}, x.options());
  if (rows == 0 || features == 0) return out;
  expect_large_pages(out.mutable_data_ptr(), rows * features * element);

  const Buffer bias_memory(round_up(features, 64) * 4);
  float* const wide_bias = bias.has_value() ? bias_memory.at<float>() : nullptr;
  if (bias.has_value()) {
    const Tensor wide = bias->to(at::kFloat).contiguous();
    std::copy_n(wide.const_data_ptr<float>(), features, wide_bias);
  }
  const auto* const from = static_cast<const std::byte*>(x.const_data_ptr());
  const auto* const weights = static_cast<const std::byte*>(weight.const_data_ptr());
  const auto* const added = residual.has_value() ? static_cast<const std::byte*>(residual->const_data_ptr()) : nullptr;
  auto* const to = static_cast<std::byte*>(out.mutable_data_ptr());
  const int64_t added_stride = residual.has_value() ? residual->stride(0) : 0;

  // Weights that are stored as the products want them are read in place, others through a copy of one block.
  const int64_t block = layout.block_features, blocks = (features + block - 1) / block;
  const int64_t padded_depth = round_up(depth, layout.depth), weight_row = weight.stride(0) * element;
  const bool in_place = (type == Type::f32 || factor == Factor::bf16) && depth == padded_depth;
  const int64_t panel_bytes = packed_size(layout, kernels.linear_panel, depth) * factor_bytes(factor);
  const int64_t panels_most = std::clamp<int64_t>(kPackedBytes / std::max<int64_t>(panel_bytes, 1), 1, kMostTokens / kernels.linear_panel);
  const int64_t panels_all = (rows + kernels.linear_panel - 1) / kernels.linear_panel;

  const Buffer packed(std::min(panels_all, panels_most) * panel_bytes);
  for (int64_t first_panel = 0; first_panel < panels_all; first_panel += panels_most) {
    const int64_t first = first_panel * kernels.linear_panel, panels = std::min(panels_most, panels_all - first_panel);
    const int64_t tokens = std::min(rows - first, panels * kernels.linear_panel);
    for_each_item(panels, [&](int64_t panel) {
      const int64_t row = first + panel * kernels.linear_panel, count = std::min(kernels.linear_panel, rows - row);
      kernels.pack_transposed(factor, {from + row * x.stride(0) * element, type, x.stride(0), count, depth}, 0, count,
                              packed.at(panel * panel_bytes));
    });
    share_items(blocks, [&](const auto& next) {
      std::optional<Buffer> copy;
      for (int64_t item = next(); item < blocks; item = next()) {
        const int64_t feature = item * block, count = std::min(block, features - feature);
        const RowsToLoad stored{weights + feature * weight_row, type, weight.stride(0), count, depth};
        const bool copied = !in_place || count % layout.rows != 0;
        if (copied) {
          if (!copy) copy.emplace(round_up(block, layout.rows) * padded_depth * factor_bytes(factor));
          kernels.load_rows(factor, stored, copy->at(), padded_depth);
        }
        const int64_t ahead = item + at::get_num_threads();  // the block that this thread will probably take next
        kernels.linear(factor, {copied ? copy->at() : stored.source, copied ? padded_depth : weight.stride(0), count, packed.at(),
                                tokens, depth, wide_bias == nullptr ? nullptr : wide_bias + feature, kind, type,
                                added == nullptr ? nullptr : added + (first * added_stride + feature) * element, added_stride,
                                to + (first * features + feature) * element, features,
                                in_place && (ahead + 1) * block <= features ? weights + ahead * block * weight_row : nullptr});
      }
    });
  }
  return out;
}

}  // namespace madtp::cpu
