// Ragged attention.
//
//   s[h, i, j] = scale * <q_hi, k_hj> + key_bias_j      lse[h, i] = log sum_j exp s[h, i, j]
//   out[i, h] = sum_j exp(s[h, i, j] - lse[h, i]) v_hj
//
// A block takes 64 queries of one sample and head, a warp 16 of them, and walks over the keys with an online
// softmax. Logits are in units of log 2. The head dimension is staged 128 bytes at a time.
#include "cuda/ops.h"
#include "cuda/tile.cuh"

namespace madtp::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kQueries = 64;
constexpr int kChunkBytes = 128;

template <class T>
constexpr int kKeys = 16 * kVectorLanes<T> / 2;  // 64, or 32 in float32: the probabilities of a block of keys fill one tile

template <class T>
constexpr int kChunk = kChunkBytes / static_cast<int>(sizeof(T));

template <class T>
using QueryTile = Tile<T, kQueries, kChunkBytes>;
template <class T>
using KeyTile = Tile<T, kKeys<T>, kChunkBytes>;
template <class T>
using Probabilities = Accumulator<kKeys<T> / 8>;
template <class T>
using OutputChunk = Accumulator<kChunk<T> / 8>;

// Rounded to the type of the values, the probabilities' accumulators are the left operand as they lie.
template <class T>
__device__ void add_values(OutputChunk<T>& out, const Probabilities<T>& p, const KeyTile<T>& v) {
  const int g = lane_id() / 4, t = lane_id() % 4;
#pragma unroll
  for (int block = 0; block < kKeys<T> / 16; ++block) {
    uint32_t a[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float* pair = &p.at[2 * block + i / 2][i % 2 * 2];
      a[i] = pair_of(from_float<T>(pair[0]), from_float<T>(pair[1]));
    }
#pragma unroll
    for (int n = 0; n < kChunk<T> / 8; ++n) {
      const T* column = v.at(16 * block + 2 * t, 8 * n + g);
      constexpr int kPitch = KeyTile<T>::kPitch;
      const uint32_t b[2] = {pair_of(column[0], column[kPitch]), pair_of(column[8 * kPitch], column[9 * kPitch])};
      multiply_fragments<T>(out.at[n], a, b);
    }
  }
}

// In float32 every lane needs whole rows of probabilities: `p` has them, the warp's own from first_row on.
__device__ void add_values(OutputChunk<float>& out, const QueryTile<float>& p, int first_row, const KeyTile<float>& v) {
  for (int j = 0; j < kKeys<float>; j += 4) {
    const auto low = load<4>(p.at(first_row + out.row(0), j)), high = load<4>(p.at(first_row + out.row(2), j));
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int n = 0; n < kChunk<float> / 8; ++n) {
        const auto values = load<2>(v.at(j + i, out.column(n, 0)));
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          out.at[n][e] = fmaf(e < 2 ? low.lanes[i] : high.lanes[i], values.lanes[e % 2], out.at[n][e]);
        }
      }
    }
  }
}

// WIDTH: 64, 128 or 256, not below the head dimension.
template <class T, int WIDTH>
__global__ void __launch_bounds__(kThreads, WIDTH == 64 && sizeof(T) == 2 ? 3 : 2)
    attention_kernel(const AttentionArguments p, const int query_blocks, const bool is_vectorised) {
  constexpr int kChunks = WIDTH / kChunk<T>;
  __shared__ QueryTile<T> q_tile;
  __shared__ KeyTile<T> k_tile, v_tile;

  const int i_q = static_cast<int>(blockIdx.x) % query_blocks;
  const int head = static_cast<int>(blockIdx.x) / query_blocks % p.heads;
  const int b = static_cast<int>(blockIdx.x) / query_blocks / p.heads;
  const int64_t q_start = p.cu_seqlens_q[b], k_start = p.cu_seqlens_k[b];
  const int queries = static_cast<int>(p.cu_seqlens_q[b + 1] - q_start);
  const int keys = static_cast<int>(p.cu_seqlens_k[b + 1] - k_start);
  const int first_query = i_q * kQueries;
  if (first_query >= queries) return;

  const int first_row = warp_id() * Accumulator<1>::kRows;
  const T* q = static_cast<const T*>(p.q.data) + (q_start + first_query) * p.q.token_stride + head * p.q.head_stride;
  const T* k = static_cast<const T*>(p.k.data) + k_start * p.k.token_stride + head * p.k.head_stride;
  const T* v = static_cast<const T*>(p.v.data) + k_start * p.v.token_stride + head * p.v.head_stride;
  const float scale = p.scale * kLog2e;

  // Query i sees keys j < i + visible.
  const int visible = p.causal ? keys - queries + 1 : keys;
  const int last_query = min(first_query + kQueries, queries) - 1;
  const int key_end = p.causal ? min(keys, last_query + visible) : keys;

  OutputChunk<T> out[kChunks];
#pragma unroll
  for (int c = 0; c < kChunks; ++c) out[c].fill(0.0f);
  float top[2] = {-kInfinity, -kInfinity};  // largest logit of the lane's two queries
  float sum[2] = {0.0f, 0.0f};              // of 2^(logit - top), over the lane's own keys

  for (int first_key = 0; first_key < key_end; first_key += kKeys<T>) {
    Probabilities<T> s;
    s.fill(0.0f);
    for (int c = 0; c * kChunk<T> < p.head_dim; ++c) {
      const int column = c * kChunk<T>;
      __syncthreads();  // the tiles have been read
      if (first_key == 0 || p.head_dim > kChunk<T>) {
        stage<kThreads>(q_tile, q + column, p.q.token_stride, queries - first_query, p.head_dim - column, is_vectorised);
      }
      stage<kThreads>(k_tile, k + first_key * p.k.token_stride + column, p.k.token_stride, keys - first_key,
                      p.head_dim - column, is_vectorised);
      __pipeline_commit();
      if (c == 0) {  // the first values travel meanwhile
        stage<kThreads>(v_tile, v + first_key * p.v.token_stride, p.v.token_stride, keys - first_key, p.head_dim,
                        is_vectorised);
        __pipeline_commit();
      }
      __pipeline_wait_prior(c == 0 ? 1 : 0);
      __syncthreads();
      multiply(s, q_tile, first_row, k_tile, p.head_dim - column);
    }

    float block_top[2] = {top[0], top[1]};
#pragma unroll
    for (int n = 0; n < kKeys<T> / 8; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int i = first_query + first_row + s.row(e), j = first_key + s.column(n, e);
        const bool is_seen = j < keys && (!p.causal || j < i + visible);
        float logit = s.at[n][e] * scale;
        if (p.key_bias != nullptr && j < keys) logit = fmaf(p.key_bias[k_start + j], kLog2e, logit);
        s.at[n][e] = is_seen ? logit : -kInfinity;
        block_top[e / 2] = fmaxf(block_top[e / 2], s.at[n][e]);
      }
    }
    float shift[2], shrink[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      block_top[r] = fmaxf(block_top[r], __shfl_xor_sync(kAllLanes, block_top[r], 1));
      block_top[r] = fmaxf(block_top[r], __shfl_xor_sync(kAllLanes, block_top[r], 2));
      // No key seen yet: 2^(-inf - 0) = 0. An infinite logit: 2^(inf - 0) = inf.
      shift[r] = fabsf(block_top[r]) == kInfinity ? 0.0f : block_top[r];
      shrink[r] = exp2f(top[r] - shift[r]);
      top[r] = block_top[r];
      sum[r] *= shrink[r];
    }
#pragma unroll
    for (int n = 0; n < kKeys<T> / 8; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        s.at[n][e] = exp2f(s.at[n][e] - shift[e / 2]);
        sum[e / 2] += s.at[n][e];
      }
    }
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
#pragma unroll
      for (int n = 0; n < kChunk<T> / 8; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) out[c].at[n][e] *= shrink[e / 2];
      }
    }
    __shared__ std::conditional_t<std::is_same_v<T, float>, QueryTile<T>, char> p_tile;
    if constexpr (std::is_same_v<T, float>) {
#pragma unroll
      for (int n = 0; n < kKeys<T> / 8; ++n) {
        for (int e = 0; e < 4; ++e) *p_tile.at(first_row + s.row(e), s.column(n, e)) = s.at[n][e];
      }
    }
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      const int column = c * kChunk<T>;
      if (column >= p.head_dim) break;
      if (c > 0) {
        __syncthreads();  // the values have been read
        stage<kThreads>(v_tile, v + first_key * p.v.token_stride + column, p.v.token_stride, keys - first_key,
                        p.head_dim - column, is_vectorised);
        __pipeline_commit();
      }
      __pipeline_wait_prior(0);
      __syncthreads();
      if constexpr (std::is_same_v<T, float>) {
        add_values(out[c], p_tile, first_row, v_tile);
      } else {
        add_values<T>(out[c], s, v_tile);
      }
    }
  }

#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float total = warp_sum<4>(sum[r]);
    const float inverse = total == 0.0f ? 0.0f : 1.0f / total;
    const int row = first_query + first_row + Accumulator<1>::row(2 * r);
    if (row >= queries) continue;
    const int64_t i = q_start + row;
    // A query that sees no key: total = 0 and top = -inf.
    if (lane_id() % 4 == 0) p.lse[head * p.capacity_q + i] = total == 0.0f ? -kInfinity : (top[r] + log2f(total)) * kLn2;
    T* out_row = static_cast<T*>(p.out) + (i * p.heads + head) * p.head_dim;
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
#pragma unroll
      for (int n = 0; n < kChunk<T> / 8; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int column = c * kChunk<T> + OutputChunk<T>::column(n, e);
          if (column < p.head_dim) out_row[column] = from_float<T>(out[c].at[n][2 * r + e] * inverse);
        }
      }
    }
  }
}

template <class T, int WIDTH>
const char* launch_width(const AttentionArguments& p, Stream stream) {
  const int64_t query_blocks = ceil_div(p.max_seqlen_q, kQueries);
  const bool is_vectorised = is_vectorisable(p.q, p.head_dim, sizeof(T)) && is_vectorisable(p.k, p.head_dim, sizeof(T)) &&
                             is_vectorisable(p.v, p.head_dim, sizeof(T));
  return launch(attention_kernel<T, WIDTH>, query_blocks * p.heads * p.batch, kThreads, stream, p,
                static_cast<int>(query_blocks), is_vectorised);
}

}  // namespace

const char* launch_attention(const AttentionArguments& p, Stream stream) {
  return with_type(p.type, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (p.head_dim <= 64) return launch_width<T, 64>(p, stream);
    if (p.head_dim <= 128) return launch_width<T, 128>(p, stream);
    return launch_width<T, 256>(p, stream);
  });
}

}  // namespace madtp::cuda
