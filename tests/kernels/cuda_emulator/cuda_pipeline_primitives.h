// Asynchronous copies for the emulator. They happen when they are waited for, so that one that is not gives a wrong result.
#pragma once

#include "cuda_runtime.h"

inline void __pipeline_memcpy_async(void* to, const void* from, size_t bytes, size_t zeros) {
  emulator::copy_later(to, from, bytes, zeros);
}
inline void __pipeline_commit() { emulator::commit_copies(); }
inline void __pipeline_wait_prior(size_t but_the_last) { emulator::wait_for_copies(but_the_last); }
