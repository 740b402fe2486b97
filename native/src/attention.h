// Scaled dot-product attention over heads: softmax(scale q k^T + mask) v.
#pragma once
#include <stdint.h>

namespace prunus {

struct Kernels;

// Floats between neighbours of a tensor [batch, heads, rows, columns]; its columns are next to each
// other, but for those of a mask.
struct HeadStrides {
  int64_t batch, head, row;
};

struct Attention {
  int64_t batch, heads, queries, keys, dim, value_dim;
  int64_t sharing;  // heads that read the same head of k and v
  const float *q, *k, *v;
  float* out;
  HeadStrides q_strides, k_strides, v_strides, out_strides;
  const float* bias;        // added to the scores; or null
  const uint8_t* allowed;   // where zero, a score becomes minus infinity; or null; not with `bias`
  HeadStrides mask_strides;  // 0 where the mask is the same for all
  int64_t mask_column;
  bool causal;  // query i sees the keys 0 to i
  float scale;
};

// Keys whose scores are held at a time, and the most queries of a block on any instruction set.
constexpr int64_t kKeyBlock = 64;
constexpr int64_t kMostQueries = 64;

// Static: an inline function would be a weak symbol in every ISA file.
static inline int64_t attention_workspace_floats(const Attention& a) {
  const int64_t rows = a.dim + a.value_dim + 2 * kKeyBlock + 8;
  return rows * kMostQueries + 16 * kKeyBlock + 2 * (kKeyBlock + kMostQueries) + 64;
}

struct AttentionCall {
  Attention attention;
  int threads;
  const Kernels* kernels;
};

// False if memory cannot be had. The result does not depend on the threads.
bool run_attention(const AttentionCall& call);

}  // namespace prunus
