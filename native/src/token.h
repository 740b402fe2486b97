// One token through a decoder layer (Llama's): norms, products, rotation, attention to a cache.
#pragma once
#include <stdint.h>

namespace prunus {

struct Kernels;

// Attention of one query per head against the keys of a cache.
struct TokenAttention {
  const float* q;  // [heads, dim]
  const void *k, *v;
  int64_t heads, sharing, keys, dim;  // `sharing` heads read the same head of k and v
  int64_t k_head, k_row, v_head, v_row;  // elements between heads and rows
  bool half;                             // k and v are bfloat16
  float scale;
  float* out;  // [heads, dim]
};

// Static: an inline function would be a weak symbol in every ISA file.
static inline int64_t token_workspace_floats(int64_t keys) { return (keys + 31) / 16 * 16; }

enum : int { kQuery, kKey, kValue, kOutput, kGate, kUp, kDown, kTokenLayers };

// What stays the same for all tokens. A null key and value: the query's blob holds their rows
// behind its own; a null up: the gate's does.
struct TokenLayer {
  int64_t hidden, heads, groups, dim, inner;
  int64_t half;  // inputs, outputs and cache are bfloat16, and each step rounds to it; else float32
  const void* blobs[kTokenLayers];
  const float* biases[kTokenLayers];  // or null
  const void* gammas[2];              // [hidden], as the inputs
};

struct TokenCall {
  TokenLayer layer;
  const void* x;  // [hidden]
  float eps;      // of the norm of this half
  int threads;
  const Kernels* kernels;
};

// The half before the cache: q [heads dim] float32, k and v [groups dim] as x, rotated by cos and
// sin [dim]. False if memory cannot be had. Results do not depend on the threads.
bool run_token_in(const TokenCall& call, const void* cos, const void* sin, float* q, void* k,
                  void* v);

// The half behind it: y [hidden]. `attention` lacks heads, sharing, dim, half and out.
bool run_token_out(const TokenCall& call, TokenAttention attention, void* y);

}  // namespace prunus
