// MADTP's token importance and pruning threshold.
//
//   G[j, m] = <x_j, dictionary_m> + bias_m           tokens j >= 1 of a sample
//   importance_j = (received_j / (sum received + e) + g_j / (sum g + e) + cls_j) / 3        g_j = max_m G[j, m], e = 1e-8
//   threshold = min_m sum_j W[m, j] importance_j     W[m, :] = softmax_j(G[j, m] / temperature)
//
// The threshold is linear in the three terms. One pass over the tokens keeps, for every m, the running maximum of G and the
// sums of w, w received, w g and w cls with w = exp((G - maximum) / temperature); G exists for one block of tokens at a time.
// A work item is a chunk of a sample's tokens; a sample's chunks are combined in order.
#include <ATen/ops/empty.h>

#include <cmath>
#include <limits>

#include "cpu/ops/operands.h"
#include "cpu/ops/ops.h"

namespace madtp::cpu {

namespace {

constexpr int64_t kBlockTokens = 48;
constexpr int64_t kChunkTokens = 192;
constexpr double kEps = 1e-8;

// Rows of a chunk's state: see ScoreBlock.
enum { kTop, kWeight, kReceived, kBest, kCls, kRows };

struct Chunk {
  int64_t b, first, last;  // tokens [first, last) of the sample
};

// min_m of the threshold's sum; `states` are the sample's chunks, [chunks, kRows, stride].
float threshold_of(const float* states, int64_t chunks, int64_t entries, int64_t stride, double factor,
                   double received_sum, double best_sum) {
  double least = std::numeric_limits<double>::infinity();
  for (int64_t m = 0; m < entries; ++m) {
    float top = -std::numeric_limits<float>::infinity();
    for (int64_t c = 0; c < chunks; ++c) top = std::max(top, states[c * kRows * stride + m]);
    double sums[kRows] = {};
    for (int64_t c = 0; c < chunks; ++c) {
      const float* state = states + c * kRows * stride + m;
      const double rescale = std::exp2((static_cast<double>(state[0]) - top) * factor);
      for (int64_t row = kWeight; row < kRows; ++row) sums[row] += rescale * state[row * stride];
    }
    const double value =
        (sums[kReceived] / (received_sum + kEps) + sums[kBest] / (best_sum + kEps) + sums[kCls]) / sums[kWeight] / 3;
    if (std::isnan(value)) return static_cast<float>(value);
    least = std::min(least, value);
  }
  return static_cast<float>(least);
}

}  // namespace

std::tuple<Tensor, Tensor> score_tokens(const Tensor& x, const Tensor& dictionary, const Tensor& received,
                                        const Tensor& cls, const Tensor& cu_seqlens, int64_t, double temperature,
                                        const OptionalTensor& bias) {
  const CpuKernels& kernels = cpu_kernels();
  const Type type = type_of("x", x);
  const Factor factor = factor_of(kernels, type);
  const Layout& layout = layout_of(kernels, factor);
  check_rows("x", x, 2);
  check_rows("dictionary", dictionary, 2);
  const Offsets offsets("cu_seqlens", cu_seqlens, x.size(0));
  check_operand("dictionary", dictionary, {dictionary.size(0), x.size(1)}, x.scalar_type());
  check_operand("received", received, {x.size(0)}, at::kFloat);
  check_operand("cls", cls, {x.size(0)}, at::kFloat);
  check_operand("bias", bias, {dictionary.size(0)}, at::kFloat);
  const int64_t entries = dictionary.size(0), size = x.size(1), depth = round_up(size, layout.depth);
  const int64_t stride = round_up(entries, kernels.lanes);
  const double log2_factor = 1.4426950408889634 / temperature;
  const Tensor received_dense = received.contiguous(), cls_dense = cls.contiguous();
  const float* const received_data = received_dense.const_data_ptr<float>();
  const float* const cls_data = cls_dense.const_data_ptr<float>();

  const Buffer packed(packed_size(layout, entries, size) * factor_bytes(factor));
  kernels.pack_transposed(
      factor, {dictionary.const_data_ptr(), type_of("dictionary", dictionary), dictionary.stride(0), entries, size}, 0,
      entries, packed.at());
  const Buffer padded_bias(stride * 4);
  std::fill_n(padded_bias.at<float>(), stride, 0.0f);
  if (bias.has_value()) {
    const Tensor dense = bias->to(at::kFloat).contiguous();
    std::copy_n(dense.const_data_ptr<float>(), entries, padded_bias.at<float>());
  }

  Tensor importance = at::empty({x.size(0)}, received.options());
  Tensor threshold = at::empty({offsets.samples}, received.options());
  float* const importance_data = importance.mutable_data_ptr<float>();
  float* const threshold_data = threshold.mutable_data_ptr<float>();

  std::vector<Chunk> chunks;
  std::vector<int64_t> first_chunk;
  for (int64_t b = 0; b < offsets.samples; ++b) {
    first_chunk.push_back(static_cast<int64_t>(chunks.size()));
    for (int64_t j = 1; j < offsets.length(b); j += kChunkTokens) {
      chunks.push_back({b, j, std::min(j + kChunkTokens, offsets.length(b))});
    }
  }
  first_chunk.push_back(static_cast<int64_t>(chunks.size()));
  const Buffer states(static_cast<int64_t>(chunks.size()) * kRows * stride * 4);

  // g goes where the importance will be.
  share_items(static_cast<int64_t>(chunks.size()), [&](const auto& next) {
    const Buffer left(kBlockTokens * depth * factor_bytes(factor)), alignment(kBlockTokens * stride * 4);
    for (size_t item = next(); item < chunks.size(); item = next()) {
      const auto [b, first, last] = chunks[item];
      float* const state = states.at<float>(static_cast<int64_t>(item) * kRows * stride * 4);
      std::fill_n(state, stride, -std::numeric_limits<float>::infinity());
      std::fill_n(state + stride, (kRows - 1) * stride, 0.0f);
      for (int64_t j = first; j < last; j += kBlockTokens) {
        const int64_t token = offsets.start(b) + j, rows = std::min(kBlockTokens, last - j);
        const auto* source = static_cast<const std::byte*>(x.const_data_ptr()) + token * x.stride(0) * x.element_size();
        kernels.load_rows(factor, {source, type, x.stride(0), rows, size}, left.at(), depth);
        kernels.product(factor, {left.at(), depth, rows}, packed.at(), entries, size, padded_bias.at<float>(),
                        alignment.at<float>(), stride);
        kernels.score({alignment.at<float>(), stride, rows, entries, static_cast<float>(log2_factor),
                       received_data + token, cls_data + token, importance_data + token, state});
      }
    }
  });

  for_each_item(offsets.samples, [&](int64_t b) {
    const int64_t start = offsets.start(b), length = offsets.length(b);
    double received_sum = 0, best_sum = 0;
    for (int64_t j = start + 1; j < start + length; ++j) {
      received_sum += received_data[j];
      best_sum += importance_data[j];
    }
    threshold_data[b] =
        length < 2 ? 0.0f
                   : threshold_of(states.at<float>(first_chunk[b] * kRows * stride * 4),
                                  first_chunk[b + 1] - first_chunk[b], entries, stride, log2_factor, received_sum, best_sum);
    if (length > 0) importance_data[start] = 0.0f;
    for (int64_t j = start + 1; j < start + length; ++j) {
      importance_data[j] = static_cast<float>(
          (received_data[j] / (received_sum + kEps) + importance_data[j] / (best_sum + kEps) + cls_data[j]) / 3);
    }
  });
  return {importance, threshold};
}

}  // namespace madtp::cpu
