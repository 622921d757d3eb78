#include "cpu_attention_block.h"

#include <algorithm>
#include <cstring>

namespace madtp::cpu {

namespace {

constexpr int64_t kRows = 48;
// Logits, weights and the running maximum of a block should stay in the second-level cache, beside a head's keys and values.
constexpr int64_t kBlockBytes = 400 * 1024;
constexpr int64_t kBytesPerLogit = 12;

}  // namespace

Blocks::Blocks(const CpuKernels& kernels, int64_t queries, int64_t keys, int64_t parts) : queries(queries) {
  const int64_t tile = kernels.tile_rows;
  const int64_t fitting = kBlockBytes / (kBytesPerLogit * std::max<int64_t>(keys, 1)) / tile * tile;
  const int64_t wanted = round_up((queries + parts - 1) / parts, tile);
  rows = std::min({kRows, std::max(fitting, 2 * tile), std::max(wanted, tile)});
  count = (queries + rows - 1) / rows;
}

AttentionCall::Scratch::Scratch(const AttentionCall& call, int64_t rows, int64_t columns)
    : rows_bytes(round_up(rows * round_up(call.q.head_dim, 2) * 4, 64)),
      logits_bytes(round_up(rows * columns * 4, 64)),
      weights_bytes(logits_bytes),
      memory(rows_bytes + logits_bytes + weights_bytes + round_up(rows * 4, 64)) {}

void AttentionCall::run(const Scratch& scratch, const Block& block, const Block* next, float* best,
                        float* first_weights) const {
  const auto [b, head, first, rows] = block;
  const Factor factor = factor_of(kernels, q.type);
  const int64_t bytes = factor_bytes(factor), depth = round_up(q.head_dim, 2);
  const int64_t queries = offsets_q.length(b), keys = offsets_k.length(b), width = stride(b);
  // Whole panels, because the panels before the last have full width.
  const int64_t visible = causal ? first + 1 + keys - queries : keys;
  const int64_t columns = std::clamp<int64_t>(round_up(visible + rows - 1, kernels.panel), 0, keys);

  void* const left = scratch.memory.at();
  float* const logits = scratch.memory.at<float>(scratch.rows_bytes);
  std::byte* const weights = scratch.memory.at<std::byte>(scratch.rows_bytes + scratch.logits_bytes);
  float* const inverse =
      scratch.memory.at<float>(scratch.rows_bytes + scratch.logits_bytes + scratch.weights_bytes);

  const int64_t row = offsets_q.start(b) + first;
  kernels.load_rows(factor, q.rows(row, rows, head), left, depth);
  if (next != nullptr) q.prefetch(offsets_q.start(next->b) + next->first, next->rows, next->head);
  kernels.product(factor, {left, depth, rows}, packed.keys(b, head), columns, q.head_dim, scale, packed.bias(b), logits,
                  width);
  kernels.softmax(factor, {logits, width, rows, columns, visible, weights, inverse,
                           lse.mutable_data_ptr<float>() + head * lse.size(1) + row, best, first_weights});
  if (first_weights != nullptr) std::fill(first_weights + columns, first_weights + keys, 0.0f);
  // The product reads whole tiles of rows.
  const int64_t extra = round_up(rows, kernels.tile_rows) - rows;
  std::memset(weights + rows * width * bytes, 0, static_cast<size_t>(extra * width * bytes));
  const int64_t out_stride = q.heads * q.head_dim;
  std::byte* const to = static_cast<std::byte*>(out.mutable_data_ptr()) +
                        (row * out_stride + head * q.head_dim) * out.element_size();
  kernels.scaled_product(factor, {weights, width, rows}, packed.values(b, head), q.head_dim, columns, keys, inverse,
                         q.type, to, out_stride);
}

}  // namespace madtp::cpu
