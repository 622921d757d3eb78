// Token importance against a dictionary, and the pruning threshold.
//
//   G[j, m] = <x_j, dictionary_m> + bias_m     g_j = max_m G[j, m]
//   importance_j = (received_j / sum received + g_j / sum g + cls_j) / 3
//   threshold = min_m sum_j softmax_j(G[j, m] / temperature) importance_j         over the tokens j >= 1 of a sample
//
// The threshold is linear in the three terms of the importance, so their weighted sums can be gathered before
// the sums that divide them are known, and G is never stored: a block of the first kernel takes 64 tokens of
// one sample, computes G for 128 entries at a time and leaves for each entry the largest G and sums of e, e
// received, e g, e cls with e = exp((G - largest) / temperature). The second kernel puts the blocks of a
// sample together, in their order.
#include <algorithm>
#include <cfloat>

#include "cuda/ops.h"
#include "cuda/tile.cuh"

namespace madtp::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kTokens = 64;
constexpr int kEntries = kThreads;
constexpr int kChunkBytes = 64;
constexpr int kFinishThreads = 256;

using Alignment = Accumulator<kEntries / 8>;

// What a block of tokens leaves: two sums, then these five for every entry.
constexpr int kReceivedSum = 0, kAlignmentSum = 1, kHeader = 2;
enum { kLargest, kWeight, kReceived, kAligned, kCls, kStatistics };

__host__ __device__ inline int64_t partial_size(const ScoringArguments& p) {
  return kHeader + kStatistics * int64_t{p.entries};
}

// Where a sample's blocks lie. Distinct for distinct samples: a sample of N tokens from row `start` on has at
// most floor((start + N) / 64) + 1 - floor(start / 64) blocks.
__device__ float* partials_of(const ScoringArguments& p, float* partials, int b, int64_t start) {
  return partials + (start / kTokens + b) * partial_size(p);
}

// Logits are differences of G times this; finite however small the temperature is.
float exponent_scale(const ScoringArguments& p) {
  return static_cast<float>(std::min(double{kLog2e} / p.temperature, double{FLT_MAX}));
}

// The largest alignment of some tokens, to subtract: of an entry that none is aligned with it is -inf, and its weights are 0.
__device__ inline float finite(float top) { return top == -kInfinity ? 0.0f : top; }

template <class T>
struct Operands {
  Tile<T, kTokens, kChunkBytes> x[2];
  Tile<T, kEntries, kChunkBytes> dictionary[2];
};

template <class T>
__global__ void __launch_bounds__(kThreads, 2)
    alignment_kernel(const ScoringArguments p, const int token_blocks, float* partials, const float scale,
                     const bool is_vectorised) {
  // The operands have been used when the alignment is written.
  __shared__ union {
    Operands<T> operands;
    float alignment[kTokens][kEntries + 1];
  } shared;
  __shared__ float best[kTokens], received[kTokens], cls[kTokens];
  constexpr int kChunk = kChunkBytes / static_cast<int>(sizeof(T));

  const int block = static_cast<int>(blockIdx.x) % token_blocks;
  const int b = static_cast<int>(blockIdx.x) / token_blocks;
  const int64_t start = p.cu_seqlens[b];
  const int64_t first = start + 1 + int64_t{block} * kTokens;
  const int64_t left = p.cu_seqlens[b + 1] - first;
  if (left <= 0) return;
  const int tokens = left < kTokens ? static_cast<int>(left) : kTokens;
  const int thread = static_cast<int>(threadIdx.x), first_row = warp_id() * Alignment::kRows;
  float* partial = partials_of(p, partials, b, start) + block * partial_size(p);

  if (thread < kTokens) {
    received[thread] = thread < tokens ? p.received[first + thread] : 0.0f;
    cls[thread] = thread < tokens ? p.cls[first + thread] : 0.0f;
  }

  const T* x = static_cast<const T*>(p.x.data) + first * p.x.stride;
  Alignment g;
  const auto align = [&](int first_entry) {
    const T* dictionary = static_cast<const T*>(p.dictionary.data) + first_entry * p.dictionary.stride;
    const auto stage_chunk = [&](int column, int into) {
      if (column < p.width) {
        stage<kThreads>(shared.operands.x[into], x + column, p.x.stride, tokens, p.width - column, is_vectorised);
        stage<kThreads>(shared.operands.dictionary[into], dictionary + column, p.dictionary.stride,
                        p.entries - first_entry, p.width - column, is_vectorised);
      }
      __pipeline_commit();
    };
    g.fill(0.0f);
    __syncthreads();  // the last alignment has been used
    stage_chunk(0, 0);
    for (int column = 0, buffer = 0; column < p.width; column += kChunk, buffer ^= 1) {
      __pipeline_wait_prior(0);
      __syncthreads();  // this chunk is complete, and the other buffer has been read
      stage_chunk(column + kChunk, buffer ^ 1);
      multiply(g, shared.operands.x[buffer], first_row, shared.operands.dictionary[buffer], p.width - column);
    }
#pragma unroll
    for (int n = 0; n < kEntries / 8; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int entry = first_entry + Alignment::column(n, e);
        if (entry >= p.entries) {
          g.at[n][e] = -kInfinity;
        } else if (p.bias != nullptr) {
          g.at[n][e] += p.bias[entry];
        }
      }
    }
  };

  float largest[2] = {-kInfinity, -kInfinity};  // of the lane's two tokens
  int first_entry = 0;
  for (;; first_entry += kEntries) {
    align(first_entry);
#pragma unroll
    for (int n = 0; n < kEntries / 8; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) largest[e / 2] = maximum_or_nan(largest[e / 2], g.at[n][e]);
    }
    if (first_entry + kEntries >= p.entries) break;
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    largest[r] = maximum_or_nan(largest[r], __shfl_xor_sync(kAllLanes, largest[r], 1));
    largest[r] = maximum_or_nan(largest[r], __shfl_xor_sync(kAllLanes, largest[r], 2));
    const int row = first_row + Alignment::row(2 * r);
    if (lane_id() % 4 == 0) {
      best[row] = row < tokens ? largest[r] : 0.0f;
      if (row < tokens) p.importance[first + row] = largest[r];  // until the second kernel knows the sums
    }
  }
  __syncthreads();
  if (warp_id() < 2) {
    const float* terms = warp_id() == 0 ? received : best;
    const float sum = warp_sum(terms[lane_id()] + terms[lane_id() + 32]);
    if (lane_id() == 0) partial[warp_id() == 0 ? kReceivedSum : kAlignmentSum] = sum;
  }

  // Backwards: the alignment with the last entries is at hand, the others (beyond 128 entries) are computed once more.
  for (bool is_at_hand = true; first_entry >= 0; first_entry -= kEntries, is_at_hand = false) {
    if (!is_at_hand) align(first_entry);
    __syncthreads();  // the operands have been read
#pragma unroll
    for (int n = 0; n < kEntries / 8; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) shared.alignment[first_row + Alignment::row(e)][Alignment::column(n, e)] = g.at[n][e];
    }
    __syncthreads();
    const int entry = first_entry + thread;
    if (entry >= p.entries) continue;
    float top = -kInfinity;
    for (int j = 0; j < tokens; ++j) top = fmaxf(top, shared.alignment[j][thread]);
    float sums[kStatistics] = {};
    for (int j = 0; j < tokens; ++j) {
      const float e = exp2f((shared.alignment[j][thread] - finite(top)) * scale);
      sums[kWeight] += e;
      sums[kReceived] = fmaf(e, received[j], sums[kReceived]);
      sums[kAligned] = fmaf(e, best[j], sums[kAligned]);
      sums[kCls] = fmaf(e, cls[j], sums[kCls]);
    }
    sums[kLargest] = top;
#pragma unroll
    for (int s = 0; s < kStatistics; ++s) partial[kHeader + s * p.entries + entry] = sums[s];
  }
}

// One block for each sample.
__global__ void __launch_bounds__(kFinishThreads)
    threshold_kernel(const ScoringArguments p, float* partials, const float scale) {
  __shared__ float lowest_of_warp[kFinishThreads / 32];
  const int b = static_cast<int>(blockIdx.x), thread = static_cast<int>(threadIdx.x);
  const int64_t start = p.cu_seqlens[b], size = partial_size(p);
  const int length = static_cast<int>(p.cu_seqlens[b + 1] - start);
  const int blocks = (length - 1 + kTokens - 1) / kTokens;
  const float* partial = partials_of(p, partials, b, start);

  float received_sum = kEps, alignment_sum = kEps;
  for (int i = 0; i < blocks; ++i) {
    received_sum += partial[i * size + kReceivedSum];
    alignment_sum += partial[i * size + kAlignmentSum];
  }

  float lowest = kInfinity;
  for (int entry = thread; entry < p.entries; entry += kFinishThreads) {
    const auto statistic = [&](int i, int s) { return partial[i * size + kHeader + s * p.entries + entry]; };
    float top = -kInfinity;
    for (int i = 0; i < blocks; ++i) top = fmaxf(top, statistic(i, kLargest));
    float weight = 0.0f, received = 0.0f, aligned = 0.0f, cls = 0.0f;
    for (int i = 0; i < blocks; ++i) {
      const float shrink = exp2f((statistic(i, kLargest) - finite(top)) * scale);
      weight = fmaf(shrink, statistic(i, kWeight), weight);
      received = fmaf(shrink, statistic(i, kReceived), received);
      aligned = fmaf(shrink, statistic(i, kAligned), aligned);
      cls = fmaf(shrink, statistic(i, kCls), cls);
    }
    lowest = minimum_or_nan(lowest, (received / received_sum + aligned / alignment_sum + cls) / (3.0f * weight));
  }
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    lowest = minimum_or_nan(lowest, __shfl_xor_sync(kAllLanes, lowest, distance));
  }
  if (lane_id() == 0) lowest_of_warp[warp_id()] = lowest;
  __syncthreads();
  if (thread == 0) {
    for (int warp = 1; warp < kFinishThreads / 32; ++warp) lowest = minimum_or_nan(lowest, lowest_of_warp[warp]);
    p.threshold[b] = length > 1 ? lowest : 0.0f;
  }

  for (int j = thread; j < length; j += kFinishThreads) {
    const int64_t row = start + j;
    p.importance[row] =
        j == 0 ? 0.0f : (p.received[row] / received_sum + p.importance[row] / alignment_sum + p.cls[row]) / 3.0f;
  }
}

}  // namespace

int64_t scoring_workspace(const ScoringArguments& p) { return (p.capacity / kTokens + p.batch) * partial_size(p); }

const char* launch_scoring(const ScoringArguments& p, float* workspace, Stream stream) {
  const float scale = exponent_scale(p);
  const char* error = with_type(p.type, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const int token_blocks = static_cast<int>(ceil_div(p.max_seqlen - 1, kTokens));
    const bool is_vectorised = is_vectorisable(p.x.data, p.x.stride, p.width, sizeof(T)) &&
                               is_vectorisable(p.dictionary.data, p.dictionary.stride, p.width, sizeof(T));
    return launch(alignment_kernel<T>, int64_t{p.batch} * token_blocks, kThreads, stream, p, token_blocks, workspace,
                  scale, is_vectorised);
  });
  return error != nullptr ? error : launch(threshold_kernel, p.batch, kFinishThreads, stream, p, workspace, scale);
}

}  // namespace madtp::cuda
