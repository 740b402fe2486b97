// Several convolutions, run image by image without a return to the caller between them.
#pragma once
#include "run.h"

namespace prunus {

// Planes between the steps that lie a multiple of this many floats apart have room for vectors.
constexpr int64_t kNetAlignment = 16;

// Where a value lies: floats into the memory between the steps, or one of these.
constexpr int64_t kNetInput = -1, kNetOutput = -2, kNetNothing = -3;

// One convolution of one image: `call` without x, y and residual.
struct NetStep {
  Call call;
  int64_t input, residual, output;
};

struct NetCall {
  const NetStep* steps;
  int64_t count;
  int64_t images;
  const float* x;
  float* y;
  int64_t floats_in, floats_out;  // of an image of x and y
  int64_t floats;                 // between the steps
  int threads;
};

// False if memory cannot be had. The result does not depend on the threads.
bool run_net(const NetCall& call);

}  // namespace prunus
