// CUB's block reduction for the emulator: the result is valid in thread 0 only, as with the original.
#pragma once

#include "cuda_runtime.h"

namespace cub {

template <class T, int THREADS>
class BlockReduce {
 public:
  struct TempStorage {
    T values[THREADS];
  };

  explicit BlockReduce(TempStorage& storage) : storage_(storage) {}

  T Sum(T own) {
    return Reduce(own, [](T a, T b) { return a + b; });
  }

  template <class Operation>
  T Reduce(T own, Operation operation) {
    storage_.values[threadIdx.x] = own;
    __syncthreads();
    if (threadIdx.x != 0) return T{-1};
    for (int i = 1; i < THREADS; ++i) own = operation(own, storage_.values[i]);
    return own;
  }

 private:
  TempStorage& storage_;
};

}  // namespace cub
