// The four operations on CUDA tensors: allocation, strides, device and stream around the launchers of
// ops.h. Signatures are those of the CPU operations in cpu/ops/ops.h, contracts those of the Python functions in
// madtp_kernels. Nothing waits for the device, except compact() when asked for an exact result.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <algorithm>
#include <tuple>

#include "cuda/ops.h"

namespace madtp::cuda {

using at::Tensor;
using OptionalTensor = c10::optional<Tensor>;

namespace detail {

inline ElementType element_type(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kFloat: return ElementType::f32;
    case at::kBFloat16: return ElementType::bf16;
    case at::kHalf: return ElementType::f16;
    default:
      TORCH_CHECK(false, "the cuda backend takes float32, bfloat16 and float16, got ", tensor.scalar_type());
  }
}

inline HeadRows head_rows(const Tensor& tensor) { return {tensor.const_data_ptr(), tensor.stride(0), tensor.stride(1)}; }
inline Rows rows(const Tensor& tensor) { return {tensor.const_data_ptr(), tensor.stride(0)}; }

// A vector operand as dense memory of one type (copied if it is not), or null. Keeps the memory until the
// launch.
template <class T>
class Dense {
 public:
  explicit Dense(const OptionalTensor& tensor) {
    if (tensor.has_value()) tensor_ = tensor->to(c10::CppTypeToScalarType<T>::value).contiguous();
  }
  operator const T*() const { return tensor_.defined() ? tensor_.const_data_ptr<T>() : nullptr; }

 private:
  Tensor tensor_;
};

// No sample is longer than the buffer, however generous the caller's bound.
inline int64_t bound(int64_t max_seqlen, const Tensor& buffer) {
  return std::min(std::max<int64_t>(max_seqlen, 0), buffer.size(0));
}

inline int32_t samples(const Tensor& cu_seqlens) { return static_cast<int32_t>(cu_seqlens.numel() - 1); }

inline void check(const char* operation, const char* error) {
  TORCH_CHECK(error == nullptr, operation, ": the cuda backend could not launch a kernel: ", error);
}

// Makes the tensor's device current, so that the stream is one of its own.
struct Device {
  explicit Device(const Tensor& tensor)
      : guard(tensor.device()), stream(c10::cuda::getCurrentCUDAStream(tensor.device().index()).stream()) {}

  c10::cuda::CUDAGuard guard;
  Stream stream;
};

}  // namespace detail

inline std::tuple<Tensor, Tensor> attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cu_seqlens_q,
                                            const Tensor& cu_seqlens_k, int64_t max_seqlen_q, int64_t /*max_seqlen_k*/,
                                            double scale, bool causal, const OptionalTensor& key_bias) {
  const detail::Device device(q);
  const detail::Dense<int32_t> offsets_q(cu_seqlens_q), offsets_k(cu_seqlens_k);
  const detail::Dense<float> bias(key_bias);
  Tensor out = at::empty(q.sizes(), q.options());
  Tensor lse = at::empty({q.size(1), q.size(0)}, q.options().dtype(at::kFloat));
  AttentionArguments arguments = {};
  arguments.type = detail::element_type(q);
  arguments.q = detail::head_rows(q);
  arguments.k = detail::head_rows(k);
  arguments.v = detail::head_rows(v);
  arguments.cu_seqlens_q = offsets_q;
  arguments.cu_seqlens_k = offsets_k;
  arguments.key_bias = bias;
  arguments.out = out.mutable_data_ptr();
  arguments.lse = lse.mutable_data_ptr<float>();
  arguments.capacity_q = q.size(0);
  arguments.max_seqlen_q = detail::bound(max_seqlen_q, q);
  arguments.batch = detail::samples(cu_seqlens_q);
  arguments.heads = static_cast<int32_t>(q.size(1));
  arguments.head_dim = static_cast<int32_t>(q.size(2));
  arguments.scale = static_cast<float>(scale);
  arguments.causal = causal;
  detail::check("attention", launch_attention(arguments, device.stream));
  return {out, lse};
}

inline std::tuple<Tensor, Tensor> attention_importance(const Tensor& q, const Tensor& k, const Tensor& out,
                                                       const Tensor& lse, const Tensor& cu_seqlens, int64_t max_seqlen,
                                                       double scale, bool causal, const OptionalTensor& key_bias) {
  const detail::Device device(q);
  const detail::Dense<int32_t> offsets(cu_seqlens);
  const detail::Dense<float> bias(key_bias);
  const auto floats = q.options().dtype(at::kFloat);
  Tensor received = at::empty({q.size(0)}, floats), cls = at::empty({q.size(0)}, floats);
  ImportanceArguments arguments = {};
  arguments.type = detail::element_type(q);
  arguments.q = detail::head_rows(q);
  arguments.k = detail::head_rows(k);
  arguments.out = detail::head_rows(out);
  arguments.lse = lse.const_data_ptr<float>();
  arguments.lse_stride = lse.stride(0);
  arguments.cu_seqlens = offsets;
  arguments.key_bias = bias;
  arguments.received = received.mutable_data_ptr<float>();
  arguments.cls = cls.mutable_data_ptr<float>();
  arguments.capacity = q.size(0);
  arguments.max_seqlen = detail::bound(max_seqlen, q);
  arguments.batch = detail::samples(cu_seqlens);
  arguments.heads = static_cast<int32_t>(q.size(1));
  arguments.head_dim = static_cast<int32_t>(q.size(2));
  arguments.scale = static_cast<float>(scale);
  arguments.causal = causal;
  Tensor workspace = at::empty({importance_workspace(arguments)}, floats);
  detail::check("attention_importance",
                launch_importance(arguments, workspace.mutable_data_ptr<float>(), device.stream));
  return {received, cls};
}

inline std::tuple<Tensor, Tensor> score_tokens(const Tensor& x, const Tensor& dictionary, const Tensor& received,
                                               const Tensor& cls, const Tensor& cu_seqlens, int64_t max_seqlen,
                                               double temperature, const OptionalTensor& bias) {
  const detail::Device device(x);
  const detail::Dense<int32_t> offsets(cu_seqlens);
  const detail::Dense<float> received_data(received), cls_data(cls), bias_data(bias);
  const auto floats = x.options().dtype(at::kFloat);
  Tensor importance = at::empty({x.size(0)}, floats), threshold = at::empty({cu_seqlens.numel() - 1}, floats);
  ScoringArguments arguments = {};
  arguments.type = detail::element_type(x);
  arguments.x = detail::rows(x);
  arguments.dictionary = detail::rows(dictionary);
  arguments.received = received_data;
  arguments.cls = cls_data;
  arguments.cu_seqlens = offsets;
  arguments.bias = bias_data;
  arguments.importance = importance.mutable_data_ptr<float>();
  arguments.threshold = threshold.mutable_data_ptr<float>();
  arguments.capacity = x.size(0);
  arguments.max_seqlen = detail::bound(max_seqlen, x);
  arguments.batch = detail::samples(cu_seqlens);
  arguments.width = static_cast<int32_t>(x.size(1));
  arguments.entries = static_cast<int32_t>(dictionary.size(0));
  arguments.temperature = temperature;
  Tensor workspace = at::empty({scoring_workspace(arguments)}, floats);
  detail::check("score_tokens", launch_scoring(arguments, workspace.mutable_data_ptr<float>(), device.stream));
  return {importance, threshold};
}

inline std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> compact(
    const Tensor& x, const Tensor& importance, const OptionalTensor& threshold, const OptionalTensor& keep_count,
    const Tensor& cu_seqlens, int64_t max_seqlen, const OptionalTensor& is_protected, const OptionalTensor& groups,
    const OptionalTensor& min_keep, const OptionalTensor& ids, const OptionalTensor& sizes, int64_t merged_id,
    const OptionalTensor& norm_weight, const OptionalTensor& norm_bias, double norm_eps, bool exact) {
  const detail::Device device(x);
  const detail::Dense<float> importance_data(importance), threshold_data(threshold), sizes_data(sizes),
      weight_data(norm_weight), bias_data(norm_bias);
  const detail::Dense<int32_t> offsets(cu_seqlens), keep_data(keep_count), groups_data(groups), min_data(min_keep),
      ids_data(ids);
  const detail::Dense<bool> protected_data(is_protected);
  const auto integers = x.options().dtype(at::kInt);
  const int64_t batch = cu_seqlens.numel() - 1;
  Tensor order = at::empty({x.size(0)}, integers), counts = at::empty({2, batch}, integers);
  Tensor cu_out = at::empty({batch + 1}, integers);

  CompactionArguments arguments = {};
  arguments.type = detail::element_type(x);
  arguments.x = detail::rows(x);
  arguments.importance = importance_data;
  arguments.threshold = threshold_data;
  arguments.keep_count = keep_data;
  arguments.cu_seqlens = offsets;
  arguments.is_protected = protected_data;
  arguments.groups = groups_data;
  arguments.min_keep = min_data;
  arguments.ids = ids_data;
  arguments.sizes = sizes_data;
  arguments.norm_weight = weight_data;
  arguments.norm_bias = bias_data;
  arguments.max_seqlen = detail::bound(max_seqlen, x);
  arguments.batch = static_cast<int32_t>(batch);
  arguments.width = static_cast<int32_t>(x.size(1));
  arguments.merged_id = static_cast<int32_t>(merged_id);
  arguments.norm_eps = static_cast<float>(norm_eps);
  Selection selection = {};
  selection.order = order.mutable_data_ptr<int32_t>();
  selection.kept = counts.mutable_data_ptr<int32_t>();
  selection.own = selection.kept + batch;
  selection.cu_out = cu_out.mutable_data_ptr<int32_t>();
  detail::check("compact", launch_selection(arguments, selection, device.stream));

  // item() waits for the device: the price of a result without spare rows.
  const int64_t capacity = exact ? cu_out.select(0, batch).item<int32_t>() : x.size(0);
  Tensor values = at::empty({capacity, x.size(1)}, x.options());
  Tensor ids_out = at::empty({capacity}, integers);
  Tensor sizes_out = at::empty({sizes.has_value() ? capacity : 0}, x.options().dtype(at::kFloat));
  Tensor normed = norm_weight.has_value() ? at::empty_like(values) : at::empty({0}, x.options());
  CompactedRows result = {};
  result.values = values.mutable_data_ptr();
  result.ids = ids_out.mutable_data_ptr<int32_t>();
  result.sizes = sizes.has_value() ? sizes_out.mutable_data_ptr<float>() : nullptr;
  result.normed = norm_weight.has_value() ? normed.mutable_data_ptr() : nullptr;
  detail::check("compact", launch_compaction(arguments, selection, result, device.stream));
  return {values, cu_out, ids_out, sizes_out, normed};
}

}  // namespace madtp::cuda
