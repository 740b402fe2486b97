// Whether Intel AMX may be used.
#pragma once
#include "kernel.h"

namespace prunus {

// Null if the CPU has tiles, the system grants them to this process, and `tiles` computes on them
// what `wanted` computes; else why not.
const char* amx_refusal(const Kernels& tiles, const Kernels& wanted);

}  // namespace prunus
