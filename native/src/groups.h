// Convolutions of which one group after the other is done: depthwise ones and full weights.
#pragma once
#include "run.h"

namespace prunus {

// Whether the kernel for groups suits this convolution better than the general one.
bool suits_groups(const Weight& w, const Conv& conv);

// As `run`, for Layout::conv.
bool run_groups(const Call& call);

}  // namespace prunus
