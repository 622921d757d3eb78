#include "cpu_importance_sums.h"

#include <ATen/ops/empty.h>

namespace madtp::cpu {

namespace {

// Blocks of a short sample, for the sake of threads; and chunks of a long one, for the sake of memory: the partial sums
// take at most kMostChunks floats per token.
constexpr int64_t kLeastBlocks = 8;
constexpr int64_t kMostChunks = 64;

constexpr int64_t kTokensPerItem = 128;

}  // namespace

ImportanceSums::ImportanceSums(const CpuKernels& kernels, const Offsets& offsets, int64_t heads, int64_t total_rows)
    : kernels_(kernels),
      offsets_(offsets),
      heads_(heads),
      total_rows_(total_rows),
      first_weights_(heads * offsets.total() * 4) {
  partial_start_.resize(offsets.samples);
  partial_count_.resize(offsets.samples);
  for (int64_t b = 0; b < offsets.samples; ++b) {
    const int64_t length = offsets.length(b);
    blocks_.emplace_back(kernels, length, length, kLeastBlocks);
    longest_ = std::max(longest_, length);
    most_rows_ = std::max(most_rows_, length > 0 ? blocks_[b].rows : 0);
  }
  int64_t floats = 0;
  for (const int64_t b : offsets.longest_first()) {
    const int64_t count = blocks_[b].count, per_chunk = (count + kMostChunks - 1) / kMostChunks;
    partial_start_[b] = floats;
    for (int64_t block = 0; block < count; block += per_chunk) {
      chunks_.push_back({b, block, std::min(block + per_chunk, count), nullptr});
      floats += round_up(offsets.length(b), 16);
    }
    partial_count_[b] = count == 0 ? 0 : (count + per_chunk - 1) / per_chunk;
  }
  partial_ = Buffer(floats * 4);
  floats = 0;
  for (Chunk& chunk : chunks_) {
    chunk.sums = partial_.at<float>(floats * 4);
    floats += round_up(offsets.length(chunk.b), 16);
  }
}

std::tuple<Tensor, Tensor> ImportanceSums::finish(const HeadRows& out) const {
  const auto options = at::TensorOptions().dtype(at::kFloat);
  Tensor received = at::empty({total_rows_}, options), cls = at::empty({total_rows_}, options);
  float* const received_data = received.mutable_data_ptr<float>();
  float* const cls_data = cls.mutable_data_ptr<float>();

  std::vector<std::pair<int64_t, int64_t>> items;  // sample, first token
  for (int64_t b = 0; b < offsets_.samples; ++b) {
    for (int64_t j = 0; j < offsets_.length(b); j += kTokensPerItem) items.emplace_back(b, j);
  }
  for_each_item(static_cast<int64_t>(items.size()), [&](int64_t item) {
    const auto [b, first] = items[item];
    const int64_t start = offsets_.start(b), length = offsets_.length(b), row = round_up(length, 16);
    const float* partial = partial_.at<float>(partial_start_[b] * 4);
    for (int64_t j = first; j < std::min(first + kTokensPerItem, length); ++j) {
      float sum = 0.0f;
      for (int64_t chunk = 0; chunk < partial_count_[b]; ++chunk) sum += partial[chunk * row + j];
      received_data[start + j] = j == 0 ? 0.0f : sum;
      cls_data[start + j] =
          j == 0 ? 0.0f
                 : kernels_.norm_weighted_mean(out.type, out.at(start + j, 0), out.head_stride, heads_, out.head_dim,
                                               first_weights(b, 0) + j, offsets_.total());
    }
  });
  return {received, cls};
}

}  // namespace madtp::cpu
