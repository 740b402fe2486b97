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
  Vectors vectors;  // of run_vectors, instead of w
  Conv conv;  // finished; n is its number of positions
  int64_t skew;  // floats that planes of the residual lie further apart than those of y
  bool padded_in, padded_out;  // planes of x and y have room for whole vectors of 16
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

// The same for a weight in groups, tokens or planes.
bool run_vectors(const Call& call);
// Layers in tiles, one after another; between them a panel of tokens stays a panel.
struct ChainLayer {
  Weight w;
  const float* bias;  // or null
  uint32_t flags;
};

struct ChainCall {
  const ChainLayer* layers;
  int count;  // at least two
  const float* x;
  float* y;
  int64_t n;
  const float* residual;  // laid out as y, of the last layer; or null
  int threads;
  const Kernels* kernels;
};

// False if memory for the panels cannot be had. The result does not depend on the threads.
bool run_chain(const ChainCall& call);

// Fills `to`, whose header already describes the transpose of `from`.
void transpose_blob(const void* from, void* to);

// The transpose of a convolution's weight [rows, channels / groups * area] of one block, for the
// gradient to its input: [channels * phases, rows / groups * width]. A stride leaves each residue of
// the input, a phase, to some elements of the kernel; `into` says of each element to which phase it
// belongs, and at which of `width` places of a kernel with stride 1 it stands there. Elements of a
// phase come to ascending places from the last to the first. turn_index fills offsets
// [channels * phases + 1] and columns [nnz]; turn_values takes the values to their places. Both need
// a counter for each of these rows.
struct Spot {
  int32_t phase, place;
};

struct Turn {
  Weight w;
  int64_t area, groups, phases, width;
  const Spot* into;  // [area]

  int64_t rows() const { return w.cols / area * groups * phases; }
};
void turn_index(const Turn& turn, uint32_t* offsets, uint16_t* columns, uint32_t* counters);
void turn_values(const Turn& turn, const uint32_t* offsets, float* values, uint32_t* counters);

}  // namespace prunus
