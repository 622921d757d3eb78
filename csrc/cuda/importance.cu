// The attention that tokens receive, from probabilities recomputed tile by tile: no L x L matrix, no atomics.
//
//   P[h, i, j] = exp(scale * <q_hi, k_hj> + key_bias_j - lse[h, i])
//   received_j = sum_{i >= 1} max_h P[h, i, j]      cls_j = sum_h P[h, 0, j] |out_hj| / (sum_h |out_hj| + 1e-8)
//
// A block of the first kernel takes 64 keys of one sample and every sixteenth block of 64 queries, with all
// heads inside, so that the maximum over heads stays in registers; max_h exp(z_h) = exp(max_h z_h) needs one
// exponential for all heads. The second kernel adds the sixteen partial sums and computes the CLS term.
// Everything counts from token 1 of a sample, and what is added in which order depends on the sample alone.
// Logits are in units of log 2.
#include "cuda/ops.h"
#include "cuda/tile.cuh"

namespace madtp::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kTokens = 64;  // queries, and keys, of a tile
constexpr int kSplits = 16;  // shares of a sample's query blocks, so that a small batch occupies the device
constexpr int kChunkBytes = 128;

constexpr int kFinishThreads = 256;
constexpr int kFinishTokens = 32;  // of a block
constexpr int kHeadLanes = 8;      // of a head in the CLS term

template <class T>
using TokenTile = Tile<T, kTokens, kChunkBytes>;
using Logits = Accumulator<kTokens / 8>;

// Blocks of the first `splits` shares; `key_blocks` and `splits` bound what the samples have.
struct Grid {
  int key_blocks, splits;
};

Grid grid_of(const ImportanceArguments& p) {
  const int blocks = static_cast<int>(ceil_div(p.max_seqlen - 1, kTokens));
  return {blocks, blocks < kSplits ? blocks : kSplits};
}

template <class T>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 2 ? 4 : 2)
    received_kernel(const ImportanceArguments p, const Grid grid, float* partial, const bool is_vectorised) {
  __shared__ TokenTile<T> q_tiles[2], k_tiles[2];
  __shared__ float bias[kTokens], sums[kThreads / 32][kTokens];
  constexpr int kChunk = TokenTile<T>::kColumns;

  const int split = static_cast<int>(blockIdx.x) % grid.splits;
  const int key_block = static_cast<int>(blockIdx.x) / grid.splits % grid.key_blocks;
  const int b = static_cast<int>(blockIdx.x) / grid.splits / grid.key_blocks;
  const int64_t start = p.cu_seqlens[b] + int64_t{1};
  const int tokens = static_cast<int>(p.cu_seqlens[b + 1] - start);
  const int first_key = key_block * kTokens;
  if (first_key >= tokens || split * kTokens >= tokens) return;

  const int query_blocks = (tokens + kTokens - 1) / kTokens;
  int first_block = split;
  // Earlier causal queries see none of these keys.
  while (p.causal && first_block < key_block) first_block += kSplits;

  const T* q = static_cast<const T*>(p.q.data) + start * p.q.token_stride;
  const T* k = static_cast<const T*>(p.k.data) + (start + first_key) * p.k.token_stride;
  const float scale = p.scale * kLog2e;
  const int first_row = warp_id() * Logits::kRows;
  if (threadIdx.x < kTokens) {
    const int j = first_key + static_cast<int>(threadIdx.x);
    bias[threadIdx.x] = p.key_bias != nullptr && j < tokens ? p.key_bias[start + j] * kLog2e : 0.0f;
  }

  // Tiles travel one step ahead of the products, through query blocks, heads and chunks of the head dimension in turn.
  int next_block = first_block, next_head = 0, next_column = 0, buffer = 0;
  const auto stage_next = [&](int into) {
    if (next_block < query_blocks) {
      const int first_query = next_block * kTokens;
      const int64_t q_offset = first_query * p.q.token_stride + next_head * p.q.head_stride + next_column;
      const int64_t k_offset = next_head * p.k.head_stride + next_column;
      stage<kThreads>(q_tiles[into], q + q_offset, p.q.token_stride, tokens - first_query, p.head_dim - next_column,
                      is_vectorised);
      stage<kThreads>(k_tiles[into], k + k_offset, p.k.token_stride, tokens - first_key, p.head_dim - next_column,
                      is_vectorised);
      next_column += kChunk;
      if (next_column >= p.head_dim) {
        next_column = 0;
        if (++next_head == p.heads) {
          next_head = 0;
          next_block += kSplits;
        }
      }
    }
    __pipeline_commit();
  };
  stage_next(0);

  float received[kTokens / 8][2] = {};  // of the lane's keys, from its own queries
  for (int block = first_block; block < query_blocks; block += kSplits) {
    const int i = block * kTokens + first_row;  // the warp's first query
    Logits best;
    best.fill(-kInfinity);
    for (int head = 0; head < p.heads; ++head) {
      float shift[2];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int row = i + Logits::row(2 * r);
        shift[r] = row < tokens ? p.lse[head * p.lse_stride + start + row] * kLog2e : kInfinity;
        if (shift[r] == -kInfinity) shift[r] = kInfinity;  // like a query past the end: it gives nothing
      }
      Logits s;
      s.fill(0.0f);
      for (int column = 0; column < p.head_dim; column += kChunk) {
        __pipeline_wait_prior(0);
        __syncthreads();  // this tile is complete, and the other one has been read
        stage_next(buffer ^ 1);
        multiply(s, q_tiles[buffer], first_row, k_tiles[buffer], p.head_dim - column);
        buffer ^= 1;
      }
#pragma unroll
      for (int n = 0; n < kTokens / 8; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          best.at[n][e] = maximum_or_nan(best.at[n][e], fmaf(s.at[n][e], scale, -shift[e / 2]));
        }
      }
    }
#pragma unroll
    for (int n = 0; n < kTokens / 8; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int j = Logits::column(n, e);
        const bool is_seen = !p.causal || first_key + j <= i + Logits::row(e);
        received[n][e % 2] += is_seen ? exp2f(best.at[n][e] + bias[j]) : 0.0f;
      }
    }
  }

#pragma unroll
  for (int n = 0; n < kTokens / 8; ++n) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
#pragma unroll
      for (int distance = 4; distance < 32; distance *= 2) {
        received[n][e] += __shfl_xor_sync(kAllLanes, received[n][e], distance);
      }
      if (lane_id() < 4) sums[warp_id()][Logits::column(n, e)] = received[n][e];
    }
  }
  __syncthreads();
  const int j = static_cast<int>(threadIdx.x);
  if (j < kTokens && first_key + j < tokens) {
    partial[split * p.capacity + start + first_key + j] = (sums[0][j] + sums[1][j]) + (sums[2][j] + sums[3][j]);
  }
}

// A warp takes a token, 8 lanes of it a head.
template <class T, int LANES>
__global__ void __launch_bounds__(kFinishThreads, 3)
    finish_kernel(const ImportanceArguments p, const int token_blocks, const float* partial) {
  const int b = static_cast<int>(blockIdx.x) / token_blocks;
  const int first = static_cast<int>(blockIdx.x) % token_blocks * kFinishTokens;
  const int64_t start = p.cu_seqlens[b];
  const int length = static_cast<int>(p.cu_seqlens[b + 1] - start);
  const int splits = min((length - 1 + kTokens - 1) / kTokens, kSplits);
  const int own_head = lane_id() / kHeadLanes, own_lane = lane_id() % kHeadLanes;
  const T* cls_query = static_cast<const T*>(p.q.data) + start * p.q.token_stride;

  for (int j = first + warp_id(); j < min(first + kFinishTokens, length); j += kFinishThreads / 32) {
    const int64_t row = start + j;
    if (j == 0) {
      if (lane_id() == 0) p.received[row] = p.cls[row] = 0.0f;
      continue;
    }
    const float total = warp_sum(lane_id() < splits ? partial[lane_id() * p.capacity + row] : 0.0f);

    float weighted = 0.0f, weight = 0.0f;
    const float bias = p.key_bias != nullptr ? p.key_bias[row] : 0.0f;
    for (int first_head = 0; first_head < p.heads; first_head += 32 / kHeadLanes) {
      const int head = first_head + own_head;
      float logit = 0.0f, square = 0.0f;
      if (head < p.heads) {
        const T* q = cls_query + head * p.q.head_stride;
        const T* k = static_cast<const T*>(p.k.data) + row * p.k.token_stride + head * p.k.head_stride;
        const T* out = static_cast<const T*>(p.out.data) + row * p.out.token_stride + head * p.out.head_stride;
#pragma unroll 1
        for (int column = own_lane * LANES; column < p.head_dim; column += kHeadLanes * LANES) {
          const auto q_part = load<LANES>(q + column), k_part = load<LANES>(k + column);
          const auto out_part = load<LANES>(out + column);
#pragma unroll
          for (int i = 0; i < LANES; ++i) {
            logit = fmaf(to_float(q_part.lanes[i]), to_float(k_part.lanes[i]), logit);
            square = fmaf(to_float(out_part.lanes[i]), to_float(out_part.lanes[i]), square);
          }
        }
      }
      logit = warp_sum<kHeadLanes>(logit);
      const float norm = sqrtf(warp_sum<kHeadLanes>(square));
      if (head < p.heads) {
        float shift = p.lse[head * p.lse_stride + start];
        if (shift == -kInfinity) shift = kInfinity;  // it sees no key, and gives nothing
        const float log_probability = fmaf(logit, p.scale, bias) - shift;
        weighted = fmaf(exp2f(log_probability * kLog2e), norm, weighted);
        weight += norm;
      }
    }
#pragma unroll
    for (int distance = kHeadLanes; distance < 32; distance *= 2) {
      weighted += __shfl_xor_sync(kAllLanes, weighted, distance);
      weight += __shfl_xor_sync(kAllLanes, weight, distance);
    }
    if (lane_id() == 0) {
      p.received[row] = total;
      p.cls[row] = p.causal ? 0.0f : weighted / (weight + kEps);  // a causal CLS query sees only itself
    }
  }
}

}  // namespace

int64_t importance_workspace(const ImportanceArguments& p) { return grid_of(p).splits * p.capacity; }

const char* launch_importance(const ImportanceArguments& p, float* workspace, Stream stream) {
  return with_type(p.type, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const Grid grid = grid_of(p);
    const bool is_vectorised =
        is_vectorisable(p.q, p.head_dim, sizeof(T)) && is_vectorisable(p.k, p.head_dim, sizeof(T));
    const int64_t blocks = int64_t{p.batch} * grid.key_blocks * grid.splits;
    const char* error = launch(received_kernel<T>, blocks, kThreads, stream, p, grid, workspace, is_vectorised);
    if (error != nullptr) return error;
    const int token_blocks = static_cast<int>(ceil_div(p.max_seqlen, kFinishTokens));
    const bool is_all_vectorised = is_vectorised && is_vectorisable(p.out, p.head_dim, sizeof(T));
    const auto finish = is_all_vectorised ? finish_kernel<T, kVectorLanes<T>> : finish_kernel<T, 1>;
    return launch(finish, int64_t{p.batch} * token_blocks, kFinishThreads, stream, p, token_blocks,
                  static_cast<const float*>(workspace));
  });
}

}  // namespace madtp::cuda
