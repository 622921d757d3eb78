// A block of attention through the products of gemm.h: logits, softmax and output, head after head.
#pragma once

#include <cstring>

#include "cpu/kernels/gemm.h"
#include "cpu/kernels/pack.h"
#include "cpu/kernels/softmax.h"

namespace madtp::cpu::MADTP_ISA {
namespace {

// Logits, weights and the running maximum have rows of whole panels.
MADTP_INLINE int64_t logits_stride(int64_t length) { return round_up(length, kPanelVectors * kLanes); }

// Where the parts of a block's working memory start, in bytes.
struct AttendScratch {
  int64_t queries, logits, weights, inverse_sums, total;

  MADTP_INLINE AttendScratch of(int64_t rows, int64_t length, int64_t head_dim) {
    const int64_t padded = round_up(rows, kTileRows), logits = padded * logits_stride(length) * 4;
    AttendScratch at{0, 0, 0, 0, 0};
    at.logits = at.queries + round_up(padded * round_up(head_dim, 2) * 4, 64);
    at.weights = at.logits + round_up(logits, 64);
    at.inverse_sums = at.weights + round_up(logits, 64);
    at.total = at.inverse_sums + round_up(padded * 4, 64);
    return at;
  }
};

// The first row's probabilities of the keys beyond block.columns: 0, and NaN where the log-sum-exp is.
MADTP_INLINE void store_unseen(const AttentionBlock& block, int64_t head) {
  const float lse = block.lse[head * block.lse_stride];
  float* const weights = block.first_weights + head * block.first_stride;
  for (int64_t j = block.columns; j < block.length; ++j) weights[j] = lse == lse ? 0.0f : lse;
}

// Source is the type of the tensors.
template <class Product, class Source>
void attend(const AttentionBlock& block) {
  using Element = typename Product::element;
  const int64_t rows = block.queries.rows, head_dim = block.queries.depth, stride = logits_stride(block.length);
  const AttendScratch at = AttendScratch::of(rows, block.length, head_dim);
  auto* const queries = reinterpret_cast<Element*>(block.scratch + at.queries);
  auto* const logits = reinterpret_cast<float*>(block.scratch + at.logits);
  auto* const weights = reinterpret_cast<Element*>(block.scratch + at.weights);
  auto* const inverse_sums = reinterpret_cast<float*>(block.scratch + at.inverse_sums);
  const int64_t depth = round_up(head_dim, Product::kDepth);

  if (block.best != nullptr) {
    for (int64_t i = 0; i < rows * stride; i += kLanes) store(block.best + i, broadcast(-__builtin_inff()));
  }
  for (int64_t head = 0; head < block.heads; ++head) {
    const auto* const keys = static_cast<const char*>(block.keys) + head * block.keys_bytes;
    const auto* const values = static_cast<const char*>(block.values) + head * block.values_bytes;
    RowsToLoad source = block.queries;
    source.source = static_cast<const char*>(source.source) + head * block.head_bytes;
    load_rows<Source, Product>(source, queries, depth);
    if (head + 1 < block.heads) prefetch_rows<Source>(source, block.head_bytes);

    float* const first = block.first_weights == nullptr ? nullptr : block.first_weights + head * block.first_stride;
    // Without a bias the scale is left to the softmax.
    if (block.biased) {
      product<Product>({queries, depth, rows}, keys, block.columns, head_dim, block.scale, block.bias, logits, stride);
    } else {
      plain_product<Product>({queries, depth, rows}, keys, block.columns, head_dim, logits, stride);
    }
    softmax<Element>({logits, block.biased ? 1.0f : block.scale, stride, rows, block.columns, block.visible, weights,
                      inverse_sums, block.lse + head * block.lse_stride, block.best, first});
    if (first != nullptr) store_unseen(block, head);
    // The product reads whole tiles of rows.
    const int64_t extra = round_up(rows, kTileRows) - rows;
    std::memset(weights + rows * stride, 0, static_cast<size_t>(extra * stride) * sizeof(Element));
    scaled_product<Product>({weights, stride, rows}, values, head_dim, block.columns, block.length, inverse_sums,
                            static_cast<Source*>(block.out) + head * head_dim, block.out_stride);
  }
}

}  // namespace
}  // namespace madtp::cpu::MADTP_ISA
