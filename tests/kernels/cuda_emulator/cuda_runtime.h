// CUDA on the CPU: as much of it as csrc/cuda/*.cu use, so that the sources compiled for a GPU run unchanged, at test sizes, on a
// machine without one. Every CUDA thread is a coroutine with a stack of its own; coroutines of a block take turns, switching
// only where they wait for each other. That finds what a GPU shows by chance or not at all: with another order of turns
// (set_order) a missing barrier gives another result; a barrier that not all threads reach is an error; so is a warp
// operation that some lanes miss. Shared memory is a static variable, since one block runs at a time.
#pragma once

#include <math.h>

#include <cstdint>
#include <cstring>
#include <functional>

#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

extern dim3 threadIdx, blockIdx;

namespace emulator {

constexpr int kWarp = 32;

// Order in which blocks run and threads take their turns: 0 ascending, 1 descending, any other number seeds a random one.
void set_order(unsigned seed);

// Runs the kernel for every thread of every block. Throws std::runtime_error where CUDA would hang or corrupt memory.
void run(unsigned blocks, unsigned threads, const std::function<void()>& kernel);

void block_barrier(int line);

// Lanes of a warp wait for each other; each gives up to 48 bytes and sees what the others gave.
const void* exchange(const void* given, size_t bytes);

constexpr size_t kExchanged = 48;  // bytes from one lane's gift to the next

template <class T>
T given_by(const void* exchanged, int lane) {
  T value;
  std::memcpy(&value, static_cast<const char*>(exchanged) + lane * kExchanged, sizeof(T));
  return value;
}

void copy_later(void* to, const void* from, size_t bytes, size_t zeros);
void commit_copies();
void wait_for_copies(size_t but_the_last);

[[noreturn]] void fail(const char* what);

}  // namespace emulator

#define __syncthreads() emulator::block_barrier(__LINE__)

template <class T>
T __shfl_sync(unsigned mask, T value, int source) {
  if (mask != 0xffffffffu) emulator::fail("shuffle of a part of a warp");
  return emulator::given_by<T>(emulator::exchange(&value, sizeof value), source);
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int distance) {
  return __shfl_sync(mask, value, static_cast<int>(threadIdx.x) % emulator::kWarp ^ distance);
}

// c += a b, from the lane layouts of the PTX ISA for mma.m16n8k16 with 16-bit elements. With g = lane / 4, t = lane % 4:
// a[i] holds row g + 8 (i % 2), columns 2t + 8 (i / 2) and the next; b[i] holds rows 2t + 8 i and the next of column g;
// c[i] is row g + 8 (i / 2), column 2t + i % 2.
template <class T>
void emulate_mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  static_assert(sizeof(T) == 2);
  T given[12];
  std::memcpy(given, a, sizeof a);
  std::memcpy(given + 8, b, sizeof b);
  float own[12];  // a, then b
  for (int i = 0; i < 12; ++i) own[i] = static_cast<float>(given[i]);
  const auto* all = static_cast<const float(*)[emulator::kExchanged / sizeof(float)]>(emulator::exchange(own, sizeof own));
  const int g = static_cast<int>(threadIdx.x) % emulator::kWarp / 4, t = static_cast<int>(threadIdx.x) % 4;
  for (int i = 0; i < 4; ++i) {
    const int row = g + 8 * (i / 2), column = 2 * t + i % 2;
    for (int k = 0; k < 16; ++k) {
      const float of_a = all[row % 8 * 4 + k % 8 / 2][2 * (row / 8 + 2 * (k / 8)) + k % 2];
      const float of_b = all[column * 4 + k % 8 / 2][8 + 2 * (k / 8) + k % 2];
      c[i] += of_a * of_b;
    }
  }
}

inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a < b ? b : a; }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline uint32_t __float_as_uint(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

// ---- host side ----

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0 };
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  cudaStream_t stream;
};

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Arguments&&... arguments) {
  emulator::run(config->gridDim.x, config->blockDim.x, [&] { kernel(arguments...); });
  return cudaSuccess;
}
