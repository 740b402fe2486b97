// Which instruction sets this build and machine offer, and which one is active.
#pragma once
#include "kernel.h"

namespace prunus {

int available_count();
const Kernels& kernels_at(int index);  // weakest first
int all_count();  // with those for tests behind: tiles in software
int active_index();                    // starts at the strongest
void set_active_index(int index);
const char* amx_status();  // why AMX is not offered, or null

}  // namespace prunus
