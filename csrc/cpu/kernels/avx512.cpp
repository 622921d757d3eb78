// flags: -mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mf16c -mprefer-vector-width=512
// The kernels for processors with AVX-512 (Intel Skylake-X and later).
#if defined(__x86_64__)
#define MADTP_ISA avx512
#include "cpu/kernels/table.h"

namespace madtp::cpu {
CpuKernels cpu_kernels_avx512() { return avx512::make_table(); }
}  // namespace madtp::cpu
#endif
