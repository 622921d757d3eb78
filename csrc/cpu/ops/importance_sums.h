// What both ways of computing the attention terms of importance share: chunks of queries whose column sums are added in a
// fixed order, and the CLS term.
#pragma once

#include <tuple>
#include <vector>

#include "cpu/ops/attention_block.h"

namespace madtp::cpu {

// received_j is summed over a few chunks of queries. The chunks depend on the length of the sample only, each has its own
// row of partial sums, and the rows are added in order: the result does not depend on threads or on the batch.
class ImportanceSums {
 public:
  struct Chunk {
    int64_t b, first_block, last_block;  // blocks [first, last) of the sample
    float* sums;                         // [length of the sample]
  };

  // `layout`: of the factors that attention multiplies. `total_rows`: rows of the buffer, C.
  ImportanceSums(const CpuKernels& kernels, const Layout& layout, const Offsets& offsets, int64_t heads,
                 int64_t total_rows);

  std::vector<Chunk> chunks(const std::vector<int64_t>& samples) const;
  const Blocks& blocks(int64_t b) const { return blocks_[b]; }
  // Rows of the largest block.
  int64_t most_rows(const std::vector<int64_t>& samples) const;

  // Where the probabilities of token 0 of sample b, [length], go for one head.
  float* first_weights(int64_t b, int64_t head) const {
    return first_weights_.at<float>((head * offsets_.total() + offsets_.start(b)) * 4);
  }

  // As in the reference, a query whose log-sum-exp is NaN gives NaN to all keys: to those, too, that causal attention hides from
  // it. `lse` is [heads, C]; the queries are those of a block, `sums` are its chunk's.
  void spread_nan(const Tensor& lse, int64_t b, int64_t first, int64_t rows, float* sums) const;

  // received [C] and cls [C]; `out` holds the attention output.
  std::tuple<Tensor, Tensor> finish(const HeadRows& out) const;

 private:
  int64_t blocks_per_chunk(int64_t b) const;
  int64_t chunk_count(int64_t b) const;

  const CpuKernels& kernels_;
  const Offsets& offsets_;
  int64_t heads_, total_rows_;
  std::vector<Blocks> blocks_;
  std::vector<int64_t> partial_start_;  // of each sample: floats before its partial sums
  Buffer partial_{0}, first_weights_;
};

}  // namespace madtp::cpu
