#include "cpu_operands.h"

#include <cmath>
#include <limits>
#include <numeric>

namespace madtp::cpu {

std::vector<int64_t> Offsets::longest_first() const {
  std::vector<int64_t> order(samples);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [this](int64_t a, int64_t b) { return length(a) > length(b); });
  return order;
}

PackedKeys::PackedKeys(const CpuKernels& kernels, const HeadRows& k, const HeadRows* v, const Offsets& offsets,
                       const c10::optional<Tensor>& key_bias)
    : kernels_(kernels) {
  const Factor factor = factor_of(kernels, k.type);
  bytes_ = factor_bytes(factor);
  depth_ = factor == Factor::bf16 ? round_up(k.head_dim, 2) : k.head_dim;
  int64_t key_total = 0, value_total = 0, bias_total = 0;
  for (int64_t b = 0; b < offsets.samples; ++b) {
    const int64_t length = offsets.length(b);
    key_start_.push_back(key_total);
    key_stride_.push_back(round_up(packed_size(kernels, length, k.head_dim) * bytes_, 64));
    key_total += key_stride_[b] * k.heads;
    value_start_.push_back(value_total);
    value_stride_.push_back(v == nullptr ? 0 : round_up(packed_size(kernels, v->head_dim, length) * bytes_, 64));
    value_total += value_stride_[b] * k.heads;
    bias_start_.push_back(bias_total);
    bias_total += round_up(round_up(length, kernels.lanes) * 4, 64);
  }
  keys_ = Buffer(key_total);
  values_ = Buffer(value_total);
  bias_ = Buffer(bias_total);

  const Tensor bias = key_bias.has_value() ? key_bias->to(at::kFloat).contiguous() : Tensor();
  const float* given_bias = key_bias.has_value() ? bias.const_data_ptr<float>() : nullptr;
  for_each_item(offsets.samples * k.heads, [&](int64_t item) {
    const int64_t b = item / k.heads, head = item % k.heads, start = offsets.start(b), length = offsets.length(b);
    if (length == 0) return;
    kernels.pack_transposed(factor, k.rows(start, length, head), keys_.at(key_start_[b] + head * key_stride_[b]));
    if (v != nullptr) {
      kernels.pack(factor, v->rows(start, length, head), values_.at(value_start_[b] + head * value_stride_[b]));
    }
    if (head > 0) return;
    float* padded = bias_.at<float>(bias_start_[b]);
    for (int64_t j = 0; j < length; ++j) {
      padded[j] = given_bias == nullptr ? 0.0f : static_cast<float>(given_bias[start + j] * 1.4426950408889634);
    }
    std::fill(padded + length, padded + round_up(length, kernels.lanes), -std::numeric_limits<float>::infinity());
  });
}

}  // namespace madtp::cpu
