// LayerNorm of rows, as a part of other operations.
#pragma once

#include "cpu/ops/operands.h"

namespace madtp::cpu {

// out = (x - mean) / sqrt(variance + eps) * weight + bias.
class Norm {
 public:
  // None.
  Norm() : kernels_(cpu_kernels()), width_(0), eps_(0) {}
  // weight and bias [width]; without a weight it is none. `name` stands before theirs in messages.
  Norm(const char* name, const c10::optional<Tensor>& weight, const c10::optional<Tensor>& bias, double eps, int64_t width);
  explicit operator bool() const { return weight_.defined(); }

  // One thread: `count` rows of `width` elements; strides in bytes. `to` may be `from`.
  void run(Type type, const std::byte* from, int64_t from_stride, std::byte* to, int64_t to_stride, int64_t count) const;
  // All threads: the first `count` rows of x [C, width], in fresh memory.
  Tensor of(const Tensor& x, int64_t count) const;

 private:
  const CpuKernels& kernels_;
  int64_t width_;
  float eps_;
  Tensor weight_, bias_;  // float32; the bias may be undefined
};

}  // namespace madtp::cpu
