// Linear layers with activation and residual sum.
//
//   out[i] = activation(W x[i] + b) + residual[i]          W [N, K] as it is stored
//
// Weights are not packed: they are the left operand of the block products, whose rows may lie anywhere, and the tokens are
// packed instead, some hundred at a time so that they stay in the second-level cache. Where the weights do, too, each thread takes
// tokens of its own through all of them; else the threads share the features. So nothing derived from a weight is kept,
// and a weight that somebody changes is changed. Each sum runs over the depth in one order, whatever the number of rows or
// threads: a row's result has the same bits in any batch.
#include <cstring>
#include <initializer_list>
#include <optional>
#include <string_view>
#include <utility>

#include "cpu/ops/linear.h"
#include "cpu/ops/norm.h"
#include "cpu/ops/operands.h"
#include "cpu/ops/ops.h"

namespace madtp::cpu {

namespace {

// Of an MLP whose features the threads share, through both layers at a time: the hidden activations (four times as wide) then stay in
// the cache and in memory that is used again, instead of fresh pages for every call. 512 to 1024 measured best.
constexpr int64_t kHiddenRows = 1024;
constexpr int64_t kPackedBytes = int64_t{1} << 20, kMostTokens = 1024;  // of tokens, per pass over the weights
// Of a thread that works alone: bytes of weights and of packed rows that its cache holds, and rows at a time, in whole vectors of
// any instruction set.
constexpr int64_t kOwnWeights = int64_t{384} << 10, kOwnPacked = int64_t{512} << 10, kOwnRows = 128, kVector = 16;

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
  Rows(std::byte* data, int64_t stride, int64_t count) : data(data), stride(stride), count(count) {}
  std::byte* data;
  int64_t stride, count;
};

// to = activation(weights * from) + added, of any rows.
class Layer {
 public:
  Layer(const Weights& by, Type type, Activation activation)
      : kernels_(cpu_kernels()),
        factor_(factor_of(kernels_, type)),
        layout_(layout_of(kernels_, factor_)),
        type_(type),
        activation_(activation),
        by_(by),
        weights_(static_cast<const std::byte*>(by.weight.const_data_ptr())),
        features_(by.weight.size(0)),
        depth_(by.weight.size(1)),
        element_(by.weight.element_size()),
        weight_row_(by.weight.stride(0) * element_),
        padded_depth_(round_up(depth_, layout_.depth)),
        blocks_((features_ + layout_.block_features - 1) / layout_.block_features),
        panel_bytes_(packed_size(layout_, kernels_.linear_panel, depth_) * factor_bytes(factor_)),
        in_place_((type == Type::f32 || factor_ == Factor::bf16) && depth_ == padded_depth_) {}

  // What one thread works on.
  int64_t weight_bytes() const { return features_ * padded_depth_ * factor_bytes(factor_); }
  int64_t memory_bytes() const { return panels(kOwnRows) * panel_bytes_; }
  // Whether the weights serve as they are: a copy for every thread and some rows would take longer than the threads wait.
  bool in_place() const { return in_place_; }

  // All threads take part: a pass over the weights for as many tokens as stay in the cache of one.
  void share(const Rows& from, const std::optional<Rows>& added, const Rows& to) const {
    const int64_t most = std::clamp<int64_t>(kPackedBytes / std::max<int64_t>(panel_bytes_, 1), 1, kMostTokens / kernels_.linear_panel);
    const Buffer packed(std::min(most, panels(from.count)) * panel_bytes_);
    for (int64_t first = 0; first < from.count; first += most * kernels_.linear_panel) {
      const int64_t tokens = std::min(from.count - first, most * kernels_.linear_panel);
      for_each_item(panels(tokens), [&](int64_t panel) { pack(from, first, tokens, panel, packed); });
      share_items(blocks_, [&](const auto& next) {
        Buffer copy(0);
        for (int64_t item = next(); item < blocks_; item = next()) {
          multiply(item, packed, first, tokens, added, to, copy, item + at::get_num_threads());
        }
      });
    }
  }

  // One thread does it all.
  void run(const Rows& from, const std::optional<Rows>& added, const Rows& to, const Buffer& packed, Buffer& copy) const {
    for (int64_t panel = 0; panel < panels(from.count); ++panel) pack(from, 0, from.count, panel, packed);
    for (int64_t item = 0; item < blocks_; ++item) multiply(item, packed, 0, from.count, added, to, copy, item + 1);
  }

 private:
  int64_t panels(int64_t tokens) const { return (tokens + kernels_.linear_panel - 1) / kernels_.linear_panel; }

  // A panel of the rows [first, first + tokens).
  void pack(const Rows& from, int64_t first, int64_t tokens, int64_t panel, const Buffer& packed) const {
    const int64_t row = panel * kernels_.linear_panel, count = std::min(kernels_.linear_panel, tokens - row);
    kernels_.pack_transposed(factor_, {from.data + (first + row) * from.stride * element_, type_, from.stride, count, depth_}, 0, count,
                             packed.at(panel * panel_bytes_));
  }

  // A block of features of packed rows. `next`: the block that this thread will probably take then. Weights that are stored as the
  // products want them are read in place, others through a copy of one block.
  void multiply(int64_t item, const Buffer& packed, int64_t first, int64_t tokens, const std::optional<Rows>& added, const Rows& to,
                Buffer& copy, int64_t next) const {
    const int64_t block = layout_.block_features, feature = item * block, count = std::min(block, features_ - feature);
    const RowsToLoad stored{weights_ + feature * weight_row_, type_, by_.weight.stride(0), count, depth_};
    const bool copied = !in_place_ || count % layout_.rows != 0;
    if (copied) {
      if (copy.at() == nullptr) copy = Buffer(round_up(block, layout_.rows) * padded_depth_ * factor_bytes(factor_));
      kernels_.load_rows(factor_, stored, copy.at(), padded_depth_);
    }
    kernels_.linear(factor_, {copied ? copy.at() : stored.source, copied ? padded_depth_ : by_.weight.stride(0), count, packed.at(), tokens,
                              depth_, by_.wide_bias == nullptr ? nullptr : by_.wide_bias + feature, activation_, type_,
                              added ? added->data + (first * added->stride + feature) * element_ : nullptr, added ? added->stride : 0,
                              to.data + (first * to.stride + feature) * element_, to.stride,
                              in_place_ && (next + 1) * block <= features_ ? weights_ + next * block * weight_row_ : nullptr});
  }

  const CpuKernels& kernels_;
  Factor factor_;
  const Layout& layout_;
  Type type_;
  Activation activation_;
  const Weights& by_;
  const std::byte* weights_;
  int64_t features_, depth_, element_;
  int64_t weight_row_;  // in bytes
  int64_t padded_depth_, blocks_, panel_bytes_;
  bool in_place_;
};

// Rows in equal shares, as many for each thread: whole vectors but for the last, and no more than kOwnRows.
struct Shares {
  explicit Shares(int64_t rows) : rows(rows), vectors((rows + kVector - 1) / kVector) {
    const int64_t threads = at::get_num_threads(), most = kOwnRows / kVector * threads;
    items = std::min(vectors, (vectors + most - 1) / most * threads);
    for_all = items >= threads;
  }
  int64_t first(int64_t item) const { return std::min(rows, item * vectors / items * kVector); }

  int64_t rows, vectors, items;
  bool for_all;  // every thread has one
};

// Whether the cache of a thread holds all these layers and the rows that it takes through them.
bool fits_a_thread(std::initializer_list<const Layer*> layers) {
  int64_t weights = 0;
  for (const Layer* layer : layers) {
    if (!layer->in_place() || layer->memory_bytes() > kOwnPacked) return false;
    weights += layer->weight_bytes();
  }
  return weights <= kOwnWeights;
}

// Whether each thread takes rows of its own through these layers; else they share the features.
bool each_takes_rows(const Shares& shares, std::initializer_list<const Layer*> layers) {
  return shares.for_all && fits_a_thread(layers);
}

// The rows that a thread takes, after a LayerNorm where there is one: then in memory of the thread's own.
class Entering {
 public:
  Entering(const Tensor& x, Type type, const Norm& norm)
      : x_(x), type_(type), norm_(norm), memory_(norm ? kOwnRows * x.size(1) * x.element_size() : 0) {}

  Rows rows(int64_t first, int64_t count) const {
    const Rows stored(x_, first, count);
    if (!norm_) return stored;
    const int64_t element = x_.element_size(), width = x_.size(1);
    norm_.run(type_, stored.data, stored.stride * element, memory_.at<std::byte>(), width * element, count);
    return {memory_.at<std::byte>(), width, count};
  }

 private:
  const Tensor& x_;
  Type type_;
  const Norm& norm_;
  Buffer memory_;
};

int64_t checked_rows(const Tensor& x, const OptionalTensor& cu_seqlens) {
  check_rows("x", x, 2);
  return cu_seqlens.has_value() ? Offsets("cu_seqlens", *cu_seqlens, x.size(0)).total() : x.size(0);
}

}  // namespace

Tensor normed_linear(const Tensor& x, const Norm& norm, const Tensor& weight, const OptionalTensor& bias,
                     const OptionalTensor& cu_seqlens, std::string_view activation, const OptionalTensor& residual) {
  const Type type = type_of("x", x);
  const Activation kind = activation_of(activation);
  const int64_t rows = checked_rows(x, cu_seqlens);
  const Weights weights("weight", weight, "bias", bias, x, x.size(1));
  const int64_t features = weight.size(0);
  const OptionalTensor added = with_rows(residual);
  check_operand("residual", added, {x.size(0), features}, x.scalar_type());
  Tensor out = empty_result({x.size(0), features}, x.options());
  if (rows == 0 || features == 0) return out;
  const Layer layer(weights, type, kind);
  const auto residual_of = [&](int64_t first, int64_t count) {
    return added ? std::optional<Rows>({*added, first, count}) : std::nullopt;
  };
  const Shares shares(rows);
  if (!each_takes_rows(shares, {&layer})) {
    const Tensor entering = norm ? norm.of(x, rows) : x;
    layer.share({entering, 0, rows}, residual_of(0, rows), {out, 0, rows});
    return out;
  }
  share_items(shares.items, [&](const auto& next) {
    const Entering entering(x, type, norm);
    const Buffer packed(layer.memory_bytes());
    Buffer copy(0);
    for (int64_t item = next(); item < shares.items; item = next()) {
      const int64_t row = shares.first(item), count = shares.first(item + 1) - row;
      layer.run(entering.rows(row, count), residual_of(row, count), {out, row, count}, packed, copy);
    }
  });
  return out;
}

Tensor linear(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& cu_seqlens,
              std::string_view activation, const OptionalTensor& residual) {
  return normed_linear(x, Norm(), weight, bias, cu_seqlens, activation, residual);
}

Tensor mlp(const Tensor& x, const Tensor& weight1, const OptionalTensor& bias1, const Tensor& weight2, const OptionalTensor& bias2,
           const OptionalTensor& cu_seqlens, std::string_view activation, const Tensor& residual, const OptionalTensor& norm_weight,
           const OptionalTensor& norm_bias, double norm_eps, bool norm_first) {
  const Type type = type_of("x", x);
  const Activation kind = activation_of(activation);
  const int64_t rows = checked_rows(x, cu_seqlens);
  const Weights first("weight1", weight1, "bias1", bias1, x, x.size(1)), second("weight2", weight2, "bias2", bias2, x, weight1.size(0));
  const int64_t hidden_features = weight1.size(0), features = weight2.size(0);
  const Tensor added = with_rows(residual);
  check_operand("residual", added, {x.size(0), features}, x.scalar_type());
  const Norm norm("norm_", norm_weight, norm_bias, norm_eps, norm_first ? x.size(1) : features);
  const Norm none, &before = norm_first ? norm : none;
  Tensor out = empty_result({x.size(0), features}, x.options());
  if (rows == 0 || features == 0) return out;
  const Layer to_hidden(first, type, kind), to_out(second, type, Activation::none);
  const Shares shares(rows);
  if (!each_takes_rows(shares, {&to_hidden, &to_out})) {
    const Tensor entering = before ? before.of(x, rows) : x;
    const Tensor hidden = empty_result({std::min(rows, kHiddenRows), hidden_features}, x.options());
    for (int64_t row = 0; row < rows; row += kHiddenRows) {
      const int64_t count = std::min(kHiddenRows, rows - row);
      to_hidden.share({entering, row, count}, std::nullopt, {hidden, 0, count});
      to_out.share({hidden, 0, count}, Rows(added, row, count), {out, row, count});
    }
  } else {
    share_items(shares.items, [&](const auto& next) {
      const Entering entering(x, type, before);
      const Buffer packed(to_hidden.memory_bytes()), packed_hidden(to_out.memory_bytes());
      const Buffer hidden(kOwnRows * hidden_features * x.element_size());
      Buffer copy(0), copy_to_out(0);
      for (int64_t item = next(); item < shares.items; item = next()) {
        const int64_t row = shares.first(item), count = shares.first(item + 1) - row;
        const Rows activated(hidden.at<std::byte>(), hidden_features, count);
        to_hidden.run(entering.rows(row, count), std::nullopt, activated, packed, copy);
        to_out.run(activated, Rows(added, row, count), {out, row, count}, packed_hidden, copy_to_out);
      }
    });
  }
  return norm && !norm_first ? norm.of(out, rows) : out;
}

Tensor embed_patches(const Tensor& images, const Tensor& weight, const OptionalTensor& bias, const Tensor& cls,
                     const Tensor& positions) {
  const Type type = type_of("images", images);
  TORCH_CHECK_VALUE(images.device().is_cpu() && images.dim() == 4 && images.is_contiguous(),
                    "images: expected contiguous [B, C, H, W] on cpu, got ", images.sizes(), " on ", images.device());
  TORCH_CHECK_VALUE(weight.dim() == 4 && weight.size(2) > 0, "weight: expected [D, C, p, p], got ", weight.sizes());
  const int64_t samples = images.size(0), channels = images.size(1), height = images.size(2), width = images.size(3);
  const int64_t features = weight.size(0), side = weight.size(2), columns = width / side, patches = height / side * columns;
  TORCH_CHECK_VALUE(height % side == 0 && width % side == 0, "images: ", height, " x ", width, " pixels are no patches of ", side);
  check_operand("weight", weight, {features, channels, side, side}, images.scalar_type());
  check_operand("cls", cls, {features}, images.scalar_type());
  check_operand("positions", positions, {patches + 1, features}, images.scalar_type());
  const Weights weights("weight", weight.flatten(1), "bias", bias, images, channels * side * side);
  const Layer layer(weights, type, Activation::none);
  // In half precision a token would be rounded once, which is twice where its position is added later.
  if (type != Type::f32 || !fits_a_thread({&layer})) return Tensor();
  const int64_t depth = channels * side * side, element = images.element_size(), run = side * element, length = patches + 1;
  const Tensor added = with_rows(positions), first_token = cls.add(positions.select(0, 0)).contiguous();
  Tensor out = empty_result({samples * length, features}, images.options());
  if (features == 0) return out;
  const Shares shares(patches);
  const auto* const pixels = static_cast<const std::byte*>(images.const_data_ptr());
  // A row of a patch after the other, channel by channel, as in the weights.
  constexpr int64_t kVectorBytes = 32;  // a size that the compiler knows is copied without a call
  const auto cut = [&](int64_t sample, int64_t patch, std::byte* to) {
    const int64_t corner = patch / columns * side * width + patch % columns * side;
    for (int64_t channel = 0; channel < channels; ++channel) {
      const std::byte* from = pixels + ((sample * channels + channel) * height * width + corner) * element;
      for (int64_t y = 0; y < side; ++y, from += width * element, to += run) {
        if (run % kVectorBytes != 0) {
          std::memcpy(to, from, run);
        } else {
          for (int64_t i = 0; i < run; i += kVectorBytes) std::memcpy(to + i, from + i, kVectorBytes);
        }
      }
    }
  };
  share_items(samples * std::max<int64_t>(shares.items, 1), [&](const auto& next) {
    const Buffer rows(kOwnRows * depth * element), packed(layer.memory_bytes());
    Buffer copy(0);
    const int64_t parts = std::max<int64_t>(shares.items, 1);
    for (int64_t item = next(); item < samples * parts; item = next()) {
      const int64_t sample = item / parts, part = item % parts, start = sample * length;
      if (part == 0) std::memcpy(Rows(out, start, 1).data, first_token.const_data_ptr(), features * element);
      if (patches == 0) continue;
      const int64_t first = shares.first(part), count = shares.first(part + 1) - first;
      for (int64_t patch = 0; patch < count; ++patch) cut(sample, first + patch, rows.at<std::byte>(patch * depth * element));
      layer.run({rows.at<std::byte>(), depth, count}, Rows(added, 1 + first, count), {out, start + 1 + first, count}, packed, copy);
    }
  });
  return out;
}

}  // namespace madtp::cpu
