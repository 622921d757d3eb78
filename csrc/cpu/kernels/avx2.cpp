// flags: -mavx2 -mfma
// The kernels for processors with AVX2 and FMA (Intel Haswell, AMD Excavator and later).
#if defined(__x86_64__)
#define MADTP_ISA avx2
#include "cpu/kernels/table.h"

namespace madtp::cpu {
CpuKernels cpu_kernels_avx2() { return avx2::make_table(); }
}  // namespace madtp::cpu
#endif
