#include "dispatch.h"

#include <atomic>

#include "amx.h"

namespace prunus {
namespace {

struct Available {
  const Kernels* tables[7] = {&kernels_scalar};
  int count = 1;
  const char* refusal = "this build has no AMX";

  Available() {
#ifdef PRUNUS_X86
    // These also ask the operating system whether it saves the wide registers.
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (avx2) tables[count++] = &kernels_avx2;
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                        __builtin_cpu_supports("avx512dq");
    if (avx512) tables[count++] = &kernels_avx512;
    const bool vnni = avx512 && __builtin_cpu_supports("avx512vbmi2") &&
                      __builtin_cpu_supports("avx512vnni");
    if (vnni) {
      tables[count++] = &kernels_avx512_vnni;
#ifdef PRUNUS_HAS_BF16
      const bool bf16 = __builtin_cpu_supports("avx512bf16");
      if (bf16) tables[count++] = &kernels_avx512_bf16;
#ifdef PRUNUS_HAS_AMX
      refusal = bf16 ? amx_refusal(kernels_amx, kernels_avx512_bf16) : "the CPU has no AVX512_BF16";
      if (refusal == nullptr) tables[count++] = &kernels_amx;
#endif
#endif
    }
#endif
#ifdef PRUNUS_NEON
    tables[count++] = &kernels_neon;
#endif
    tables[count] = &kernels_amx_emulated;
  }
};

const Available& available() {
  static const Available found;
  return found;
}

std::atomic<int> chosen{-1};

}  // namespace

int all_count() { return available().count + 1; }

const char* amx_status() { return available().refusal; }

int available_count() { return available().count; }

const Kernels& kernels_at(int index) { return *available().tables[index]; }

int active_index() {
  const int index = chosen.load(std::memory_order_relaxed);
  return index < 0 ? available_count() - 1 : index;
}

void set_active_index(int index) { chosen.store(index, std::memory_order_relaxed); }

}  // namespace prunus
