// Selection, compaction and merging: which tokens survive, then each sample's token 0, survivors in order,
// and one row sum_dropped w x / (sum_dropped w + 1e-8) for the others, w = importance (times size).
//
// One block decides for a sample: counts, finds the cut-off score where a number of tokens is asked for, and
// scans; the result is an order of the sample's tokens, survivors first. Then one block adds up the new
// lengths, and warps move rows, reading each once; the first blocks of that launch make the merged rows,
// which take longest. Nothing depends on the order in which blocks run.
#include <cub/block/block_reduce.cuh>
#include <cub/block/block_scan.cuh>

#include "cuda/utils.cuh"

namespace madtp::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kRowsPerWarp = 4;
constexpr int kBlockRows = kWarps * kRowsPerWarp;
constexpr int kVectorsInFlight = 4;  // of a row, for each lane

using BlockScan = cub::BlockScan<int, kThreads>;
using BlockReduce = cub::BlockReduce<int, kThreads>;

struct Largest {
  __device__ int operator()(int a, int b) const { return a < b ? b : a; }
};

// The sum, or the result of another reduction, for all threads of a block.
struct BlockTotal {
  typename BlockReduce::TempStorage storage;
  int result;

  __device__ int sum(int x) { return shared_with_all(BlockReduce(storage).Sum(x)); }
  __device__ int largest(int x) { return shared_with_all(BlockReduce(storage).Reduce(x, Largest())); }

 private:
  __device__ int shared_with_all(int x) {
    if (threadIdx.x == 0) result = x;
    __syncthreads();
    const int total = result;
    __syncthreads();  // read, before the storage is used again
    return total;
  }
};

// ---- which tokens survive ----

// A sample without its token 0: position j of the sample is token j - 1 here.
struct Prunable {
  int64_t first;  // row of x
  int count;

  __device__ Prunable(const CompactionArguments& p, int b) : first(p.cu_seqlens[b] + int64_t{1}) {
    const int length = p.cu_seqlens[b + 1] - p.cu_seqlens[b];
    count = length > 0 ? length - 1 : 0;
  }
};

__device__ bool is_protected(const CompactionArguments& p, int64_t row) {
  return p.is_protected != nullptr && p.is_protected[row];
}

__device__ bool exceeds_threshold(const CompactionArguments& p, int b, int64_t row) {
  return p.importance[row] > p.threshold[b] || is_protected(p, row);
}

// Orders the tokens of a sample: protected ones first, then by importance, then by position, earlier first.
// All distinct, for any bits of the importance, so that exactly K tokens are the K best. 1 + 32 + 31 bits.
constexpr int kPositionBits = 31;

__device__ uint64_t rank_key(const CompactionArguments& p, const Prunable& tokens, int j) {
  const float score = p.importance[tokens.first + j];
  const uint32_t bits = __float_as_uint(score == 0.0f ? 0.0f : score);  // one zero, not two
  const uint32_t ordered = bits >> 31 != 0 ? ~bits : bits | 0x80000000u;
  const uint64_t first = is_protected(p, tokens.first + j) ? 1 : 0;
  return first << 63 | static_cast<uint64_t>(ordered) << kPositionBits | static_cast<uint64_t>(tokens.count - 1 - j);
}

// How many tokens of sample b survive if nothing but its own rule matters.
__device__ int own_count(const CompactionArguments& p, int b, const Prunable& tokens, BlockTotal& total) {
  if (p.keep_count != nullptr) return min(max(p.keep_count[b], 0), tokens.count);
  int survivors = 0;
  for (int j = static_cast<int>(threadIdx.x); j < tokens.count; j += kThreads) {
    survivors += exceeds_threshold(p, b, tokens.first + j);
  }
  return total.sum(survivors);
}

__global__ void __launch_bounds__(kThreads) count_kernel(const CompactionArguments p, const Selection selection) {
  __shared__ BlockTotal total;
  const int b = static_cast<int>(blockIdx.x);
  const int own = own_count(p, b, Prunable(p, b), total);
  if (threadIdx.x == 0) selection.own[b] = own;
}

// The rank_key of the `keep` best token (1 <= keep <= count), or one between it and the next: by bisection,
// bit after bit.
__device__ uint64_t cut_off(const CompactionArguments& p, const Prunable& tokens, int keep, BlockTotal& total) {
  const int position_bits = 32 - __clz(tokens.count);
  uint64_t cut = 0;
  for (int bit = 63; bit >= 0; --bit) {
    if (bit < kPositionBits && bit >= position_bits) continue;  // no position has this bit
    const uint64_t candidate = cut | uint64_t{1} << bit;
    int above = 0;
    for (int j = static_cast<int>(threadIdx.x); j < tokens.count; j += kThreads) {
      above += rank_key(p, tokens, j) >= candidate;
    }
    above = total.sum(above);
    if (above >= keep) cut = candidate;
    if (above == keep) break;
  }
  return cut;
}

// One block for each sample.
__global__ void __launch_bounds__(kThreads) select_kernel(const CompactionArguments p, const Selection selection) {
  __shared__ BlockTotal total;
  __shared__ typename BlockScan::TempStorage scan_storage;
  const int b = static_cast<int>(blockIdx.x), thread = static_cast<int>(threadIdx.x);
  const Prunable tokens(p, b);
  const int length = p.cu_seqlens[b + 1] - p.cu_seqlens[b];
  int32_t* order = selection.order + p.cu_seqlens[b];

  int keep;
  if (p.groups == nullptr) {
    keep = own_count(p, b, tokens, total);
  } else {
    int largest = 0;
    for (int other = thread; other < p.batch; other += kThreads) {
      if (p.groups[other] == p.groups[b]) largest = max(largest, selection.own[other]);
    }
    keep = min(total.largest(largest), tokens.count);
  }

  const int needed = p.min_keep == nullptr ? 0 : max(p.min_keep[b], 0);
  const bool is_pruned = keep > needed && tokens.count - keep >= 2;
  if (thread == 0) selection.kept[b] = is_pruned ? 1 + keep : length;
  if (!is_pruned) {
    for (int j = thread; j < length; j += kThreads) order[j] = j;
    return;
  }

  const bool is_ranked = p.groups != nullptr || p.keep_count != nullptr;
  const uint64_t cut = is_ranked ? cut_off(p, tokens, keep, total) : 0;
  if (thread == 0) order[0] = 0;
  int kept_before = 0;
  for (int first = 0; first < tokens.count; first += kThreads) {
    const int j = first + thread;
    bool survives = false;
    if (j < tokens.count) {
      survives = is_ranked ? rank_key(p, tokens, j) >= cut : exceeds_threshold(p, b, tokens.first + j);
    }
    int before, all;
    BlockScan(scan_storage).ExclusiveSum(static_cast<int>(survives), before, all);
    before += kept_before;
    if (j < tokens.count) order[1 + (survives ? before : keep + j - before)] = 1 + j;
    kept_before += all;
    __syncthreads();  // the scan is over, before its storage is used again
  }
}

// Offsets of the result, by a single block.
__global__ void __launch_bounds__(kThreads) offsets_kernel(const CompactionArguments p, const Selection selection) {
  __shared__ typename BlockScan::TempStorage scan_storage;
  if (threadIdx.x == 0) selection.cu_out[0] = 0;
  int rows_before = 0;
  for (int first = 0; first < p.batch; first += kThreads) {
    const int b = first + static_cast<int>(threadIdx.x);
    int rows = 0;
    if (b < p.batch) {
      const int kept = selection.kept[b];
      rows = kept + (kept < p.cu_seqlens[b + 1] - p.cu_seqlens[b]);
    }
    int end, all;
    BlockScan(scan_storage).InclusiveSum(rows, end, all);
    if (b < p.batch) selection.cu_out[b + 1] = rows_before + end;
    rows_before += all;
    __syncthreads();
  }
}

// ---- rows ----

// A warp copies a row.
template <int LANES, class T>
__device__ void copy_row(const T* __restrict__ from, T* __restrict__ to, int width) {
  constexpr int kStep = 32 * LANES;
  for (int first = lane_id() * LANES; first < width; first += kStep * kVectorsInFlight) {
    Vector<T, LANES> part[kVectorsInFlight];
#pragma unroll
    for (int v = 0; v < kVectorsInFlight; ++v) {
      if (first + v * kStep < width) part[v] = load<LANES>(from + first + v * kStep);
    }
#pragma unroll
    for (int v = 0; v < kVectorsInFlight; ++v) {
      if (first + v * kStep < width) store(to + first + v * kStep, part[v]);
    }
  }
}

// A warp normalises a row, which it has just read or written, so that it comes from cache.
template <int LANES, class T>
__device__ void normalise_row(const CompactionArguments& p, const T* row, T* to) {
  constexpr int kStep = 32 * LANES;
  const int own = lane_id() * LANES;
  float sum = 0.0f;
  for (int column = own; column < p.width; column += kStep) {
    const auto part = load<LANES>(row + column);
#pragma unroll
    for (int i = 0; i < LANES; ++i) sum += to_float(part.lanes[i]);
  }
  const float mean = warp_sum(sum) / static_cast<float>(p.width);
  float square = 0.0f;
  for (int column = own; column < p.width; column += kStep) {
    const auto part = load<LANES>(row + column);
#pragma unroll
    for (int i = 0; i < LANES; ++i) {
      const float difference = to_float(part.lanes[i]) - mean;
      square = fmaf(difference, difference, square);
    }
  }
  const float inverse = 1.0f / sqrtf(warp_sum(square) / static_cast<float>(p.width) + p.norm_eps);
  for (int column = own; column < p.width; column += kStep) {
    auto part = load<LANES>(row + column);
#pragma unroll
    for (int i = 0; i < LANES; ++i) {
      const float shift = p.norm_bias == nullptr ? 0.0f : p.norm_bias[column + i];
      part.lanes[i] = from_float<T>(fmaf((to_float(part.lanes[i]) - mean) * inverse, p.norm_weight[column + i], shift));
    }
    store(to + column, part);
  }
}

// A block makes the merged row of a sample: every warp adds up every eighth dropped row, then the warps' sums
// are added.
template <int LANES, class T>
__device__ void merge_rows(const CompactionArguments& p, const Selection& selection, const CompactedRows& result,
                           int b) {
  constexpr int kColumns = 32 * LANES * kVectorsInFlight;
  __shared__ float sums[kWarps][kColumns];
  __shared__ float weight_sums[kWarps], size_sums[kWarps];
  const int64_t start = p.cu_seqlens[b];
  const int kept = selection.kept[b], dropped = static_cast<int>(p.cu_seqlens[b + 1] - start) - kept;
  if (dropped == 0) return;
  const int32_t* order = selection.order + start + kept;
  const int64_t out_row = selection.cu_out[b + 1] - int64_t{1};
  const T* x = static_cast<const T*>(p.x.data);
  T* merged_row = static_cast<T*>(result.values) + out_row * p.width;

  float weight_sum = 0.0f, size_sum = 0.0f;
  for (int first_column = 0; first_column < p.width; first_column += kColumns) {
    float merged[kVectorsInFlight][LANES] = {};
    for (int first = warp_id(); first < dropped; first += 32 * kWarps) {
      // Each lane fetches one row's position and weight, then all lanes go through these rows.
      const int own = first + lane_id() * kWarps;
      int64_t own_row = start;
      float own_weight = 0.0f;
      if (own < dropped) {
        own_row += order[own];
        const float size = p.sizes == nullptr ? 1.0f : p.sizes[own_row];
        own_weight = p.importance[own_row] * size;
        if (first_column == 0) {
          weight_sum += own_weight;
          size_sum += size;
        }
      }
      const int rows = min(32, (dropped - first + kWarps - 1) / kWarps);
#pragma unroll 2
      for (int r = 0; r < rows; ++r) {
        const T* row = x + __shfl_sync(kAllLanes, own_row, r) * p.x.stride;
        const float weight = __shfl_sync(kAllLanes, own_weight, r);
#pragma unroll
        for (int v = 0; v < kVectorsInFlight; ++v) {
          const int column = first_column + (v * 32 + lane_id()) * LANES;
          if (column >= p.width) continue;
          const auto part = load<LANES>(row + column);
#pragma unroll
          for (int i = 0; i < LANES; ++i) merged[v][i] = fmaf(weight, to_float(part.lanes[i]), merged[v][i]);
        }
      }
    }
    if (first_column == 0) {
      weight_sum = warp_sum(weight_sum);
      size_sum = warp_sum(size_sum);
      if (lane_id() == 0) {
        weight_sums[warp_id()] = weight_sum;
        size_sums[warp_id()] = size_sum;
      }
    }
#pragma unroll
    for (int v = 0; v < kVectorsInFlight; ++v) {
#pragma unroll
      for (int i = 0; i < LANES; ++i) sums[warp_id()][(v * LANES + i) * 32 + lane_id()] = merged[v][i];
    }
    __syncthreads();
    float total = kEps;
    for (int warp = 0; warp < kWarps; ++warp) total += weight_sums[warp];
    for (int i = static_cast<int>(threadIdx.x); i < kColumns; i += kThreads) {
      const int column = first_column + (i / (32 * LANES) * 32 + i % 32) * LANES + i / 32 % LANES;
      if (column >= p.width) continue;
      float sum = 0.0f;
      for (int warp = 0; warp < kWarps; ++warp) sum += sums[warp][i];
      merged_row[column] = from_float<T>(sum / total);
    }
    __syncthreads();  // the sums have been read, and the row is written
  }

  if (threadIdx.x == 0) {
    result.ids[out_row] = p.merged_id;
    if (result.sizes != nullptr) {
      float size = 0.0f;
      for (int warp = 0; warp < kWarps; ++warp) size += size_sums[warp];
      result.sizes[out_row] = size;
    }
  }
  if (result.normed != nullptr && warp_id() == 0) {
    normalise_row<LANES>(p, merged_row, static_cast<T*>(result.normed) + out_row * p.width);
  }
}

// The first block of each sample merges; the others take 32 of its surviving rows each, a warp one after
// another.
template <class T, int LANES>
__global__ void __launch_bounds__(kThreads, 3)
    compaction_kernel(const CompactionArguments p, const Selection selection, const CompactedRows result,
                      const int row_blocks) {
  if (static_cast<int>(blockIdx.x) < p.batch) {
    merge_rows<LANES, T>(p, selection, result, static_cast<int>(blockIdx.x));
    return;
  }
  const int copying = static_cast<int>(blockIdx.x) - p.batch;
  const int b = copying / row_blocks, first = copying % row_blocks * kBlockRows;
  const int kept = selection.kept[b];
  const int64_t start = p.cu_seqlens[b], out_start = selection.cu_out[b];
  for (int r = first + warp_id(); r < min(first + kBlockRows, kept); r += kWarps) {
    const int32_t position = selection.order[start + r];
    const int64_t row = start + position, out_row = out_start + r;
    const T* x_row = static_cast<const T*>(p.x.data) + row * p.x.stride;
    copy_row<LANES>(x_row, static_cast<T*>(result.values) + out_row * p.width, p.width);
    if (lane_id() == 0) {
      result.ids[out_row] = p.ids == nullptr ? position : p.ids[row];
      if (result.sizes != nullptr) result.sizes[out_row] = p.sizes[row];
    }
    if (result.normed != nullptr) {
      normalise_row<LANES>(p, x_row, static_cast<T*>(result.normed) + out_row * p.width);
    }
  }
}

}  // namespace

const char* launch_selection(const CompactionArguments& p, const Selection& selection, Stream stream) {
  const char* error = nullptr;
  if (p.groups != nullptr) error = launch(count_kernel, p.batch, kThreads, stream, p, selection);
  if (error == nullptr) error = launch(select_kernel, p.batch, kThreads, stream, p, selection);
  return error != nullptr ? error : launch(offsets_kernel, 1, kThreads, stream, p, selection);
}

const char* launch_compaction(const CompactionArguments& p, const Selection& selection, const CompactedRows& result,
                              Stream stream) {
  return with_type(p.type, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const int row_blocks = static_cast<int>(ceil_div(p.max_seqlen, kBlockRows));
    // Result buffers are contiguous and start on a vector: what holds for the width holds for their rows.
    const bool is_vectorised = is_vectorisable(p.x.data, p.x.stride, p.width, sizeof(T));
    const auto kernel = is_vectorised ? compaction_kernel<T, kVectorLanes<T>> : compaction_kernel<T, 1>;
    return launch(kernel, p.batch * int64_t{1 + row_blocks}, kThreads, stream, p, selection, result, row_blocks);
  });
}

}  // namespace madtp::cuda
