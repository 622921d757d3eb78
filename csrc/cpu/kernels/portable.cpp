// The kernels for any processor: SSE2 on x86-64, NEON on ARM.
#define MADTP_ISA portable
#include "cpu/kernels/table.h"

namespace madtp::cpu {
CpuKernels cpu_kernels_portable() { return portable::make_table(); }
}  // namespace madtp::cpu
