// flags: -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512bf16 -mamx-tile -mamx-bf16 -mfma -mf16c -mprefer-vector-width=512
// The kernels for processors with AMX tiles of bfloat16 (Intel Sapphire Rapids and later).
#if defined(__x86_64__)
#define MADTP_ISA amx
#include "cpu/kernels/table.h"

namespace madtp::cpu {
CpuKernels cpu_kernels_amx() { return amx::make_table(); }
}  // namespace madtp::cpu
#endif
