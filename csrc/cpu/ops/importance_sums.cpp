#include "cpu/ops/importance_sums.h"

#include <ATen/ops/empty.h>

#include <cmath>

namespace madtp::cpu {

namespace {

// Blocks of a short sample, for the sake of threads; and chunks of a long one, for the sake of memory: the partial sums
// take at most kMostChunks floats per token.
constexpr int64_t kLeastBlocks = 8;
constexpr int64_t kMostChunks = 64;

constexpr int64_t kTokensPerItem = 128;

int64_t partial_stride(int64_t length) { return round_up(length, 16); }

}  // namespace

ImportanceSums::ImportanceSums(const CpuKernels& kernels, const Layout& layout, const Offsets& offsets, int64_t heads,
                               int64_t total_rows)
    : kernels_(kernels),
      offsets_(offsets),
      heads_(heads),
      total_rows_(total_rows),
      first_weights_(heads * offsets.total() * 4) {
  int64_t floats = 0;
  for (int64_t b = 0; b < offsets.samples; ++b) {
    blocks_.emplace_back(layout, offsets.length(b), offsets.length(b), kLeastBlocks);
    partial_start_.push_back(floats);
    floats += chunk_count(b) * partial_stride(offsets.length(b));
  }
  partial_ = Buffer(floats * 4);
}

int64_t ImportanceSums::blocks_per_chunk(int64_t b) const { return (blocks_[b].count + kMostChunks - 1) / kMostChunks; }

int64_t ImportanceSums::chunk_count(int64_t b) const {
  return blocks_[b].count == 0 ? 0 : (blocks_[b].count + blocks_per_chunk(b) - 1) / blocks_per_chunk(b);
}

std::vector<ImportanceSums::Chunk> ImportanceSums::chunks(const std::vector<int64_t>& samples) const {
  std::vector<Chunk> chunks;
  for (const int64_t b : samples) {
    for (int64_t chunk = 0; chunk < chunk_count(b); ++chunk) {
      const int64_t first = chunk * blocks_per_chunk(b);
      chunks.push_back({b, first, std::min(first + blocks_per_chunk(b), blocks_[b].count),
                        partial_.at<float>((partial_start_[b] + chunk * partial_stride(offsets_.length(b))) * 4)});
    }
  }
  return chunks;
}

int64_t ImportanceSums::most_rows(const std::vector<int64_t>& samples) const {
  int64_t most = 0;
  for (const int64_t b : samples) most = std::max(most, blocks_[b].rows);
  return most;
}

void ImportanceSums::spread_nan(const Tensor& lse, int64_t b, int64_t first, int64_t rows, float* sums) const {
  const int64_t length = offsets_.length(b);
  for (int64_t head = 0; head < heads_; ++head) {
    const float* const of_head = lse.const_data_ptr<float>() + head * total_rows_ + offsets_.start(b) + first;
    for (int64_t r = 0; r < rows; ++r) {
      if (!std::isnan(of_head[r])) continue;
      std::fill_n(first + r == 0 ? first_weights(b, head) : sums, length, of_head[r]);
    }
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
    const int64_t start = offsets_.start(b), length = offsets_.length(b);
    const float* partial = partial_.at<float>(partial_start_[b] * 4);
    for (int64_t j = first; j < std::min(first + kTokensPerItem, length); ++j) {
      double sum = 0.0;
      for (int64_t chunk = 0; chunk < chunk_count(b); ++chunk) sum += partial[chunk * partial_stride(length) + j];
      received_data[start + j] = j == 0 ? 0.0f : static_cast<float>(sum);
      cls_data[start + j] =
          j == 0 ? 0.0f
                 : kernels_.norm_weighted_mean(out.type, out.at(start + j, 0), out.head_stride, heads_, out.head_dim,
                                               first_weights(b, 0) + j, offsets_.total());
    }
  });
  return {received, cls};
}

}  // namespace madtp::cpu
