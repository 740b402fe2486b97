// The gradient of a sparse weight: split into row ranges of equal work.
#pragma once
#include "kernel.h"

namespace prunus {

struct SampledCall {
  Weight pattern;  // its values are not read
  bool tokens;     // layout of x and g: [n, cols] and [n, rows], or [cols, n] and [rows, n]
  const float* x;
  int64_t ldx;
  const float* g;
  int64_t ldg;
  int64_t n;
  const Conv* conv;  // then x and g are images, ldx and ldg floats between their channels; or null
  float* out;  // [nnz]
  bool accumulate;
  int threads;
  const Kernels* kernels;
};

// False if memory for a panel cannot be had. The result does not depend on the threads.
bool run_sampled(const SampledCall& call);

}  // namespace prunus
