// Chooses the kernels for the processor that runs the program. MADTP_KERNELS_CPU names a lesser set, for tests.
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "cpu/kernels/kernels.h"

namespace madtp::cpu {

#if defined(__x86_64__)
CpuKernels cpu_kernels_amx();
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

// Whether the processor has AMX tiles of bfloat16 and the system lets this process use them, which it has to be asked for.
bool has_tiles() {
#if defined(__x86_64__) && defined(__linux__)
  constexpr unsigned kTile = 1u << 24, kBf16 = 1u << 22;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM and the number of the state
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d) == 0 || (d & kTile) == 0 || (d & kBf16) == 0) return false;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

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
      {"amx", bf16 && has_tiles(), cpu_kernels_amx},
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
  throw std::runtime_error("MADTP_KERNELS_CPU: expected amx, avx512bf16, avx512, avx2 or portable, and a processor that has it, got " +
                           std::string(wanted));
}

}  // namespace

const CpuKernels& cpu_kernels() {
  static const CpuKernels kernels = choose();
  return kernels;
}

}  // namespace madtp::cpu
