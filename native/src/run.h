// One product: splits it into shares of equal work and runs the active kernels on them.
#pragma once
#include "kernel.h"

namespace prunus {

enum class Layout { tokens, planes, conv };

struct Call {
  Weight w;
  Layout layout;
  const float* x;
  int64_t ldx;  // floats between tokens (tokens) or between rows of x (planes, conv)
  float* y;
  int64_t ldy;
  int64_t n;
  const float* bias;      // or null
  const float* residual;  // laid out as y, or null
  uint32_t flags;
  int threads;
  const Kernels* kernels;
  Conv conv;  // finished; n is its number of positions
};

// Chooses between folded and unrolled axes for panels of this size; returns the cost of a channel.
double fold_conv(Conv& conv, int64_t panel);

// Chooses what the panels of a convolution hold, and finishes its description. False if that is
// too much.
bool plan_conv(Conv& conv, int64_t panel);

// Multiply-adds per thread below which fewer threads are used: waking one can cost 50 microseconds.
int64_t grain();
void set_grain(int64_t multiply_adds);

// False if memory for a panel cannot be had. The result does not depend on the threads.
bool run(const Call& call);

// Fills `to`, whose header already describes the transpose of `from`.
void transpose_blob(const void* from, void* to);

}  // namespace prunus
