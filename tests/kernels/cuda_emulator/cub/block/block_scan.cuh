// CUB's block scan for the emulator. As with the original, the storage must not be used again before a barrier.
#pragma once

#include "cuda_runtime.h"

namespace cub {

template <class T, int THREADS>
class BlockScan {
 public:
  struct TempStorage {
    T values[THREADS];
  };

  explicit BlockScan(TempStorage& storage) : storage_(storage) {}

  void ExclusiveSum(T own, T& before, T& all) {
    InclusiveSum(own, before, all);
    before -= own;
  }

  void InclusiveSum(T own, T& end, T& all) {
    storage_.values[threadIdx.x] = own;
    __syncthreads();
    end = all = 0;
    for (unsigned i = 0; i < THREADS; ++i) {
      all += storage_.values[i];
      if (i <= threadIdx.x) end += storage_.values[i];
    }
  }

 private:
  TempStorage& storage_;
};

}  // namespace cub
