#include "amx.h"

#include <cmath>
#include <cstring>
#include <vector>

#include "run.h"

#if defined(PRUNUS_X86) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace prunus {
namespace {

#if defined(PRUNUS_X86) && defined(__linux__)
constexpr unsigned kTileBit = 1u << 24, kBf16Bit = 1u << 22;  // of CPUID leaf 7, edx
constexpr long kRequestPermission = 0x1023, kTileData = 18;   // arch_prctl, XSAVE component

const char* hardware_refusal() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) || (edx & kTileBit) == 0)
    return "the CPU has no AMX (CPUID)";
  if ((edx & kBf16Bit) == 0) return "the CPU's AMX has no bfloat16 (CPUID)";
  if (syscall(SYS_arch_prctl, kRequestPermission, kTileData) != 0)
    return "the system grants no tiles (arch_prctl ARCH_REQ_XCOMP_PERM failed)";
  return nullptr;
}
#else
const char* hardware_refusal() { return "AMX is used on x86-64 Linux only"; }
#endif

// A number that bfloat16 holds exactly, another one for each seed.
float small_number(unsigned& seed) {
  seed = seed * 1664525u + 1013904223u;
  return static_cast<float>(static_cast<int>(seed >> 28) - 8) / 8.0f;
}

bool same_product(const Kernels& tiles, const Kernels& wanted, int64_t height) {
  constexpr int64_t kCols = 75, kTokens = 53, kGroups = 2;
  unsigned seed = 7;
  const uint32_t offsets[kGroups + 1] = {0, 38, 38 + 76};
  std::vector<uint16_t> columns;
  for (uint16_t c = 0; c < 76; c += 2) columns.push_back(c);
  for (uint16_t c = 0; c < 76; ++c) columns.push_back(c);
  std::vector<uint16_t> values(columns.size() * height);
  for (uint16_t& value : values) {
    const float number = small_number(seed);
    uint32_t bits;
    std::memcpy(&bits, &number, sizeof bits);
    value = static_cast<uint16_t>(bits >> 16);
  }
  std::vector<float> x(kTokens * kCols), one(kTokens * kGroups * height), other(one.size());
  for (float& value : x) value = small_number(seed);
  Call call{};
  call.vectors = {kGroups * height, kCols, kGroups, height, true, offsets, columns.data(),
                  values.data(), nullptr};
  call.layout = Layout::tokens;
  call.x = x.data();
  call.ldx = kCols;
  call.ldy = kGroups * height;
  call.n = kTokens;
  call.threads = 1;
  call.y = one.data();
  call.kernels = &tiles;
  if (!run_vectors(call)) return false;
  call.y = other.data();
  call.kernels = &wanted;
  if (!run_vectors(call)) return false;
  for (size_t i = 0; i < one.size(); ++i)
    if (!(std::fabs(one[i] - other[i]) <= 1e-5f)) return false;
  return true;
}

}  // namespace

const char* amx_refusal(const Kernels& tiles, const Kernels& wanted) {
  const char* refusal = hardware_refusal();
  if (refusal != nullptr) return refusal;
  if (!same_product(tiles, wanted, 16) || !same_product(tiles, wanted, 32))
    return "the self-check failed: tiles do not compute what the other kernels compute";
  return nullptr;
}

}  // namespace prunus
