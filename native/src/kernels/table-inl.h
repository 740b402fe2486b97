// The kernels under the names of kernels.def; each instruction set's table lists them.

void spmm_tokens_f32(const Task& task) { spmm<Tokens>(task); }
void spmm_planes_f32(const Task& task) { spmm<Planes>(task); }
void spmv_f32(const Task& task) { spmv(task); }
void conv_f32(const Task& task) { conv(task); }
void tiled_tokens_f32(const Task& task) {
  if (task.panel_in) {
    task.panel_out ? tiled<Panel, Panel>(task) : tiled<Panel, Tokens>(task);
  } else {
    task.panel_out ? tiled<Tokens, Panel>(task) : tiled<Tokens, Tokens>(task);
  }
}
void tiled_planes_f32(const Task& task) { tiled<Planes, Planes>(task); }
