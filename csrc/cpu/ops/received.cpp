// Attention that tokens receive from chosen queries of their sample, for sets of heads.
//
//   received[s, j] = sum_i f_h exp(s_hij - lse_hi)    over the chosen queries i; f: maximum or mean over the heads h of set s
//
// A work item is a few panels of keys of one sample and one set. It packs them for its heads and walks over the chosen queries
// in blocks; the maximum is taken before the exponential. One item makes the whole sum of a key, in one order.
#include <ATen/ops/empty.h>

#include <limits>

#include "cpu/ops/operands.h"
#include "cpu/ops/ops.h"

namespace madtp::cpu {

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr int64_t kBlock = 48;    // queries
constexpr int64_t kColumns = 64;  // keys of an item, about

int64_t edge(int64_t position, int64_t length) {
  return std::clamp<int64_t>(position < 0 ? position + length : position, 0, length);
}

struct ReceivedCall {
  const CpuKernels& kernels;
  const HeadRows& q;
  const HeadRows& k;
  const Offsets& offsets;
  const float* lse;  // [H, C]
  int64_t capacity;
  const float* key_bias;
  float scale;
  bool causal, mean;
  const Layout& layout;
  int64_t heads, group;  // of a set; query heads that share a key head
  Factor factor;
  int64_t panels, depth, panel_bytes;

  struct Item {
    int64_t b, set, first;  // keys from `first` on
  };

  struct Scratch {
    explicit Scratch(const ReceivedCall& call)
        : packed(call.heads * call.panels * call.panel_bytes),
          left((kBlock + call.layout.rows) * call.depth * factor_bytes(call.factor)),
          tile(call.panels * round_up(kBlock, call.layout.rows) * call.kernels.panel * 4),
          bias(call.panels * call.kernels.panel * 4),
          lse((kBlock + call.layout.rows) * 4) {}
    Buffer packed, left, tile, bias, lse;
  };

  int64_t columns(const Item& item) const {
    return std::min(panels * kernels.panel, offsets.length(item.b) - item.first);
  }
  float* tile(const Scratch& scratch, int64_t panel) const {
    return scratch.tile.at<float>(panel * round_up(kBlock, layout.rows) * kernels.panel * 4);
  }

  void pack(const Scratch& scratch, const Item& item) const {
    const int64_t start = offsets.start(item.b) + item.first, count = columns(item);
    for (int64_t h = 0; h < heads; ++h) {
      if (h % group != 0) continue;  // the same keys as the head before: a set holds whole groups
      const int64_t head = item.set * heads + h;
      for (int64_t p = 0; p * kernels.panel < count; ++p) {
        const int64_t size = std::min(kernels.panel, count - p * kernels.panel);
        kernels.pack_transposed(factor, k.rows(start + p * kernels.panel, size, head / group), 0, size,
                                scratch.packed.at((h * panels + p) * panel_bytes));
      }
    }
    float* const bias = scratch.bias.at<float>();
    std::fill_n(bias, panels * kernels.panel, -kInfinity);
    for (int64_t j = 0; j < count; ++j) bias[j] = key_bias == nullptr ? 0.0f : key_bias[start + j];
  }

  // Adds what the queries at `rows` (positions in the sample) give to the item's keys.
  void add(const Scratch& scratch, const Item& item, const int64_t* rows, int64_t count, float* received) const {
    const int64_t start = offsets.start(item.b), keys = columns(item);
    const bool contiguous = rows[count - 1] - rows[0] == count - 1;
    const int64_t tile_size = round_up(count, layout.rows) * kernels.panel;
    const auto clear = [&] {
      for (int64_t p = 0; p * kernels.panel < keys; ++p) std::fill_n(tile(scratch, p), tile_size, -kInfinity);
    };
    const auto sum = [&] {
      for (int64_t p = 0; p * kernels.panel < keys; ++p) {
        const int64_t column = item.first + p * kernels.panel, size = std::min(kernels.panel, keys - p * kernels.panel);
        float* const to = received + p * kernels.panel;
        if (!causal || contiguous) {
          const int64_t visible = causal ? rows[0] + 1 - column : size;
          kernels.exp_column_sums(tile(scratch, p), kernels.panel, count, size, visible, to);
          continue;
        }
        for (int64_t r = 0; r < count; ++r) {
          if (rows[r] < column) continue;
          kernels.exp_column_sums(tile(scratch, p) + r * kernels.panel, kernels.panel, 1, size, rows[r] + 1 - column, to);
        }
      }
    };
    float* const offset = scratch.lse.at<float>();
    std::fill_n(offset + count, layout.rows, 0.0f);
    clear();
    for (int64_t h = 0; h < heads; ++h) {
      const int64_t head = item.set * heads + h;
      const int64_t row_bytes = depth * factor_bytes(factor);
      if (contiguous) {
        kernels.load_rows(factor, q.rows(start + rows[0], count, head), scratch.left.at(), depth);
      } else {
        for (int64_t r = 0; r < count; ++r) {
          kernels.load_rows(factor, q.rows(start + rows[r], 1, head), scratch.left.at(r * row_bytes), depth);
        }
      }
      for (int64_t r = 0; r < count; ++r) {
        const float value = lse[head * capacity + start + rows[r]];
        offset[r] = value == -kInfinity ? kInfinity : value;  // a query that sees nothing gives nothing
      }
      for (int64_t p = 0; p * kernels.panel < keys; ++p) {
        kernels.product_maximum(factor, {scratch.left.at(), depth, count},
                                scratch.packed.at(((h - h % group) * panels + p) * panel_bytes),
                                std::min(kernels.panel, keys - p * kernels.panel), q.head_dim, scale,
                                scratch.bias.at<float>(p * kernels.panel * 4), offset, tile(scratch, p), kernels.panel);
      }
      if (mean) {
        sum();
        clear();
      }
    }
    if (!mean) sum();
  }
};

}  // namespace

Tensor attention_received(const Tensor& q, const Tensor& k, const Tensor& lse, const Tensor& cu_seqlens, int64_t, double scale,
                          bool causal, const OptionalTensor& key_bias, const std::string& heads, int64_t sets, int64_t first,
                          int64_t last, const OptionalTensor& queries) {
  const CpuKernels& kernels = cpu_kernels();
  const HeadRows query_rows("q", q), key_rows("k", k);
  const Offsets offsets("cu_seqlens", cu_seqlens, q.size(0));
  check_operand("k", k, {q.size(0), k.size(1), q.size(2)}, q.scalar_type());
  check_operand("lse", lse, {q.size(1), q.size(0)}, at::kFloat);
  check_operand("key_bias", key_bias, {q.size(0)}, at::kFloat);
  check_operand("queries", queries, {q.size(0)}, at::kBool);
  TORCH_CHECK_VALUE(k.size(1) > 0 && q.size(1) % k.size(1) == 0 && sets > 0 && q.size(1) % sets == 0,
                    "k, sets: expected divisors of the ", q.size(1), " query heads, got ", k.size(1), ", ", sets);
  const Tensor lse_dense = lse.contiguous(), mask = queries.has_value() ? queries->contiguous() : Tensor();
  const Tensor bias = key_bias.has_value() ? key_bias->contiguous() : Tensor();
  const bool* const counts = queries.has_value() ? mask.const_data_ptr<bool>() : nullptr;
  const Factor factor = factor_of(kernels, query_rows.type);
  const Layout& layout = layout_of(kernels, factor);
  const int64_t panels = std::max<int64_t>(1, kColumns / kernels.panel);
  const ReceivedCall call{kernels, query_rows, key_rows, offsets, lse_dense.const_data_ptr<float>(), q.size(0),
                          key_bias.has_value() ? bias.const_data_ptr<float>() : nullptr, static_cast<float>(scale), causal,
                          heads == "mean", layout, query_rows.heads / sets, query_rows.heads / key_rows.heads, factor, panels,
                          round_up(q.size(2), layout.depth),
                          round_up(packed_size(layout, kernels.panel, q.size(2)) * factor_bytes(factor), 64)};
  Tensor received = at::empty({sets, q.size(0)}, q.options().dtype(at::kFloat));
  float* const to = received.mutable_data_ptr<float>();
  std::vector<std::vector<int64_t>> chosen(offsets.samples);
  for_each_item(offsets.samples, [&](int64_t b) {
    const int64_t length = offsets.length(b);
    for (int64_t i = edge(first, length); i < edge(last, length); ++i) {
      if (counts == nullptr || counts[offsets.start(b) + i]) chosen[b].push_back(i);
    }
  });
  std::vector<ReceivedCall::Item> items;
  for (const int64_t b : offsets.longest_first()) {
    for (int64_t set = 0; set < sets; ++set) {
      for (int64_t j = 0; j < offsets.length(b); j += panels * kernels.panel) items.push_back({b, set, j});
    }
  }
  share_items(static_cast<int64_t>(items.size()), [&](const auto& next) {
    const ReceivedCall::Scratch scratch(call);
    for (size_t i = next(); i < items.size(); i = next()) {
      const auto& item = items[i];
      float* const sums = to + item.set * q.size(0) + offsets.start(item.b) + item.first;
      const int64_t keys = call.columns(item);
      std::fill_n(sums, keys, 0.0f);
      call.pack(scratch, item);
      const auto& rows = chosen[item.b];
      const auto total = static_cast<int64_t>(rows.size());
      for (int64_t r = 0; r < total; r += kBlock) {
        const int64_t count = std::min(kBlock, total - r);
        if (!causal || rows[r + count - 1] >= item.first) call.add(scratch, item, &rows[r], count, sums);
      }
      if (call.mean) {
        for (int64_t j = 0; j < keys; ++j) sums[j] /= static_cast<float>(call.heads);
      }
    }
  });
  return received;
}

}  // namespace madtp::cpu
