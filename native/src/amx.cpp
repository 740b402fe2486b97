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
// Of CPUID leaf 7, edx.
constexpr unsigned kTileBit = 1u << 24, kBf16Bit = 1u << 22, kInt8Bit = 1u << 25;
constexpr long kRequestPermission = 0x1023, kTileData = 18;   // arch_prctl, XSAVE component

const char* hardware_refusal() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) || (edx & kTileBit) == 0)
    return "the CPU has no AMX (CPUID)";
  if ((edx & kBf16Bit) == 0) return "the CPU's AMX has no bfloat16 (CPUID)";
  if ((edx & kInt8Bit) == 0) return "the CPU's AMX has no int8 (CPUID)";
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

constexpr int64_t kCols = 75, kTokens = 53, kGroups = 2;

bool same_product(const Kernels& tiles, const Kernels& wanted, const Vectors& w) {
  unsigned seed = 11;
  std::vector<float> x(kTokens * kCols), one(kTokens * w.rows), other(one.size());
  for (float& value : x) value = small_number(seed);
  Call call{};
  call.vectors = w;
  call.layout = Layout::tokens;
  call.x = x.data();
  call.ldx = kCols;
  call.ldy = w.rows;
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

// Groups of this height in bfloat16 and in int8.
bool same_products(const Kernels& tiles, const Kernels& wanted, int64_t height) {
  unsigned seed = 7;
  const uint32_t offsets[kGroups + 1] = {0, 36, 36 + 76};
  std::vector<uint16_t> columns;
  for (uint16_t c = 0; c < 72; c += 2) columns.push_back(c);
  for (uint16_t c = 0; c < 76; ++c) columns.push_back(c);
  std::vector<uint16_t> values(columns.size() * height);
  std::vector<int8_t> bytes(values.size());
  for (size_t i = 0; i < values.size(); ++i) {
    const float number = small_number(seed);
    uint32_t bits;
    std::memcpy(&bits, &number, sizeof bits);
    values[i] = static_cast<uint16_t>(bits >> 16);
    bytes[i] = static_cast<int8_t>(number * 8.0f);
  }
  const std::vector<float> scales(kGroups * height, 0.125f);
  const std::vector<int32_t> sums(kGroups * height, 3);
  Vectors w{kGroups * height, kCols, kGroups, height, true, offsets, columns.data(),
            values.data(), nullptr};
  if (!same_product(tiles, wanted, w)) return false;
  w.pairs = false;
  w.bytes = true;
  w.values = bytes.data();
  w.scales = scales.data();
  w.sums = sums.data();
  return same_product(tiles, wanted, w);
}

}  // namespace

const char* amx_refusal(const Kernels& tiles, const Kernels& wanted) {
  const char* refusal = hardware_refusal();
  if (refusal != nullptr) return refusal;
  if (!same_products(tiles, wanted, 16) || !same_products(tiles, wanted, 32))
    return "the self-check failed: tiles do not compute what the other kernels compute";
  return nullptr;
}

}  // namespace prunus
