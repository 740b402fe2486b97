// Sparse weight times one vector, for any instruction set. Included after these are defined:
//   write, Partial (partial sums, all zero when value-initialised), dot (adds
//   values[i] * x[columns[i]], i in [begin, end), to them) and total (their sum).

void spmv(const Task& task) {
  const Weight& w = task.w;
  for (int64_t row = task.begin_row; row < (task.end_panel ? w.rows : task.end_row); ++row) {
    Partial partial{};
    for (uint32_t b = 0; b < w.blocks; ++b) {
      const uint32_t* offsets = w.offsets + b * w.rows + row;
      const float* x = task.x + static_cast<int64_t>(b) * w.block;
      dot(w.values, w.columns, offsets[0], offsets[1], x, partial);
    }
    const Vec bias = broadcast(task.bias ? task.bias[row] : 0.0f);
    write(task, row * task.ldy, broadcast(total(partial)), bias, 1);
  }
}
