// The Python module `_C` and the operators torch.ops.madtp_native.*: the only file that knows pybind11 and TORCH_LIBRARY.
#include <torch/extension.h>
#include <torch/library.h>

#include "cpu_kernels.h"
#include "ops.h"

namespace {

namespace py = pybind11;

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

}  // namespace

PYBIND11_MODULE(_C, m) {
  namespace cpu = madtp::cpu;
  using release = py::call_guard<py::gil_scoped_release>;
  m.def("attention", &cpu::attention, release());
  m.def("attention_importance", &cpu::attention_importance, release());
  m.def("attention_with_importance", &cpu::attention_with_importance, release());
  m.def("score_tokens", &cpu::score_tokens, release());
  m.def("compact", &cpu::compact, release());
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
