// The choice of lowest_tokens, a sample at a time.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>

namespace madtp::cpu {

class Choice {
 public:
  // count [samples] int: the most that go of each. The other arguments are those of lowest_tokens.
  Choice(const c10::optional<at::Tensor>& count, int64_t samples, std::optional<double> threshold, double share, int64_t uncounted);

  // goes[row] for the rows [first, last) of sample b.
  void choose(int64_t b, int64_t first, int64_t last, const float* score, const bool* may, bool* goes) const;

 private:
  at::Tensor counts_;  // undefined without a count
  float most_, share_;
  int64_t uncounted_;
};

}  // namespace madtp::cpu
