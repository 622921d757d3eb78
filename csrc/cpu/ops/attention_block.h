// Attention of a block of one sample's queries, head by head: what attention and the fused attention with importance share.
#pragma once

#include "cpu/ops/operands.h"

namespace madtp::cpu {

// The blocks that a sample's queries are cut into. They depend on the lengths of this sample only, so that its results do
// not depend on the batch.
struct Blocks {
  // `parts`: at least that many blocks, so that threads find work in a batch of few samples.
  Blocks(const Layout& layout, int64_t queries, int64_t keys, int64_t parts);

  int64_t first(int64_t block) const { return block * rows; }
  int64_t size(int64_t block) const { return std::min(rows, queries - block * rows); }

  int64_t queries, rows, count;
};

struct AttentionCall {
  const CpuKernels& kernels;
  const HeadRows& q;
  const Offsets& offsets_q;
  const Offsets& offsets_k;
  const PackedKeys& packed;
  float scale;
  bool causal;
  Tensor& out;  // [Cq, H, d] contiguous
  Tensor& lse;  // [H, Cq] contiguous

  Factor factor() const { return factor_of(kernels, q.type); }

  struct Block {
    int64_t b, first, rows;  // queries [first, first + rows) of sample b
    int64_t head, heads;     // heads [head, head + heads)
  };

  // What importance wants of a block: see AttentionBlock. First weights are null for any but the first block.
  struct Wanted {
    float* best;
    float* first_weights;
    int64_t first_stride;
  };

  // Bytes that a block needs as `scratch`.
  int64_t scratch_bytes(int64_t rows, int64_t keys) const {
    return kernels.scratch_bytes(factor(), rows, keys, q.head_dim);
  }

  void run(const Block& block, const Wanted& wanted, const Buffer& scratch) const;

  // Asks for the queries of a block that this thread will attend next.
  void prefetch(const Block& block) const {
    q.prefetch(offsets_q.start(block.b) + block.first, block.rows, block.head);
  }
};

}  // namespace madtp::cpu
