// Selection, compaction and merging of tokens.
//
// Of a sample's tokens j >= 1 the K kept ones move up behind token 0 in their order, and the dropped ones become one last row,
//   merged = sum_dropped w_j x_j / (sum_dropped w_j + 1e-8),     w_j = importance_j (times size_j).
// Kept: importance > threshold or protected; or, where the count is given or shared by a group, the first K by (protected,
// importance descending, position). A sample stays as it is if K <= min_keep or fewer than two would be dropped.
//
// Three passes: choose (scores only), move (each row of x is read once: copied, or added to the merged row of its chunk, and
// normalised while in cache), and merge (the chunks of a sample are added in order).
#include <ATen/ops/empty.h>

#include <cmath>
#include <cstring>

#include "cpu/ops/norm.h"
#include "cpu/ops/operands.h"
#include "cpu/ops/ops.h"

namespace madtp::cpu {

namespace {

constexpr int64_t kChunkRows = 64;
constexpr float kEps = 1e-8f;

template <class T>
const T* data_or_null(const OptionalTensor& tensor, Tensor& holder) {
  if (!tensor.has_value()) return nullptr;
  holder = tensor->contiguous();
  return holder.const_data_ptr<T>();
}

struct Scores {
  const float* importance;
  const float* threshold;
  const int32_t* keep_count;
  const bool* is_protected;
};

bool passes(const Scores& scores, int64_t b, int64_t row) {
  return scores.importance[row] > scores.threshold[b] || (scores.is_protected != nullptr && scores.is_protected[row]);
}

// How many tokens of the sample its own rule keeps.
int64_t own_count(const Scores& scores, int64_t b, int64_t start, int64_t length) {
  const int64_t prunable = std::max<int64_t>(length - 1, 0);
  if (scores.keep_count != nullptr) return std::clamp<int64_t>(scores.keep_count[b], 0, prunable);
  int64_t count = 0;
  for (int64_t j = 1; j < length; ++j) count += passes(scores, b, start + j);
  return count;
}

// An unsigned key that orders like the float, -0 as 0, and NaN above all, as PyTorch sorts.
uint32_t ordered(float value) {
  if (std::isnan(value)) return ~uint32_t{0};
  value += 0.0f;
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

// Marks the tokens j >= 1 that rank first by (protected, importance descending, position ascending).
void mark_first(const Scores& scores, int64_t start, int64_t length, int64_t count, int32_t* target) {
  struct Rank {
    uint64_t key;
    int64_t position;
  };
  std::vector<Rank> ranks(length - 1);
  for (int64_t j = 1; j < length; ++j) {
    const uint64_t guarded = scores.is_protected != nullptr && scores.is_protected[start + j];
    ranks[j - 1] = {guarded << 32 | ordered(scores.importance[start + j]), j};
  }
  const auto before = [](const Rank& a, const Rank& b) {
    return a.key != b.key ? a.key > b.key : a.position < b.position;
  };
  std::nth_element(ranks.begin(), ranks.begin() + count, ranks.end(), before);
  std::fill_n(target + 1, length - 1, 0);
  for (int64_t i = 0; i < count; ++i) target[ranks[i].position] = 1;
}

constexpr int32_t kDropped = -1;

// Replaces marks by target rows within the sample.
void number_rows(int64_t length, int32_t* target) {
  int32_t row = 0;
  target[0] = row++;
  for (int64_t j = 1; j < length; ++j) target[j] = target[j] != 0 ? row++ : kDropped;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> compact(
    const Tensor& x, const Tensor& importance, const OptionalTensor& threshold, const OptionalTensor& keep_count,
    const Tensor& cu_seqlens, int64_t, const OptionalTensor& is_protected, const OptionalTensor& groups,
    const OptionalTensor& min_keep, const OptionalTensor& ids, const OptionalTensor& sizes, int64_t merged_id,
    const OptionalTensor& norm_weight, const OptionalTensor& norm_bias, double norm_eps, bool exact) {
  TORCH_CHECK(threshold.has_value() != keep_count.has_value(), "exactly one of threshold and keep_count is needed");
  const CpuKernels& kernels = cpu_kernels();
  const Type type = type_of("x", x);
  check_rows("x", x, 2);
  const Offsets offsets("cu_seqlens", cu_seqlens, x.size(0));
  const int64_t tokens = x.size(0), samples = offsets.samples;
  check_operand("importance", importance, {tokens}, at::kFloat);
  check_operand("threshold", threshold, {samples}, at::kFloat);
  check_operand("keep_count", keep_count, {samples}, at::kInt);
  check_operand("protected", is_protected, {tokens}, at::kBool);
  check_operand("groups", groups, {samples}, at::kInt);
  check_operand("min_keep", min_keep, {samples}, at::kInt);
  check_operand("ids", ids, {tokens}, at::kInt);
  check_operand("sizes", sizes, {tokens}, at::kFloat);
  const Norm norm("norm ", norm_weight, norm_bias, norm_eps, x.size(1));
  TORCH_CHECK_VALUE(merged_id == static_cast<int32_t>(merged_id), "merged_id: expected an int32, got ", merged_id);
  Tensor holders[7];
  const Tensor importance_dense = importance.contiguous();
  const Scores scores{importance_dense.const_data_ptr<float>(), data_or_null<float>(threshold, holders[0]),
                      data_or_null<int32_t>(keep_count, holders[1]), data_or_null<bool>(is_protected, holders[2])};
  const int32_t* const group_of = data_or_null<int32_t>(groups, holders[3]);
  const int32_t* const least = data_or_null<int32_t>(min_keep, holders[4]);
  const int32_t* const ids_in = data_or_null<int32_t>(ids, holders[5]);
  const float* const sizes_in = data_or_null<float>(sizes, holders[6]);

  // Choose.
  std::vector<int64_t> counts(offsets.samples);
  for_each_item(offsets.samples, [&](int64_t b) { counts[b] = own_count(scores, b, offsets.start(b), offsets.length(b)); });
  if (group_of != nullptr) {
    for (int64_t b = 0; b < samples; ++b) {
      TORCH_CHECK_VALUE(0 <= group_of[b] && group_of[b] < samples, "groups: expected 0..B-1 = 0..", samples - 1, ", got ",
                        group_of[b], " of sample ", b);
    }
    std::vector<int64_t> largest(offsets.samples, 0);
    for (int64_t b = 0; b < offsets.samples; ++b) largest[group_of[b]] = std::max(largest[group_of[b]], counts[b]);
    for (int64_t b = 0; b < offsets.samples; ++b) {
      counts[b] = std::min(largest[group_of[b]], std::max<int64_t>(offsets.length(b) - 1, 0));
    }
  }
  std::vector<char> pruned(offsets.samples);
  Tensor cu_out = at::empty({offsets.samples + 1}, cu_seqlens.options());
  int32_t* const starts_out = cu_out.mutable_data_ptr<int32_t>();
  starts_out[0] = 0;
  std::vector<int64_t> first_chunk(offsets.samples + 1, 0);  // of the chunks of pruned and unpruned samples alike
  for (int64_t b = 0; b < offsets.samples; ++b) {
    const int64_t length = offsets.length(b);
    pruned[b] = counts[b] > (least == nullptr ? 0 : least[b]) && length - 1 - counts[b] >= 2;
    starts_out[b + 1] = static_cast<int32_t>(starts_out[b] + (pruned[b] ? counts[b] + 2 : length));
    first_chunk[b + 1] = first_chunk[b] + (length + kChunkRows - 1) / kChunkRows;
  }
  const Buffer target_memory(offsets.total() * 4);
  int32_t* const targets = target_memory.at<int32_t>();
  for_each_item(offsets.samples, [&](int64_t b) {
    if (!pruned[b]) return;
    const int64_t start = offsets.start(b), length = offsets.length(b);
    int32_t* const target = targets + start;
    if (group_of != nullptr || scores.keep_count != nullptr) {
      mark_first(scores, start, length, counts[b], target);
    } else {
      for (int64_t j = 1; j < length; ++j) target[j] = passes(scores, b, start + j);
    }
    number_rows(length, target);
  });

  // Move.
  const int64_t rows_out = exact ? starts_out[offsets.samples] : x.size(0), width = x.size(1);
  Tensor values = empty_result({rows_out, width}, x.options());
  Tensor ids_out = at::empty({rows_out}, cu_seqlens.options());
  Tensor sizes_out = at::empty({sizes_in == nullptr ? 0 : rows_out}, importance.options());
  Tensor normed = norm ? empty_result({rows_out, width}, x.options()) : at::empty({0}, x.options());
  const auto* const from = static_cast<const std::byte*>(x.const_data_ptr());
  auto* const to = static_cast<std::byte*>(values.mutable_data_ptr());
  auto* const normed_to = static_cast<std::byte*>(normed.mutable_data_ptr());
  int32_t* const ids_to = ids_out.mutable_data_ptr<int32_t>();
  float* const sizes_to = sizes_in == nullptr ? nullptr : sizes_out.mutable_data_ptr<float>();
  const int64_t row_bytes = width * x.element_size(), from_stride = x.stride(0) * x.element_size();
  const auto normalise_row = [&](int64_t row) {
    if (norm) norm.run(type, to + row * row_bytes, row_bytes, normed_to + row * row_bytes, row_bytes, 1);
  };

  struct Dropped {
    float weight, size;
  };
  const int64_t chunk_count = first_chunk[offsets.samples], partial_stride = round_up(width, 16);
  const Buffer partial_rows(chunk_count * partial_stride * 4);
  std::vector<Dropped> dropped(chunk_count);
  std::vector<int64_t> sample_of(chunk_count);
  for (int64_t b = 0; b < offsets.samples; ++b) {
    std::fill(sample_of.begin() + first_chunk[b], sample_of.begin() + first_chunk[b + 1], b);
  }
  for_each_item(chunk_count, [&](int64_t chunk) {
    const int64_t b = sample_of[chunk], start = offsets.start(b), length = offsets.length(b);
    const int64_t first = (chunk - first_chunk[b]) * kChunkRows, last = std::min(first + kChunkRows, length);
    float* const partial = partial_rows.at<float>(chunk * partial_stride * 4);
    if (pruned[b]) std::fill_n(partial, width, 0.0f);
    Dropped sum{0.0f, 0.0f};
    for (int64_t j = first; j < last; ++j) {
      const int64_t source = start + j, local = pruned[b] ? targets[source] : j;
      if (local == kDropped) {
        const float size = sizes_in == nullptr ? 1.0f : sizes_in[source];
        const float w = scores.importance[source] * size;
        kernels.accumulate_row(type, from + source * from_stride, w, partial, width);
        sum.weight += w;
        sum.size += size;
        continue;
      }
      const int64_t row = starts_out[b] + local;
      std::memcpy(to + row * row_bytes, from + source * from_stride, static_cast<size_t>(row_bytes));
      ids_to[row] = ids_in == nullptr ? static_cast<int32_t>(j) : ids_in[source];
      if (sizes_to != nullptr) sizes_to[row] = sizes_in[source];
      normalise_row(row);
    }
    dropped[chunk] = sum;
  });

  // Merge.
  for_each_item(offsets.samples, [&](int64_t b) {
    if (!pruned[b]) return;
    float* const sum = partial_rows.at<float>(first_chunk[b] * partial_stride * 4);
    Dropped total = dropped[first_chunk[b]];
    for (int64_t chunk = first_chunk[b] + 1; chunk < first_chunk[b + 1]; ++chunk) {
      kernels.accumulate_row(Type::f32, partial_rows.at<float>(chunk * partial_stride * 4), 1.0f, sum, width);
      total.weight += dropped[chunk].weight;
      total.size += dropped[chunk].size;
    }
    const int64_t row = starts_out[b + 1] - 1;
    kernels.store_scaled(type, sum, 1.0f / (total.weight + kEps), to + row * row_bytes, width);
    ids_to[row] = static_cast<int32_t>(merged_id);
    if (sizes_to != nullptr) sizes_to[row] = total.size;
    normalise_row(row);
  });
  return {values, cu_out, ids_out, sizes_out, normed};
}

}  // namespace madtp::cpu
