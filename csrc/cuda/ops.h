// Launchers of the CUDA kernels: raw pointers, sizes and a stream. Free of torch, so that nvcc alone compiles
// the .cu files; dispatch.h calls these for tensors. Contracts are those of the Python functions in
// madtp_kernels. C is the number of rows in a buffer, T = cu_seqlens[batch] <= C the number of tokens, which
// only the device knows. Strides count elements; the last dimension of every operand is dense. Each launcher
// returns null, or the reason why a kernel could not be launched. Nothing here waits for the device or
// allocates: a workspace comes from the caller, of the size that is asked for first.
#pragma once

#include <cstdint>

namespace madtp::cuda {

enum class ElementType { f32, bf16, f16 };

using Stream = void*;  // cudaStream_t

// A [C, H, d] operand.
struct HeadRows {
  const void* data;
  int64_t token_stride, head_stride;
};

// A [C, D] operand.
struct Rows {
  const void* data;
  int64_t stride;
};

struct AttentionArguments {
  ElementType type;
  HeadRows q, k, v;
  const int32_t *cu_seqlens_q, *cu_seqlens_k;
  const float* key_bias;  // [Ck] or null
  void* out;              // [Cq, H, d]
  float* lse;             // [H, Cq]
  int64_t capacity_q, max_seqlen_q;
  int32_t batch, heads, head_dim;
  float scale;
  bool causal;
};

const char* launch_attention(const AttentionArguments& arguments, Stream stream);

struct ImportanceArguments {
  ElementType type;
  HeadRows q, k, out;
  const float* lse;  // [H, C], rows lse_stride apart
  int64_t lse_stride;
  const int32_t* cu_seqlens;
  const float* key_bias;  // [C] or null
  float *received, *cls;  // [C]
  int64_t capacity, max_seqlen;
  int32_t batch, heads, head_dim;
  float scale;
  bool causal;
};

// In floats.
int64_t importance_workspace(const ImportanceArguments& arguments);
const char* launch_importance(const ImportanceArguments& arguments, float* workspace, Stream stream);

struct ScoringArguments {
  ElementType type;
  Rows x, dictionary;           // [C, D], [M, D]
  const float *received, *cls;  // [C]
  const int32_t* cu_seqlens;
  const float* bias;  // [M] or null
  float* importance;  // [C]
  float* threshold;   // [B]
  int64_t capacity, max_seqlen;
  int32_t batch, width, entries;
  double temperature;
};

// In floats.
int64_t scoring_workspace(const ScoringArguments& arguments);
const char* launch_scoring(const ScoringArguments& arguments, float* workspace, Stream stream);

struct CompactionArguments {
  ElementType type;
  Rows x;                      // [C, D]
  const float* importance;     // [C]
  const float* threshold;      // [B] or null
  const int32_t* keep_count;   // [B]; null if and only if there is a threshold
  const int32_t* cu_seqlens;
  const bool* is_protected;    // [C] or null
  const int32_t *groups, *min_keep;  // [B] or null
  const int32_t* ids;          // [C] or null
  const float* sizes;          // [C] or null
  const float *norm_weight, *norm_bias;  // [D]; no LayerNorm without a weight, no shift without a bias
  int64_t max_seqlen;
  int32_t batch, width, merged_id;
  float norm_eps;
};

// The decision: which rows of x survive. In device memory of the caller, between the two launches of a
// compaction.
struct Selection {
  int32_t* order;  // [C]: a sample's surviving positions, ascending, then its dropped ones
  int32_t* kept;   // [B]: how many survive; the sample's length where nothing is pruned
  int32_t* own;    // [B]: how many would survive without groups
  int32_t* cu_out;  // [B+1]: offsets of the result
};

// The buffers of the result, all of at least cu_out[B] rows. Null: not wanted.
struct CompactedRows {
  void* values;    // [., D]
  int32_t* ids;
  float* sizes;
  void* normed;    // [., D]
};

const char* launch_selection(const CompactionArguments& arguments, const Selection& selection, Stream stream);
const char* launch_compaction(const CompactionArguments& arguments, const Selection& selection,
                              const CompactedRows& result, Stream stream);

}  // namespace madtp::cuda
