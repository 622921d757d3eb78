// Products of tiles, the inner loop of attention, importance and scoring: tiles of two matrices in shared
// memory, and a warp's part of the product of one with the transpose of the other. bfloat16 and float16 go
// through the tensor cores, float32 through multiply-adds; sums are float32 either way. Both leave the
// product with the same lanes, so that what is done with it is written once.
#pragma once

#include <cuda_pipeline_primitives.h>

#include <cstring>
#include <type_traits>

#include "cuda/utils.cuh"

namespace madtp::cuda {

// BYTES of each of ROWS matrix rows. The pitch of 16 bytes more spreads the rows over the banks of shared
// memory: the accesses below are free of conflicts for rows of 64 and of 128 bytes.
template <class T, int ROWS, int BYTES>
struct alignas(kVectorBytes) Tile {
  static constexpr int kRows = ROWS;
  static constexpr int kColumns = BYTES / static_cast<int>(sizeof(T));
  static constexpr int kPitch = kColumns + kVectorLanes<T>;

  T data[ROWS][kPitch];

  __device__ T* at(int row, int column) { return &data[row][column]; }
  __device__ const T* at(int row, int column) const { return &data[row][column]; }
};

// Starts to copy rows x columns of a matrix into a tile; the rest of the tile becomes zero. Every thread of
// the block takes part. The tile is complete after commit, wait and a barrier. `is_vectorised` as
// is_vectorisable() says of the matrix.
template <int THREADS, class T, int ROWS, int BYTES>
__device__ void stage(Tile<T, ROWS, BYTES>& tile, const T* matrix, int64_t stride, int rows, int columns,
                      bool is_vectorised) {
  constexpr int kColumns = Tile<T, ROWS, BYTES>::kColumns;
  if (is_vectorised) {
    // A thread keeps its column, so that addresses advance by a constant.
    constexpr int kPieces = BYTES / kVectorBytes, kStep = THREADS / kPieces;
    static_assert(THREADS % kPieces == 0 && ROWS % kStep == 0);
    const int first_row = static_cast<int>(threadIdx.x) / kPieces;
    const int column = static_cast<int>(threadIdx.x) % kPieces * kVectorLanes<T>;
    const T* from = matrix + first_row * stride + column;
#pragma unroll 2
    for (int row = first_row; row < first_row + ROWS; row += kStep, from += kStep * stride) {
      const bool is_inside = row < rows && column < columns;
      const int zeros = is_inside ? 0 : kVectorBytes;
      __pipeline_memcpy_async(tile.at(row, column), is_inside ? from : matrix, kVectorBytes, zeros);
    }
  } else {
    for (int i = static_cast<int>(threadIdx.x); i < ROWS * kColumns; i += THREADS) {
      const int row = i / kColumns, column = i % kColumns;
      const bool is_inside = row < rows && column < columns;
      *tile.at(row, column) = is_inside ? matrix[row * stride + column] : from_float<T>(0.0f);
    }
  }
}

// A warp's 16 x 8*N numbers. Lane l = 4g + t holds of each block n of 8 columns the elements e = 0..3 at row
// g + 8*(e/2), column 8n + 2t + e%2: the layout of the tensor cores' results.
template <int N>
struct Accumulator {
  static constexpr int kRows = 16;
  static constexpr int kColumns = 8 * N;

  float at[N][4];

  __device__ static int row(int e) { return lane_id() / 4 + e / 2 * 8; }
  __device__ static int column(int n, int e) { return 8 * n + lane_id() % 4 * 2 + e % 2; }

  __device__ void fill(float value) {
#pragma unroll
    for (int n = 0; n < N; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) at[n][e] = value;
    }
  }
};

// c += a b on the tensor cores: a is 16 x 16, b is 16 x 8 (PTX ISA, "Matrix Fragments for mma.m16n8k16").
template <class T>
__device__ void multiply_fragments(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#ifdef __CUDACC__
  if constexpr (sizeof(T) == 2) {
    static_assert(std::is_same_v<T, __nv_bfloat16> || std::is_same_v<T, __half>);
    if constexpr (std::is_same_v<T, __nv_bfloat16>) {
      asm volatile(
          "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
          "{%0, %1, %2, %3};"
          : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
          : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    } else {
      asm volatile(
          "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
          "{%0, %1, %2, %3};"
          : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
          : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    }
  }
#else
  emulate_mma_m16n8k16<T>(c, a, b);  // tests/cuda_emulator, where these sources run on the CPU
#endif
}

// Two adjacent elements as they lie in memory.
template <class T>
__device__ uint32_t pair_at(const T* from) {
  return *reinterpret_cast<const uint32_t*>(from);
}

template <class T>
__device__ uint32_t pair_of(T low, T high) {
  const Vector<T, 2> pair = {{low, high}};
  uint32_t bits;
  memcpy(&bits, &pair, sizeof bits);
  return bits;
}

// c += (rows first_row.. of a) b^T over the first `columns` columns; what a tile has beyond them is zero.
template <class T, int N, int ROWS, int BYTES>
__device__ void multiply(Accumulator<N>& c, const Tile<T, ROWS, BYTES>& a, int first_row,
                         const Tile<T, 8 * N, BYTES>& b, int columns) {
  const int g = lane_id() / 4, t = lane_id() % 4;
  if constexpr (std::is_same_v<T, float>) {
#pragma unroll 1
    for (int k = 0; k < min(columns, Tile<T, ROWS, BYTES>::kColumns); k += 4) {
      const auto low = load<4>(a.at(first_row + g, k)), high = load<4>(a.at(first_row + g + 8, k));
#pragma unroll
      for (int n = 0; n < N; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const auto other = load<4>(b.at(c.column(n, e), k));
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            c.at[n][e] = fmaf(low.lanes[i], other.lanes[i], c.at[n][e]);
            c.at[n][2 + e] = fmaf(high.lanes[i], other.lanes[i], c.at[n][2 + e]);
          }
        }
      }
    }
  } else {
#pragma unroll
    for (int k = 0; k < Tile<T, ROWS, BYTES>::kColumns; k += 16) {
      if (k >= columns) break;
      const T *low = a.at(first_row + g, k + 2 * t), *high = a.at(first_row + g + 8, k + 2 * t);
      const uint32_t a_fragment[4] = {pair_at(low), pair_at(high), pair_at(low + 8), pair_at(high + 8)};
#pragma unroll
      for (int n = 0; n < N; ++n) {
        const T* row = b.at(8 * n + g, k + 2 * t);
        const uint32_t b_fragment[2] = {pair_at(row), pair_at(row + 8)};
        multiply_fragments<T>(c.at[n], a_fragment, b_fragment);
      }
    }
  }
}

}  // namespace madtp::cuda
