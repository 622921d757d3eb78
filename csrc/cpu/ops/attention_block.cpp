#include "cpu/ops/attention_block.h"

#include <algorithm>

namespace madtp::cpu {

namespace {

// Logits, weights and the running maximum of a block should stay in the second-level cache, beside a head's keys and values.
// As large as that allows: importance takes a block through all heads, whose keys and values together come from the third level.
constexpr int64_t kBlockBytes = 512 * 1024;
constexpr int64_t kBytesPerLogit = 12;

}  // namespace

Blocks::Blocks(const Layout& layout, int64_t queries, int64_t keys, int64_t parts) : queries(queries) {
  const int64_t unit = layout.rows;
  const int64_t fitting = kBlockBytes / (kBytesPerLogit * std::max<int64_t>(keys, 1)) / unit * unit;
  const int64_t wanted = round_up((queries + parts - 1) / parts, unit);
  rows = std::min({layout.block_queries, std::max(fitting, round_up(12, unit)), std::max(wanted, unit)});
  count = (queries + rows - 1) / rows;
}

void AttentionCall::run(const Block& block, const Wanted& wanted, const Buffer& scratch) const {
  const int64_t b = block.b, queries = offsets_q.length(b), keys = offsets_k.length(b);
  const int64_t visible = causal ? block.first + 1 + keys - queries : keys;
  const int64_t seen = std::min(packed.may_skip_unseen(b) ? visible + block.rows - 1 : keys, packed.shown(b));
  const int64_t row = offsets_q.start(b) + block.first, out_stride = q.heads * q.head_dim;
  kernels.attend(
      factor(),
      {.queries = q.rows(row, block.rows, block.head),
       .head_bytes = q.head_stride * q.bytes,
       .heads = block.heads,
       .keys = packed.keys(b, block.head),
       .keys_bytes = packed.keys_bytes(b),
       .values = packed.values(b, block.head),
       .values_bytes = packed.values_bytes(b),
       .bias = packed.bias(b),
       .biased = packed.biased(),
       .length = keys,
       // Whole panels, because the panels before the last have full width.
       .columns = std::clamp<int64_t>(round_up(seen, kernels.panel), 0, keys),
       .visible = visible,
       .scale = scale,
       .out = static_cast<std::byte*>(out.mutable_data_ptr()) +
              (row * out_stride + block.head * q.head_dim) * out.element_size(),
       .out_stride = out_stride,
       .lse = lse.mutable_data_ptr<float>() + block.head * lse.size(1) + row,
       .lse_stride = lse.size(1),
       .best = wanted.best,
       .first_weights = wanted.first_weights,
       .first_stride = wanted.first_stride,
       .scratch = scratch.at<std::byte>()});
}

}  // namespace madtp::cpu
