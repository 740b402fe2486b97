// The kernels under the names of kernels.def; each instruction set's table lists them.

void spmm_tokens_f32(const Task& task) { spmm<Tokens>(task); }
void spmm_planes_f32(const Task& task) { spmm<Planes>(task); }
void spmv_f32(const Task& task) { spmv(task); }
void conv_f32(const Task& task) { conv(task); }
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
