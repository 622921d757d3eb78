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

// Of an MLP, through both layers at a time: the hidden activations (four times as wide) then stay in the cache and in memory that
// is used again, instead of fresh pages for every call. 512 to 1024 measured best.
constexpr int64_t kHiddenRows = 1024;
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

// A product's operands, checked against each other: a weight of others may lie by columns, as linear algebra returns them.
struct Weights {
  Weights(const char* name, const Tensor& weight, const char* bias_name, const OptionalTensor& bias, const Tensor& x, int64_t depth)
      : weight(with_rows(weight)) {
    TORCH_CHECK_VALUE(weight.dim() == 2, name, ": expected two dimensions, got ", weight.sizes());
    check_operand(name, weight, {weight.size(0), depth}, x.scalar_type());
    check_operand(bias_name, bias, {weight.size(0)}, x.scalar_type());
    if (!bias.has_value()) return;
    const Tensor wide = bias->to(at::kFloat).contiguous();
    bias_memory = Buffer(round_up(weight.size(0), 64) * 4);
    std::copy_n(wide.const_data_ptr<float>(), weight.size(0), bias_memory.at<float>());
    wide_bias = bias_memory.at<float>();
  }

  Tensor weight;
  Buffer bias_memory{0};
  const float* wide_bias = nullptr;  // float32, padded to whole vectors
};

// Rows [first, first + count) of a matrix of adjacent elements.
struct Rows {
  Rows(const Tensor& tensor, int64_t first, int64_t count)
      : data(static_cast<std::byte*>(const_cast<void*>(tensor.const_data_ptr())) + first * tensor.stride(0) * tensor.element_size()),
        stride(tensor.stride(0)),
        count(count) {}
  std::byte* data;
  int64_t stride, count;
};

// to = activation(weights * from) + added
void multiply(const Rows& from, Type type, const Weights& by, Activation activation, const std::optional<Rows>& added, const Rows& to) {
  const CpuKernels& kernels = cpu_kernels();
  const Factor factor = factor_of(kernels, type);
  const Layout& layout = layout_of(kernels, factor);
  const int64_t features = by.weight.size(0), depth = by.weight.size(1), element = by.weight.element_size();
  const auto* const weights = static_cast<const std::byte*>(by.weight.const_data_ptr());

  // Weights that are stored as the products want them are read in place, others through a copy of one block.
  const int64_t block = layout.block_features, blocks = (features + block - 1) / block;
  const int64_t padded_depth = round_up(depth, layout.depth), weight_row = by.weight.stride(0) * element;
  const bool in_place = (type == Type::f32 || factor == Factor::bf16) && depth == padded_depth;
  const int64_t panel_bytes = packed_size(layout, kernels.linear_panel, depth) * factor_bytes(factor);
  const int64_t panels_most = std::clamp<int64_t>(kPackedBytes / std::max<int64_t>(panel_bytes, 1), 1, kMostTokens / kernels.linear_panel);
  const int64_t panels_all = (from.count + kernels.linear_panel - 1) / kernels.linear_panel;

  const Buffer packed(std::min(panels_all, panels_most) * panel_bytes);
  for (int64_t first_panel = 0; first_panel < panels_all; first_panel += panels_most) {
    const int64_t first = first_panel * kernels.linear_panel, panels = std::min(panels_most, panels_all - first_panel);
    const int64_t tokens = std::min(from.count - first, panels * kernels.linear_panel);
    for_each_item(panels, [&](int64_t panel) {
      const int64_t row = first + panel * kernels.linear_panel, count = std::min(kernels.linear_panel, from.count - row);
      kernels.pack_transposed(factor, {from.data + row * from.stride * element, type, from.stride, count, depth}, 0, count,
                              packed.at(panel * panel_bytes));
    });
    share_items(blocks, [&](const auto& next) {
      std::optional<Buffer> copy;
      for (int64_t item = next(); item < blocks; item = next()) {
        const int64_t feature = item * block, count = std::min(block, features - feature);
        const RowsToLoad stored{weights + feature * weight_row, type, by.weight.stride(0), count, depth};
        const bool copied = !in_place || count % layout.rows != 0;
        if (copied) {
          if (!copy) copy.emplace(round_up(block, layout.rows) * padded_depth * factor_bytes(factor));
          kernels.load_rows(factor, stored, copy->at(), padded_depth);
        }
        const int64_t ahead = item + at::get_num_threads();  // the block that this thread will probably take next
        kernels.linear(factor, {copied ? copy->at() : stored.source, copied ? padded_depth : by.weight.stride(0), count, packed.at(),
                                tokens, depth, by.wide_bias == nullptr ? nullptr : by.wide_bias + feature, activation, type,
                                added ? added->data + (first * added->stride + feature) * element : nullptr,
                                added ? added->stride : 0, to.data + (first * to.stride + feature) * element, to.stride,
                                in_place && (ahead + 1) * block <= features ? weights + ahead * block * weight_row : nullptr});
      }
    });
  }
}

int64_t checked_rows(const Tensor& x, const OptionalTensor& cu_seqlens) {
  check_rows("x", x, 2);
  return cu_seqlens.has_value() ? Offsets("cu_seqlens", *cu_seqlens, x.size(0)).total() : x.size(0);
}

}  // namespace

Tensor linear(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& cu_seqlens,
              std::string_view activation, const OptionalTensor& residual) {
  const Type type = type_of("x", x);
  const Activation kind = activation_of(activation);
  const int64_t rows = checked_rows(x, cu_seqlens);
  const Weights weights("weight", weight, "bias", bias, x, x.size(1));
  const int64_t features = weight.size(0);
  const OptionalTensor added = with_rows(residual);
  check_operand("residual", added, {x.size(0), features}, x.scalar_type());
  Tensor out = at::empty({x.size(0), features}, x.options());
  if (rows == 0 || features == 0) return out;
  expect_large_pages(out.mutable_data_ptr(), rows * features * x.element_size());
  multiply({x, 0, rows}, type, weights, kind, added ? std::optional<Rows>({*added, 0, rows}) : std::nullopt, {out, 0, rows});
  return out;
}

Tensor mlp(const Tensor& x, const Tensor& weight1, const OptionalTensor& bias1, const Tensor& weight2, const OptionalTensor& bias2,
           const OptionalTensor& cu_seqlens, std::string_view activation, const Tensor& residual) {
  const Type type = type_of("x", x);
  const Activation kind = activation_of(activation);
  const int64_t rows = checked_rows(x, cu_seqlens);
  const Weights first("weight1", weight1, "bias1", bias1, x, x.size(1)), second("weight2", weight2, "bias2", bias2, x, weight1.size(0));
  const int64_t hidden_features = weight1.size(0), features = weight2.size(0);
  const Tensor added = with_rows(residual);
  check_operand("residual", added, {x.size(0), features}, x.scalar_type());
  Tensor out = at::empty({x.size(0), features}, x.options());
  if (rows == 0 || features == 0) return out;
  expect_large_pages(out.mutable_data_ptr(), rows * features * x.element_size());
  const Tensor hidden = at::empty({std::min(rows, kHiddenRows), hidden_features}, x.options());
  for (int64_t row = 0; row < rows; row += kHiddenRows) {
    const int64_t count = std::min(kHiddenRows, rows - row);
    multiply({x, row, count}, type, first, kind, std::nullopt, {hidden, 0, count});
    multiply({hidden, 0, count}, type, second, Activation::none, Rows(added, row, count), {out, row, count});
  }
  return out;
}

}  // namespace madtp::cpu
