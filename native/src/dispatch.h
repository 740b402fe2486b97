// Which instruction sets this build and machine offer, and which one is active.
#pragma once
#include "kernel.h"

namespace prunus {

int available_count();
const Kernels& kernels_at(int index);  // weakest first
int active_index();                    // starts at the strongest
void set_active_index(int index);

}  // namespace prunus
