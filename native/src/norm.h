// Layer normalisation of rows: y = (x - mean) / sqrt(variance + eps) * gamma + beta.
#pragma once
#include <stdint.h>

namespace prunus {

struct Kernels;

struct LayerNorm {
  const float* x;  // [rows, columns], as y
  float* y;
  const float* gamma;  // [columns] or null
  const float* beta;   // [columns] or null
  int64_t rows, columns;
  float eps;
  float (*root)(float) = nullptr;  // set by run_layer_norm: no ISA file calls the C library
};

// The result does not depend on the threads.
void run_layer_norm(const LayerNorm& norm, int threads, const Kernels& kernels);

}  // namespace prunus
