#include "dispatch.h"

#include <atomic>

namespace prunus {
namespace {

struct Available {
  const Kernels* tables[4] = {&kernels_scalar, nullptr, nullptr, nullptr};
  int count = 1;

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
    if (avx512 && __builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("avx512vnni"))
      tables[count++] = &kernels_avx512_vnni;
#endif
#ifdef PRUNUS_NEON
    tables[count++] = &kernels_neon;
#endif
  }
};

const Available& available() {
  static const Available found;
  return found;
}

std::atomic<int> chosen{-1};

}  // namespace

int available_count() { return available().count; }

const Kernels& kernels_at(int index) { return *available().tables[index]; }

int active_index() {
  const int index = chosen.load(std::memory_order_relaxed);
  return index < 0 ? available_count() - 1 : index;
}

void set_active_index(int index) { chosen.store(index, std::memory_order_relaxed); }

}  // namespace prunus
