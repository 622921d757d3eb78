// Choosing tokens by score, and merging them into others of their sample.
//
// lowest_tokens: of every sample the free tokens with the lowest scores, so many at most and up to a threshold.
// merge_tokens:
//
//   values[r] = sum_i w_i x_i / sum_i w_i       over the members i of row r: a kept token and those merged into it
//   appended row = sum_i w_i x_i, or that / (sum_i w_i + 1e-8)            over the tokens of a sample that are in no other row
//
// Two passes: number the rows of every sample and list their members, then make the rows, each in one thread and in the order
// of its members. A row that is alone, or without weight, is copied.
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <cstring>
#include <limits>

#include "cpu/ops/merging.h"
#include "cpu/ops/operands.h"
#include "cpu/ops/ops.h"

namespace madtp::cpu {

namespace {

constexpr int64_t kRows = 64;
constexpr float kEps = 1e-8f;

}  // namespace

Choice::Choice(const OptionalTensor& count, int64_t samples, std::optional<double> threshold, double share, int64_t uncounted)
    : most_(threshold.has_value() ? static_cast<float>(*threshold) : std::numeric_limits<float>::infinity()),
      share_(static_cast<float>(share)),
      uncounted_(uncounted) {
  check_operand("count", count, {samples}, at::kInt);
  if (count.has_value()) counts_ = count->contiguous();
}

void Choice::choose(int64_t b, int64_t first, int64_t last, const float* score, const bool* may, bool* goes) const {
  std::vector<int64_t> rows;
  for (int64_t row = first; row < last; ++row) {
    goes[row] = false;
    if (may[row] && score[row] <= most_) rows.push_back(row);
  }
  const auto counted = static_cast<float>(std::max<int64_t>(last - first - uncounted_, 0));
  auto number = static_cast<size_t>(counted * share_);  // in the precision of every backend
  if (counts_.defined()) number = std::min(number, static_cast<size_t>(std::max(counts_.const_data_ptr<int32_t>()[b], 0)));
  if (number < rows.size()) {
    const auto before = [score](int64_t a, int64_t c) { return score[a] != score[c] ? score[a] < score[c] : a > c; };
    std::nth_element(rows.begin(), rows.begin() + static_cast<std::ptrdiff_t>(number), rows.end(), before);
    rows.resize(number);
  }
  for (const int64_t row : rows) goes[row] = true;
}

Tensor lowest_tokens(const Tensor& scores, const OptionalTensor& count, const Tensor& cu_seqlens, const Tensor& free,
                     std::optional<double> threshold, double share, int64_t uncounted) {
  check_operand("scores", scores, {scores.numel()}, at::kFloat);
  const Offsets offsets("cu_seqlens", cu_seqlens, scores.size(0));
  const Choice choice(count, offsets.samples, threshold, share, uncounted);
  check_operand("free", free, {scores.size(0)}, at::kBool);
  const Tensor scores_dense = scores.contiguous(), free_dense = free.contiguous();
  const float* const score = scores_dense.const_data_ptr<float>();
  const bool* const may = free_dense.const_data_ptr<bool>();
  Tensor chosen = at::zeros({scores.size(0)}, free.options());
  bool* const goes = chosen.mutable_data_ptr<bool>();
  for_each_item(offsets.samples, [&](int64_t b) {
    choice.choose(b, offsets.start(b), offsets.start(b) + offsets.length(b), score, may, goes);
  });
  return chosen;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, std::vector<Tensor>> merge_tokens(
    const Tensor& x, const Tensor& into, const Tensor& weights, const Tensor& sizes, const Tensor& cu_seqlens, int64_t,
    const std::string& append, bool exact, const std::vector<Tensor>& carry) {
  const CpuKernels& kernels = cpu_kernels();
  const Type type = type_of("x", x);
  check_rows("x", x, 2);
  const Offsets offsets("cu_seqlens", cu_seqlens, x.size(0));
  check_operand("into", into, {x.size(0)}, at::kInt);
  check_operand("weights", weights, {x.size(0)}, at::kFloat);
  check_operand("sizes", sizes, {x.size(0)}, at::kFloat);
  for (const Tensor& tensor : carry) {
    TORCH_CHECK_VALUE(tensor.device().is_cpu() && tensor.dim() > 0 && tensor.size(0) == x.size(0), "carry: expected [",
                      x.size(0), ", ...] on cpu, got ", tensor.sizes(), " on ", tensor.device());
  }
  const Tensor into_dense = into.contiguous(), weights_dense = weights.contiguous(), sizes_dense = sizes.contiguous();
  const int32_t* const to = into_dense.const_data_ptr<int32_t>();
  const float* const weight = weights_dense.const_data_ptr<float>();
  const float* const size = sizes_dense.const_data_ptr<float>();
  const int64_t width = x.size(1), capacity = x.size(0), tokens = offsets.total();

  // Number.
  Tensor cu_out = at::empty({offsets.samples + 1}, cu_seqlens.options());
  int32_t* const starts = cu_out.mutable_data_ptr<int32_t>();
  std::vector<char> appends(offsets.samples, 0);
  starts[0] = 0;
  for (int64_t b = 0; b < offsets.samples; ++b) {
    int32_t kept = 0;
    for (int64_t i = offsets.start(b); i < offsets.start(b) + offsets.length(b); ++i) {
      TORCH_CHECK_VALUE(to[i] == -1 || (offsets.start(b) <= to[i] && to[i] < offsets.start(b) + offsets.length(b) && to[to[i]] == to[i]),
                        "into: expected -1 or a row of the same sample that stays, got ", to[i], " for token ", i);
      kept += to[i] == i;
      if (to[i] < 0 && !append.empty()) appends[b] = 1;
    }
    starts[b + 1] = starts[b] + kept + appends[b];
  }
  const int64_t count = starts[offsets.samples], rows_out = exact ? count : capacity;
  Tensor rows = at::full({capacity}, -1, cu_seqlens.options());
  Tensor source = at::full({rows_out}, -1, cu_seqlens.options());
  int32_t* const row_of = rows.mutable_data_ptr<int32_t>();
  int32_t* const own = source.mutable_data_ptr<int32_t>();
  std::vector<int64_t> first(count + 1, 0);  // of a row's members
  std::vector<int64_t> members(tokens);
  for_each_item(offsets.samples, [&](int64_t b) {
    const int64_t start = offsets.start(b), end = start + offsets.length(b);
    int32_t next = starts[b];
    for (int64_t i = start; i < end; ++i) {
      if (to[i] != i) continue;
      own[next] = static_cast<int32_t>(i);
      row_of[i] = next++;
    }
    for (int64_t i = start; i < end; ++i) {
      if (to[i] != i) row_of[i] = to[i] >= 0 ? row_of[to[i]] : appends[b] ? starts[b + 1] - 1 : -1;
      if (row_of[i] >= 0) ++first[row_of[i] + 1];
    }
  });
  for (int64_t r = 0; r < count; ++r) first[r + 1] += first[r];
  for_each_item(offsets.samples, [&](int64_t b) {
    std::vector<int64_t> at(first.begin() + starts[b], first.begin() + starts[b + 1]);
    for (int64_t i = offsets.start(b); i < offsets.start(b) + offsets.length(b); ++i) {
      if (row_of[i] >= 0) members[at[row_of[i] - starts[b]]++] = i;
    }
  });

  // Make.
  Tensor values = empty_result({rows_out, width}, x.options());
  Tensor sizes_out = at::empty({rows_out}, sizes.options());
  float* const sizes_to = sizes_out.mutable_data_ptr<float>();
  // Carried rows are moved as bytes.
  struct Carried {
    Tensor source;
    const std::byte* from;
    std::byte* to;
    size_t row_bytes;
  };
  std::vector<Carried> followers;
  std::vector<Tensor> carried;
  for (const Tensor& tensor : carry) {
    const Tensor dense = tensor.contiguous();
    auto sizes_carried = dense.sizes().vec();
    sizes_carried[0] = rows_out;
    carried.push_back(at::empty(sizes_carried, dense.options()));
    const size_t row_bytes = capacity == 0 ? 0 : dense.nbytes() / static_cast<size_t>(capacity);
    followers.push_back({dense, static_cast<const std::byte*>(dense.const_data_ptr()),
                         static_cast<std::byte*>(carried.back().mutable_data_ptr()), row_bytes});
  }
  const auto* const from = static_cast<const std::byte*>(x.const_data_ptr());
  auto* const result = static_cast<std::byte*>(values.mutable_data_ptr());
  const int64_t from_stride = x.stride(0) * x.element_size(), row_bytes = width * x.element_size();
  share_items((count + kRows - 1) / kRows, [&](const auto& next) {
    const Buffer memory(round_up(width, 16) * 4);
    float* const sums = memory.at<float>();
    for (int64_t item = next(); item * kRows < count; item = next()) {
      for (int64_t r = item * kRows; r < std::min((item + 1) * kRows, count); ++r) {
        float total = 0.0f, total_size = 0.0f;
        for (int64_t m = first[r]; m < first[r + 1]; ++m) {
          total += weight[members[m]];
          total_size += size[members[m]];
        }
        sizes_to[r] = total_size;
        for (const Carried& follower : followers) {
          std::byte* const to_row = follower.to + static_cast<size_t>(r) * follower.row_bytes;
          if (own[r] < 0) {
            std::memset(to_row, 0, follower.row_bytes);
          } else {
            std::memcpy(to_row, follower.from + static_cast<size_t>(own[r]) * follower.row_bytes, follower.row_bytes);
          }
        }
        if (own[r] >= 0 && (first[r + 1] - first[r] == 1 || total == 0.0f)) {
          std::memcpy(result + r * row_bytes, from + own[r] * from_stride, static_cast<size_t>(row_bytes));
          continue;
        }
        std::fill_n(sums, width, 0.0f);
        for (int64_t m = first[r]; m < first[r + 1]; ++m) {
          kernels.accumulate_row(type, from + members[m] * from_stride, weight[members[m]], sums, width);
        }
        const float scale = own[r] >= 0 ? 1.0f / total : append == "sum" ? 1.0f : 1.0f / (total + kEps);
        kernels.store_scaled(type, sums, scale, result + r * row_bytes, width);
      }
    }
  });
  return {values, cu_out, sizes_out, rows, source, carried};
}

}  // namespace madtp::cpu
