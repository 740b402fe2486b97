// What a kernel is given, and the table of kernels that each instruction set exports.
#pragma once
#include <stdint.h>

namespace prunus {

// Bits of Task::flags: what is done to each output after the bias. Room for more.
enum : uint32_t { kRelu = 1u };

// Row ranges given to a kernel start at multiples of this many rows.
constexpr int64_t kRowGroup = 16;

// A packed weight; see blob.h for the layout.
struct Weight {
  int64_t rows, cols, nnz;
  uint32_t block, blocks;
  const uint32_t* offsets;  // [blocks * rows + 1]
  const uint16_t* columns;  // [nnz], relative to the block
  const float* values;      // [nnz]
};

// One share of a product: the positions (panel, row) from `begin` up to but without `end`, in
// lexicographic order; a panel is `Kernels::panel` columns of the product.
struct Task {
  Weight w;
  const float* x;
  int64_t ldx;
  float* y;
  int64_t ldy;
  int64_t n;
  const float* bias;  // [rows] or null
  uint32_t flags;
  int64_t begin_panel, begin_row, end_panel, end_row;
  float* workspace;  // 64-byte aligned, workspace_floats() long
};

using KernelFunction = void (*)(const Task&);

struct Kernels {
  const char* isa;
  int64_t panel;
#define PRUNUS_KERNEL(name, layout, description) KernelFunction name;
#include "kernels.def"
#undef PRUNUS_KERNEL
};

// Rows of the output tile: it stays in the first-level cache while the column blocks pass, and
// each token of the output gets several neighbouring lines at a time.
constexpr int64_t kTileRows = 64;

// Static: an inline function would be a weak symbol in every ISA file.
static inline int64_t workspace_floats(const Weight& w, int64_t panel) {
  return (w.cols + kTileRows + 2 * kRowGroup) * panel;
}

extern const Kernels kernels_scalar;
#ifdef PRUNUS_X86
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
#endif

}  // namespace prunus
