// The kernels under the names of kernels.def; each instruction set's table lists them.

void spmm_tokens_f32(const Task& task) { spmm<Tokens>(task); }
void spmm_planes_f32(const Task& task) { spmm<Planes>(task); }
void spmv_f32(const Task& task) { spmv(task); }
void conv_f32(const Task& task) { conv(task); }
void depthwise_f32(const Task& task) { depthwise(task); }
void pointwise_f32(const Task& task) { pointwise(task); }
void conv_groups_f32(const Task& task) { conv_groups(task); }
void conv_grad_f32(const Task& task) { conv_grad(task); }
void attention_f32(const Task& task) { attention(task); }
void layer_norm_f32(const Task& task) { layer_norm(task); }
void vectors_tokens_f32(const Task& task) { vectors<Tokens, Broadcasts<FloatVectors>>(task); }
void vectors_planes_f32(const Task& task) { vectors<Planes, Broadcasts<FloatVectors>>(task); }
#if defined(PRUNUS_TILES)
void vectors_tokens_bf16(const Task& task) { tiles<Tokens>(task); }
void vectors_planes_bf16(const Task& task) { tiles<Planes>(task); }
#elif defined(PRUNUS_PAIRS)
void vectors_tokens_bf16(const Task& task) { vectors<Tokens, Pairs>(task); }
void vectors_planes_bf16(const Task& task) { vectors<Planes, Pairs>(task); }
#else
void vectors_tokens_bf16(const Task& task) { vectors<Tokens, Broadcasts<HalfVectors>>(task); }
void vectors_planes_bf16(const Task& task) { vectors<Planes, Broadcasts<HalfVectors>>(task); }
#endif
#if defined(PRUNUS_TILES)
void vectors_tokens_i8(const Task& task) { tiles_of_bytes<Tokens>(task); }
void vectors_planes_i8(const Task& task) { tiles_of_bytes<Planes>(task); }
#elif defined(__AVX512VBMI2__) && defined(__AVX512VNNI__)
void vectors_tokens_i8(const Task& task) { vectors<Tokens, QuadBytes>(task); }
void vectors_planes_i8(const Task& task) { vectors<Planes, QuadBytes>(task); }
#else
void vectors_tokens_i8(const Task& task) { vectors<Tokens, RoundedBytes>(task); }
void vectors_planes_i8(const Task& task) { vectors<Planes, RoundedBytes>(task); }
#endif
void nm_f32(const Task& task) { nm_product<NmSingle>(task); }
#if defined(PRUNUS_PAIRS)
void nm_bf16(const Task& task) { nm_product<NmPair>(task); }
#else
void nm_bf16(const Task& task) { nm_product<NmHalf>(task); }
#endif
void tiled_tokens_f32(const Task& task) {
  if (task.panel_in) {
    task.panel_out ? tiled<Panel, Panel>(task) : tiled<Panel, Tokens>(task);
  } else {
    task.panel_out ? tiled<Tokens, Panel>(task) : tiled<Tokens, Tokens>(task);
  }
}
void tiled_planes_f32(const Task& task) { tiled<Planes, Planes>(task); }

#include "bitmap-inl.h"
#include "token-inl.h"
#if defined(__AVX512VBMI2__) && defined(__AVX512VNNI__)
#include "bitmap-vnni-inl.h"
#else
void bitmap_i8(const Task& task) { multiply_bitmap<int8_t>(task); }
#endif

void bitmap_f32(const Task& task) { multiply_bitmap<float>(task); }
#if defined(PRUNUS_PAIRS)
#include "bitmap-bf16-inl.h"
#else
void bitmap_bf16(const Task& task) { multiply_bitmap<uint16_t>(task); }
#endif
