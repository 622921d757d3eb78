// flags: -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512bf16 -mfma -mf16c -mprefer-vector-width=512
// The kernels for processors with AVX-512 and its bfloat16 dot product (AMD Zen 4, Intel Cooper Lake and later).
#if defined(__x86_64__)
#define MADTP_ISA avx512bf16
#include "cpu/kernels/table.h"

namespace madtp::cpu {
CpuKernels cpu_kernels_avx512bf16() { return avx512bf16::make_table(); }
}  // namespace madtp::cpu
#endif
