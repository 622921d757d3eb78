// What the CUDA kernels share: element types, vector accesses, sums over a warp, and the launch itself.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <limits>

#include "cuda/ops.h"

namespace madtp::cuda {

constexpr float kEps = 1e-8f;  // MADTP adds it to every denominator
constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// The larger and the smaller of two, NaN if one of them is. (fmaxf and fminf give the other.)
__device__ inline float maximum_or_nan(float a, float b) { return a > b || a != a ? a : b; }
__device__ inline float minimum_or_nan(float a, float b) { return a < b || a != a ? a : b; }
constexpr unsigned kAllLanes = 0xffffffffu;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// ---- element types ----

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float to_float(__half x) { return __half2float(x); }

template <class T>
__device__ T from_float(float x);
template <>
__device__ inline float from_float<float>(float x) {
  return x;
}
template <>
__device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ inline __half from_float<__half>(float x) {
  return __float2half_rn(x);
}

template <class T>
struct TypeTag {
  using type = T;
};

// run(TypeTag<T>) for the element type T.
template <class Run>
auto with_type(ElementType type, const Run& run) {
  switch (type) {
    case ElementType::bf16: return run(TypeTag<__nv_bfloat16>{});
    case ElementType::f16: return run(TypeTag<__half>{});
    default: return run(TypeTag<float>{});
  }
}

// ---- memory ----

constexpr int kVectorBytes = 16;

template <class T>
constexpr int kVectorLanes = kVectorBytes / static_cast<int>(sizeof(T));

// Adjacent elements that are moved by one instruction.
template <class T, int LANES>
struct alignas(sizeof(T) * LANES) Vector {
  T lanes[LANES];
};

template <int LANES, class T>
__device__ Vector<T, LANES> load(const T* from) {
  return *reinterpret_cast<const Vector<T, LANES>*>(from);
}

template <class T, int LANES>
__device__ void store(T* to, const Vector<T, LANES>& vector) {
  *reinterpret_cast<Vector<T, LANES>*>(to) = vector;
}

// Whether all rows of a matrix can be read in 16-byte pieces: pitch and width whole pieces, the start on a
// piece.
inline bool is_vectorisable(const void* data, int64_t stride, int64_t width, int64_t element_bytes) {
  return reinterpret_cast<uintptr_t>(data) % kVectorBytes == 0 && stride * element_bytes % kVectorBytes == 0 &&
         width * element_bytes % kVectorBytes == 0;
}

inline bool is_vectorisable(const HeadRows& rows, int64_t head_dim, int64_t element_bytes) {
  return is_vectorisable(rows.data, rows.token_stride, head_dim, element_bytes) &&
         rows.head_stride * element_bytes % kVectorBytes == 0;
}

// ---- warps ----

__device__ inline int lane_id() { return static_cast<int>(threadIdx.x) % 32; }
__device__ inline int warp_id() { return static_cast<int>(threadIdx.x) / 32; }

// Sum over groups of LANES adjacent lanes, for all of them. The order of the additions is fixed.
template <int LANES = 32>
__device__ float warp_sum(float x) {
#pragma unroll
  for (int distance = LANES / 2; distance > 0; distance /= 2) x += __shfl_xor_sync(kAllLanes, x, distance);
  return x;
}

// ---- launch ----

template <class... Parameters, class... Arguments>
const char* launch(void (*kernel)(Parameters...), int64_t blocks, int threads, Stream stream,
                   const Arguments&... arguments) {
  if (blocks <= 0) return nullptr;
  if (blocks > std::numeric_limits<int32_t>::max()) return "the batch needs more thread blocks than a grid can have";
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.stream = static_cast<cudaStream_t>(stream);
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, arguments...);
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();  // reported here, so that a later call does not report it again
  return cudaGetErrorString(error);
}

}  // namespace madtp::cuda
