// Chooses the kernels for the processor that runs the program. MADTP_KERNELS_CPU names a lesser set, for tests.
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "cpu_kernels.h"

namespace madtp::cpu {

#if defined(__x86_64__)
CpuKernels cpu_kernels_avx512bf16();
CpuKernels cpu_kernels_avx512();
CpuKernels cpu_kernels_avx2();
#endif
CpuKernels cpu_kernels_portable();

namespace {

struct Candidate {
  const char* name;
  bool runs;
  CpuKernels (*make)();
};

CpuKernels choose() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
#endif
  const Candidate candidates[] = {
#if defined(__x86_64__)
      {"avx512bf16", bf16, cpu_kernels_avx512bf16},
      {"avx512", avx512, cpu_kernels_avx512},
      {"avx2", avx2, cpu_kernels_avx2},
#endif
      {"portable", true, cpu_kernels_portable},
  };
  const char* wanted = std::getenv("MADTP_KERNELS_CPU");
  const bool any = wanted == nullptr || *wanted == '\0';
  for (const Candidate& candidate : candidates) {
    if (candidate.runs && (any || std::strcmp(wanted, candidate.name) == 0)) return candidate.make();
  }
  throw std::runtime_error("MADTP_KERNELS_CPU: expected avx512bf16, avx512, avx2 or portable, and a processor that has it, got " +
                           std::string(wanted));
}

}  // namespace

const CpuKernels& cpu_kernels() {
  static const CpuKernels kernels = choose();
  return kernels;
}

}  // namespace madtp::cpu
