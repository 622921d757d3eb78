#include "cpu/ops/operands.h"

#include <cstring>
#include <limits>
#include <numeric>

namespace madtp::cpu {

namespace {

constexpr int64_t kTokensTogether = 16;  // a multiple of every instruction set's lanes
constexpr int64_t kTokensPerItem = 64;
constexpr int64_t kGroupBytes = int64_t{2} << 20;  // of packed keys and values, for each thread: what its cache keeps

// Whether no float of this type has all bits of the exponent set.
template <class Bits>
bool all_finite(const Bits* values, int64_t count, Bits exponent) {
  bool finite = true;
  for (int64_t i = 0; i < count; ++i) finite &= (values[i] & exponent) != exponent;
  return finite;
}

}  // namespace

bool HeadRows::finite(int64_t first, int64_t count) const {
  bool finite = true;
  for (int64_t row = first; row < first + count; ++row) {
    for (int64_t head = 0; head < heads; ++head) {
      const void* const values = at(row, head);
      if (type == Type::f32) {
        finite &= all_finite<uint32_t>(static_cast<const uint32_t*>(values), head_dim, 0x7f800000u);
      } else {
        const uint16_t exponent = type == Type::bf16 ? 0x7f80 : 0x7c00;
        finite &= all_finite<uint16_t>(static_cast<const uint16_t*>(values), head_dim, exponent);
      }
    }
  }
  return finite;
}

void check_operand(const char* name, const Tensor& tensor, at::IntArrayRef sizes, at::ScalarType dtype) {
  TORCH_CHECK_VALUE(tensor.device().is_cpu() && tensor.scalar_type() == dtype && tensor.sizes() == sizes, name, ": expected ",
                    dtype, sizes, " on cpu, got ", tensor.scalar_type(), tensor.sizes(), " on ", tensor.device());
}

void check_operand(const char* name, const c10::optional<Tensor>& tensor, at::IntArrayRef sizes, at::ScalarType dtype) {
  if (tensor.has_value()) check_operand(name, *tensor, sizes, dtype);
}

void check_rows(const char* name, const Tensor& tensor, int64_t dimensions) {
  TORCH_CHECK_VALUE(tensor.device().is_cpu() && tensor.dim() == dimensions, name, ": expected ", dimensions,
                    " dimensions on cpu, got ", tensor.sizes(), " on ", tensor.device());
  TORCH_CHECK_VALUE(tensor.size(-1) <= 1 || tensor.stride(-1) == 1 || tensor.numel() == 0, name, ": expected adjacent elements in a row, got strides ",
                    tensor.strides());
}

Tensor with_rows(const Tensor& tensor) {
  const bool apart = tensor.dim() > 0 && tensor.stride(-1) != 1 && (tensor.size(-1) > 1 || !tensor.is_contiguous());
  return apart ? tensor.contiguous() : tensor;
}

c10::optional<Tensor> with_rows(const c10::optional<Tensor>& tensor) {
  return tensor.has_value() ? c10::make_optional(with_rows(*tensor)) : c10::nullopt;
}

bool all_finite(const Tensor& values, int64_t rows) {
  TORCH_CHECK_VALUE(values.device().is_cpu() && values.dim() == 1 && values.scalar_type() == at::kFloat && rows <= values.size(0),
                    "values: expected at least ", rows, " of float32 on cpu, got ", values.scalar_type(), values.sizes());
  if (values._is_zerotensor()) return true;  // which has no memory
  return all_finite<uint32_t>(static_cast<const uint32_t*>(values.contiguous().const_data_ptr()), rows, 0x7f800000u);
}

void clear_rows(const Tensor& tensor, int64_t first, int64_t last) {
  const int64_t bytes = tensor.size(1) * tensor.size(2) * tensor.element_size();
  std::memset(static_cast<std::byte*>(tensor.mutable_data_ptr()) + first * bytes, 0, static_cast<size_t>((last - first) * bytes));
}

Offsets::Offsets(const char* name, const Tensor& cu_seqlens, int64_t rows) : data(nullptr), samples(0) {
  TORCH_CHECK_VALUE(cu_seqlens.device().is_cpu() && cu_seqlens.scalar_type() == at::kInt && cu_seqlens.dim() == 1 &&
                        cu_seqlens.numel() > 0,
                    name, ": expected int32 offsets [B+1] on cpu, got ", cu_seqlens.scalar_type(), cu_seqlens.sizes(), " on ",
                    cu_seqlens.device());
  tensor = cu_seqlens.contiguous();
  data = tensor.const_data_ptr<int32_t>();
  samples = tensor.numel() - 1;
  TORCH_CHECK_VALUE(data[0] == 0, name, ": expected offsets that start at 0, got ", data[0], " first");
  for (int64_t b = 0; b < samples; ++b) {
    TORCH_CHECK_VALUE(data[b] <= data[b + 1], name, ": offsets decrease from ", data[b], " to ", data[b + 1], " at sample ", b);
  }
  TORCH_CHECK_VALUE(total() <= rows, name, ": offsets end at ", total(), ", beyond the ", rows, " rows they describe");
}

int64_t Offsets::longest() const {
  int64_t most = 0;
  for (int64_t b = 0; b < samples; ++b) most = std::max(most, length(b));
  return most;
}

void Offsets::check_longest(const char* name, int64_t max_seqlen) const {
  TORCH_CHECK_VALUE(longest() <= max_seqlen, name, ": ", max_seqlen, " is below ", longest());
}

std::vector<int64_t> Offsets::longest_first() const {
  std::vector<int64_t> order(samples);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [this](int64_t a, int64_t b) { return length(a) > length(b); });
  return order;
}

std::vector<std::vector<int64_t>> sample_groups(const CpuKernels& kernels, const HeadRows& k, const Offsets& offsets) {
  std::vector<std::vector<int64_t>> groups;
  const Factor factor = factor_of(kernels, k.type);
  const int64_t most = kGroupBytes * at::get_num_threads();
  int64_t bytes = 0;
  for (const int64_t b : offsets.longest_first()) {
    const int64_t size =
        2 * k.heads * packed_size(layout_of(kernels, factor), offsets.length(b), k.head_dim) * factor_bytes(factor);
    if (groups.empty() || bytes + size > most) {
      groups.emplace_back();
      bytes = 0;
    }
    groups.back().push_back(b);
    bytes += size;
  }
  return groups;
}

PackedKeys::PackedKeys(const CpuKernels& kernels, const HeadRows& k, const HeadRows* v, const Offsets& offsets,
                       const c10::optional<Tensor>& key_bias, const std::vector<int64_t>& samples, bool causal)
    : kernels_(kernels), place_(offsets.samples) {
  const Factor factor = factor_of(kernels, k.type);
  const Layout& layout = layout_of(kernels, factor);
  bytes_ = factor_bytes(factor);
  depth_ = round_up(k.head_dim, layout.depth);
  biased_ = key_bias.has_value();
  int64_t total = 0;
  const auto reserve = [&total](int64_t bytes) {
    total += round_up(bytes, 64);
    return total - round_up(bytes, 64);
  };
  for (const int64_t b : samples) {
    const int64_t length = offsets.length(b);
    Place& place = place_[b];
    place.keys_stride = round_up(packed_size(layout, length, k.head_dim) * bytes_, 64);
    place.keys = reserve(place.keys_stride * k.heads);
    place.values_stride = v == nullptr ? 0 : round_up(packed_size(layout, v->head_dim, length) * bytes_, 64);
    place.values = reserve(place.values_stride * k.heads);
    place.bias = reserve(round_up(length, kernels.lanes) * 4);
  }
  memory_ = Buffer(total);

  const Tensor bias = biased_ ? key_bias->to(at::kFloat).contiguous() : Tensor();
  const float* given_bias = biased_ ? bias.const_data_ptr<float>() : nullptr;
  for (const int64_t b : samples) {
    float* padded = memory_.at<float>(place_[b].bias);
    const int64_t start = offsets.start(b), length = offsets.length(b);
    for (int64_t j = 0; j < length; ++j) padded[j] = given_bias == nullptr ? 0.0f : given_bias[start + j];
    int64_t shown = length;
    while (shown > 0 && padded[shown - 1] == -std::numeric_limits<float>::infinity()) --shown;
    // What hides does not hide NaN.
    const bool plain = k.finite(start + shown, length - shown) && (v == nullptr || v->finite(start + shown, length - shown));
    place_[b].shown = plain ? shown : length;
    std::fill(padded + length, padded + round_up(length, kernels.lanes), 0.0f);
  }

  std::vector<std::pair<int64_t, int64_t>> items;  // sample, first token
  for (const int64_t b : samples) {
    for (int64_t j = 0; j < offsets.length(b); j += kTokensPerItem) items.emplace_back(b, j);
  }
  const bool watched = causal && v != nullptr;
  std::vector<uint8_t> finite(items.size(), 1);
  for_each_item(static_cast<int64_t>(items.size()), [&](int64_t item) {
    const auto [b, first] = items[item];
    const int64_t start = offsets.start(b), length = offsets.length(b);
    const int64_t last = std::min(first + kTokensPerItem, length);
    if (watched) finite[item] = v->finite(start + first, last - first);
    // Few tokens at a time, all heads of them: the memory is read in order.
    for (int64_t j = first; j < last; j += kTokensTogether) {
      const int64_t count = std::min(kTokensTogether, last - j);
      for (int64_t head = 0; head < k.heads; ++head) {
        k.prefetch(start + j + count, std::min(kTokensTogether, last - j - count), head);
        if (v != nullptr) v->prefetch(start + j + count, std::min(kTokensTogether, last - j - count), head);
        kernels.pack_transposed(factor, k.rows(start + j, count, head), j, length,
                                memory_.at(place_[b].keys + head * place_[b].keys_stride));
        if (v != nullptr) {
          kernels.pack(factor, v->rows(start + j, count, head), j, length,
                       memory_.at(place_[b].values + head * place_[b].values_stride));
        }
      }
    }
  });
  for (const int64_t b : samples) place_[b].finite = true;
  for (size_t item = 0; item < items.size(); ++item) place_[items[item].first].finite &= finite[item] != 0;
}

}  // namespace madtp::cpu
