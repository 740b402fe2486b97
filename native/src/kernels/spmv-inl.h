// Sparse weight times one vector, for any instruction set. Included after these are defined:
//   write, Partial (partial sums, all zero when value-initialised), dot (adds
//   values[i] * x[columns[i]], i in [begin, end), to them) and total (their sum).

// A weight in tiles: the partial sums of a tile's rows wait for the next block. Rows come by
// falling number of non-zeros, so that the ends of their loops are predicted.
void tiled_spmv(const Task& task, int64_t begin, int64_t end) {
  const Weight& w = task.w;
  Partial partials[kMostTile];
  for (int64_t row = begin; row < end; row += w.tile) {
    const int64_t rows = smaller(w.tile, w.rows - row);
    for (int64_t i = 0; i < rows; ++i) partials[i] = Partial{};
    const uint32_t* entry = w.offsets + row * w.blocks;
    uint32_t at = w.starts[row / w.tile];
    for (uint32_t b = 0; b < w.blocks; ++b) {
      const float* x = task.x + static_cast<int64_t>(b) * w.block;
      for (const uint32_t* stop = entry + rows; entry < stop; ++entry) {
        const uint32_t count = *entry >> 16;
        dot(w.values, w.columns, at, at + count, x, partials[*entry & 0xFFFF]);
        at += count;
      }
    }
    for (int64_t i = 0; i < rows; ++i) {
      const Vec bias = broadcast(task.bias ? task.bias[row + i] : 0.0f);
      write(task, (row + i) * task.ldy, broadcast(total(partials[i])), bias, 1);
    }
  }
}

void spmv(const Task& task) {
  const Weight& w = task.w;
  if (w.tile != 0) return tiled_spmv(task, task.begin_row, task.end_panel ? w.rows : task.end_row);
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
