// The Python module `_C` and the operators torch.ops.madtp_native.*: the only file that knows pybind11 and TORCH_LIBRARY.
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/forward_grad.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/extension.h>
#include <torch/library.h>

#include <string>

#include "cpu/kernels/kernels.h"
#include "cpu/ops/ops.h"
#if defined(MADTP_WITH_CUDA)
#include "cuda/dispatch.h"
#endif

namespace {

namespace py = pybind11;

#if defined(MADTP_WITH_CUDA)
// One function for both devices; the leading tensor decides.
template <class Result, class... Rest>
auto by_device(Result (*cpu)(const at::Tensor&, Rest...), Result (*cuda)(const at::Tensor&, Rest...)) {
  return [=](const at::Tensor& leading, Rest... rest) { return (leading.is_cuda() ? cuda : cpu)(leading, rest...); };
}
#define MADTP_OPERATION(name) by_device(&madtp::cpu::name, &madtp::cuda::name)
#else
#define MADTP_OPERATION(name) &madtp::cpu::name
#endif

py::dict build_info() {
  py::dict info;
  info["torch"] = TORCH_VERSION;
#if defined(__clang__)
  info["compiler"] = "clang " __clang_version__;
#else
  info["compiler"] = "gcc " __VERSION__;
#endif
#if defined(MADTP_WITH_CUDA)
  info["cuda"] = true;
#else
  info["cuda"] = false;
#endif
  info["cpu"] = madtp::cpu::cpu_kernels().name;
  return info;
}

bool transforms_or_modes() {
  return torch::autograd::ForwardADLevel::try_get_by_idx(0) || c10::impl::TorchDispatchModeTLS::any_modes_set() ||
         c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::FuncTorchDynamicLayerFrontMode);
}

// Whether an operation may go straight to its implementation; `madtp_kernels/registration.py` has the same in Python.
bool plain(const py::tuple& args) {
  if (transforms_or_modes()) return false;
  const bool differentiates = at::GradMode::is_enabled();
  for (const py::handle item : args) {
    if (THPVariable_CheckExact(item.ptr())) {
      const at::Tensor& tensor = THPVariable_Unpack(item.ptr());
      if (tensor.is_meta() || tensor.is_neg() || tensor.is_conj() || tensor._is_zerotensor() || (differentiates && tensor.requires_grad())) return false;
    } else if (THPVariable_Check(item.ptr()) || (py::isinstance<py::tuple>(item) && !plain(py::reinterpret_borrow<py::tuple>(item)))) {
      return false;
    }
  }
  return true;
}

// What of tensors decides how an operation runs on them: dtype, device, sizes, strides and alignment of each, as bytes. None
// where somebody has to look at the call: a transform, a mode, a subclass of tensors, a gradient, a last dimension that is not
// dense. `madtp_kernels/repeats.py` has the same in Python.
py::object signature(const py::tuple& tensors) {
  if (transforms_or_modes()) return py::none();
  const bool differentiates = at::GradMode::is_enabled();
  std::string facts;
  facts.reserve(64 * tensors.size());
  const auto append = [&facts](const void* data, size_t bytes) { facts.append(static_cast<const char*>(data), bytes); };
  for (const py::handle item : tensors) {
    if (item.is_none()) {
      facts.push_back('-');
      continue;
    }
    if (!THPVariable_CheckExact(item.ptr())) return py::none();
    const at::Tensor& tensor = THPVariable_Unpack(item.ptr());
    if (tensor.layout() != at::kStrided || tensor.is_nested()) return py::none();
    const at::IntArrayRef sizes = tensor.sizes(), strides = tensor.strides();
    if ((differentiates && tensor.requires_grad()) || (!strides.empty() && strides.back() != 1)) return py::none();
    const char kind[] = {
        static_cast<char>(tensor.scalar_type()), static_cast<char>(tensor.device().type()),
        static_cast<char>(tensor.device().index()), static_cast<char>(sizes.size()),
        static_cast<char>(reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) & 15)};
    append(kind, sizeof(kind));
    append(sizes.data(), sizes.size() * sizeof(int64_t));
    append(strides.data(), strides.size() * sizeof(int64_t));
  }
  return py::bytes(facts);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  using release = py::call_guard<py::gil_scoped_release>;
  m.def("attention", MADTP_OPERATION(attention), release());
  m.def("attention_backward", &madtp::cpu::attention_backward, release());
  m.def("attention_importance", MADTP_OPERATION(attention_importance), release());
  m.def("attention_importance_backward", &madtp::cpu::attention_importance_backward, release());
  m.def("attention_with_importance", &madtp::cpu::attention_with_importance, release());
  m.def("score_tokens", MADTP_OPERATION(score_tokens), release());
  m.def("compact", MADTP_OPERATION(compact), release());
  m.def("prune", &madtp::cpu::prune, release());
  m.def("nearest_kept", &madtp::cpu::nearest_kept, release());
  m.def("novelty", &madtp::cpu::novelty, release());
  m.def("merge_scores", &madtp::cpu::merge_scores, release());
  m.def("lowest_tokens", &madtp::cpu::lowest_tokens, release());
  m.def("match_tokens", &madtp::cpu::match_tokens, release());
  m.def("layer_norm", &madtp::cpu::layer_norm, release());
  m.def("linear", &madtp::cpu::linear, release());
  m.def("mlp", &madtp::cpu::mlp, release(), py::arg("x"), py::arg("weight1"), py::arg("bias1"), py::arg("weight2"), py::arg("bias2"),
        py::arg("cu_seqlens"), py::arg("activation"), py::arg("residual"), py::arg("norm_weight") = py::none(),
        py::arg("norm_bias") = py::none(), py::arg("norm_eps") = 0.0, py::arg("norm_first") = false);
  m.def("self_attention", &madtp::cpu::self_attention, release());
  m.def("cross_attention", &madtp::cpu::cross_attention, release());
  m.def("embed_patches", &madtp::cpu::embed_patches, release());
  m.def("attention_received", &madtp::cpu::attention_received, release());
  m.def("merge_tokens", &madtp::cpu::merge_tokens, release());
  m.def("merge_redundant", &madtp::cpu::merge_redundant, release());
  m.def("all_finite", &madtp::cpu::all_finite);
  m.def("plain", &plain);
  m.def("signature", &signature);
  m.def("build_info", &build_info);
}

TORCH_LIBRARY(madtp_native, m) {
  m.def(
      "attention(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, int max_seqlen_q, "
      "int max_seqlen_k, float scale, bool causal, Tensor? key_bias) -> (Tensor out, Tensor lse)");
  m.def(
      "attention_importance(Tensor q, Tensor k, Tensor out, Tensor lse, Tensor cu_seqlens, int max_seqlen, float scale, "
      "bool causal, Tensor? key_bias) -> (Tensor received, Tensor cls)");
  m.def(
      "attention_with_importance(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens, int max_seqlen, float scale, "
      "bool causal, Tensor? key_bias) -> (Tensor out, Tensor lse, Tensor received, Tensor cls)");
  m.def(
      "score_tokens(Tensor x, Tensor dictionary, Tensor received, Tensor cls, Tensor cu_seqlens, int max_seqlen, "
      "float temperature, Tensor? bias) -> (Tensor importance, Tensor threshold)");
  m.def(
      "compact(Tensor x, Tensor importance, Tensor? threshold, Tensor? keep_count, Tensor cu_seqlens, int max_seqlen, "
      "Tensor? protected, Tensor? groups, Tensor? min_keep, Tensor? ids, Tensor? sizes, int merged_id, "
      "Tensor? norm_weight, Tensor? norm_bias, float norm_eps, bool exact) "
      "-> (Tensor values, Tensor cu_out, Tensor ids, Tensor sizes, Tensor normed)");
}

TORCH_LIBRARY_IMPL(madtp_native, CPU, m) {
  m.impl("attention", &madtp::cpu::attention);
  m.impl("attention_importance", &madtp::cpu::attention_importance);
  m.impl("attention_with_importance", &madtp::cpu::attention_with_importance);
  m.impl("score_tokens", &madtp::cpu::score_tokens);
  m.impl("compact", &madtp::cpu::compact);
}

#if defined(MADTP_WITH_CUDA)
TORCH_LIBRARY_IMPL(madtp_native, CUDA, m) {
  m.impl("attention", &madtp::cuda::attention);
  m.impl("attention_importance", &madtp::cuda::attention_importance);
  m.impl("score_tokens", &madtp::cuda::score_tokens);
  m.impl("compact", &madtp::cuda::compact);
}
#endif
