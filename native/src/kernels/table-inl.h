// The kernels under the names of kernels.def; each instruction set's table lists them.

void spmm_tokens_f32(const Task& task) { spmm<Tokens>(task); }
void spmm_planes_f32(const Task& task) { spmm<Planes>(task); }
void spmv_f32(const Task& task) { spmv(task); }
void conv_f32(const Task& task) { conv(task); }
void depthwise_f32(const Task& task) { depthwise(task); }
void conv_groups_f32(const Task& task) { conv_groups(task); }
