// Views of the tensors of an operation, and attention's keys and values packed for the matrix products.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "cpu/kernels/kernels.h"
#include "cpu/ops/memory.h"
#include "cpu/ops/parallel.h"

namespace madtp::cpu {

using at::Tensor;

// What the Python functions check is checked here again as far as memory depends on it: torch.ops, torch.compile and buffers that
// were changed since come here without them. Errors are ValueErrors that name the argument.
void check_operand(const char* name, const Tensor& tensor, at::IntArrayRef sizes, at::ScalarType dtype);
// The same for an argument that may be missing.
void check_operand(const char* name, const c10::optional<Tensor>& tensor, at::IntArrayRef sizes, at::ScalarType dtype);
// The leading operand: its number of dimensions, and rows of adjacent elements.
void check_rows(const char* name, const Tensor& tensor, int64_t dimensions);

// The same tensor with the elements of each row side by side, copied if they were not.
Tensor with_rows(const Tensor& tensor);
c10::optional<Tensor> with_rows(const c10::optional<Tensor>& tensor);

// Zeros in rows [first, last) of a contiguous [C, H, d] tensor.
void clear_rows(const Tensor& tensor, int64_t first, int64_t last);

inline Type type_of(const char* name, const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kFloat: return Type::f32;
    case at::kBFloat16: return Type::bf16;
    case at::kHalf: return Type::f16;
    default:
      TORCH_CHECK(false, name, ": the cpu backend takes float32, bfloat16 and float16, got ", tensor.scalar_type());
  }
}

// bfloat16 products need an instruction of their own; without it bfloat16 is multiplied in float32, as float16 is.
inline Factor factor_of(const CpuKernels& kernels, Type type) {
  return type == Type::bf16 && kernels.bf16_products ? Factor::bf16 : Factor::f32;
}

inline int64_t factor_bytes(Factor factor) { return factor == Factor::bf16 ? 2 : 4; }

// cu_seqlens on the host, checked against the number of rows that they describe.
struct Offsets {
  Offsets(const char* name, const Tensor& cu_seqlens, int64_t rows);

  int64_t start(int64_t b) const { return data[b]; }
  int64_t length(int64_t b) const { return data[b + 1] - data[b]; }
  int64_t total() const { return data[samples]; }

  int64_t longest() const;  // length of the longest sample, 0 without any
  void check_longest(const char* name, int64_t max_seqlen) const;
  // Samples from the longest to the shortest: long work items first leave no thread waiting at the end.
  std::vector<int64_t> longest_first() const;

  Tensor tensor;
  const int32_t* data;
  int64_t samples;
};

// A [C, H, d] tensor.
struct HeadRows {
  HeadRows(const char* name, const Tensor& tensor)
      : data(static_cast<const std::byte*>(tensor.const_data_ptr())),
        type(type_of(name, tensor)),
        bytes(tensor.element_size()),
        row_stride(checked(name, tensor).stride(0)),
        head_stride(tensor.stride(1)),
        heads(tensor.size(1)),
        head_dim(tensor.size(2)) {}
  static const Tensor& checked(const char* name, const Tensor& tensor) {
    check_rows(name, tensor, 3);
    return tensor;
  }

  const void* at(int64_t row, int64_t head) const { return data + (row * row_stride + head * head_stride) * bytes; }
  RowsToLoad rows(int64_t first, int64_t count, int64_t head) const {
    return {at(first, head), type, row_stride, count, head_dim};
  }
  // Asks for rows that will be needed soon: a head's rows lie too far apart for the processor to foresee them.
  void prefetch(int64_t first, int64_t count, int64_t head) const {
    for (int64_t row = first; row < first + count; ++row) {
      const auto* p = static_cast<const char*>(at(row, head));
      for (int64_t i = 0; i < head_dim * bytes; i += 64) __builtin_prefetch(p + i, 0, 2);
    }
  }

  // Whether no element of rows [first, first + count) is NaN or infinite.
  bool finite(int64_t first, int64_t count) const;

  const std::byte* data;
  Type type;
  int64_t bytes, row_stride, head_stride, heads, head_dim;
};

// Attention is done for groups of samples, one after the other, so that the memory for packed keys and values is bounded, and
// each group's are still in the cache when they are used. From the longest sample to the shortest.
std::vector<std::vector<int64_t>> sample_groups(const CpuKernels& kernels, const HeadRows& k, const Offsets& offsets);

// The keys of a group of samples, all heads, transposed and packed; the values, packed; and the bias of every key, padded to
// whole vectors.
class PackedKeys {
 public:
  // `v` may be null: importance needs keys only.
  PackedKeys(const CpuKernels& kernels, const HeadRows& k, const HeadRows* v, const Offsets& offsets,
             const c10::optional<Tensor>& key_bias, const std::vector<int64_t>& samples, bool causal);

  const void* keys(int64_t b, int64_t head) const { return memory_.at(place_[b].keys + head * place_[b].keys_stride); }
  const void* values(int64_t b, int64_t head) const {
    return memory_.at(place_[b].values + head * place_[b].values_stride);
  }
  int64_t keys_bytes(int64_t b) const { return place_[b].keys_stride; }  // between heads
  int64_t values_bytes(int64_t b) const { return place_[b].values_stride; }
  const float* bias(int64_t b) const { return memory_.at<float>(place_[b].bias); }
  bool biased() const { return biased_; }
  // Whether keys that a causal query may not see can be left out. Their weight is 0, but 0 times NaN or infinity is NaN: a value
  // that is not finite reaches all queries, as in the reference.
  bool may_skip_unseen(int64_t b) const { return place_[b].finite; }
  // The first keys of a sample, without those at its end that a bias of -inf hides from all queries: padding. They can be left out.
  int64_t shown(int64_t b) const { return place_[b].shown; }

  // Bytes between the panels of a sample's packed keys.
  int64_t panel_bytes() const { return kernels_.panel * depth_ * bytes_; }

 private:
  struct Place {  // in bytes; of the samples of this group
    int64_t keys, keys_stride, values, values_stride, bias;
    bool finite;    // no value is NaN or infinite; looked at for causal attention only
    int64_t shown;  // see above
  };

  const CpuKernels& kernels_;
  int64_t depth_, bytes_;
  bool biased_;
  std::vector<Place> place_;
  Buffer memory_{0};
};

}  // namespace madtp::cpu
