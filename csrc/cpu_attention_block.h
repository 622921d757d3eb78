// Attention of a block of one sample's queries, head by head: what attention and the fused attention with importance share.
#pragma once

#include "cpu_operands.h"

namespace madtp::cpu {

// The blocks that a sample's queries are cut into. They depend on the lengths of this sample only, so that its results do
// not depend on the batch.
struct Blocks {
  // `parts`: at least that many blocks, so that threads find work in a batch of few samples.
  Blocks(const CpuKernels& kernels, int64_t queries, int64_t keys, int64_t parts);

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

  int64_t stride(int64_t b) const { return round_up(offsets_k.length(b), kernels.panel); }

  // A thread's memory for blocks of up to `rows` queries and `columns` keys.
  struct Scratch {
    Scratch(const AttentionCall& call, int64_t rows, int64_t columns);
    int64_t rows_bytes, logits_bytes, weights_bytes;
    Buffer memory;
  };

  struct Block {
    int64_t b, head, first, rows;  // queries [first, first + rows) of sample b
  };

  // Attends a block. `next` is the block that follows in this thread, or null. `best` and `first_weights`: see SoftmaxBlock.
  void run(const Scratch& scratch, const Block& block, const Block* next, float* best, float* first_weights) const;
};

}  // namespace madtp::cpu
