// Gradient of a sparse convolution's weight, for any instruction set: the panels of conv-inl.h, and
// beside them the output's gradient at the same positions. Included after sddmm-inl.h.

// The gradient of `V * kLanes` positions for rows [begin, end): zeros between lines and images.
template <int V>
inline void fill_gradient(const Task& task, const Run* runs, const Run* last, int64_t begin,
                          int64_t end, float* to) {
  for (int64_t row = begin; row < end; ++row, to += V * kLanes) {
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) store(to + v * kLanes, zero());
    for (const Run* run = runs; run != last; ++run) {
      const float* from = task.g + run->from + row * task.ldg;
      const int64_t count = run->count;
      if (task.conv->far && row + kAhead < end)
        for (int64_t i = 0; i < count; i += kLineFloats)
          __builtin_prefetch(from + kAhead * task.ldg + i);
      int64_t i = 0;
      for (; i + kLanes <= count; i += kLanes) store(to + run->at + i, load(from + i));
      if (i < count) store_n(to + run->at + i, load_n(from + i, count - i), count - i);
    }
  }
}

// Adds what the positions from `first` on give to the values of rows [begin, end).
template <int V>
inline void grad_rows(const Task& task, const Shifted& source, const Cuts& cuts, int64_t first,
                      int64_t begin, int64_t end, float* tile, Run* runs) {
  const Weight& w = task.w;
  const int64_t count = smaller(V * kLanes, task.n - first);
  const Run* last = list_outputs(*task.conv, w.rows * task.ldg, first, count, runs);
  fill_gradient<V>(task, runs, last, begin, end, tile);
  const int64_t passes = cuts.places ? cuts.chunks : w.blocks;
  for (int64_t pass = 0; pass < passes; ++pass) {
    for (int64_t row = begin; row < end; ++row) {
      const uint32_t b = cuts.places ? 0 : static_cast<uint32_t>(pass);
      const uint32_t* places = cuts.places ? cuts.row(row) + pass : w.offsets + b * w.rows + row;
      dots<V>(tile + (row - begin) * V * kLanes, source.part(w, b, row), w.columns, places[0],
              places[1], true, task.y);
    }
  }
}

// The panels number `index` * panels and following, rows [begin_row, end_row).
inline void grad_panels(const Task& task, const Cuts& cuts, int64_t index, float* tile,
                        const int32_t* offsets) {
  const Conv& c = *task.conv;
  const int64_t first = index * c.panels * kPanel, group_rows = task.w.rows / c.groups;
  const int64_t group_channels = c.channels / c.groups, stride = conv_copies(c) * c.length;
  const int64_t first_group = task.begin_row / group_rows;
  Run* inputs = reinterpret_cast<Run*>(tile + grad_tile_floats(kPanel));
  const int64_t count = smaller(c.panels, (task.n - first + kPanel - 1) / kPanel) * kPanel;
  Run* outputs = fill_panel(task, first, count, first_group, (task.end_row - 1) / group_rows, inputs);
  for (int64_t row = task.begin_row; row < task.end_row; row += kTileRows) {
    const int64_t stop = smaller(row + kTileRows, task.end_row);
    for (int64_t at = 0, step = 0; at < count; at += step) {
      const Shifted source{task.workspace + at, offsets, first_group, group_rows,
                           group_channels * stride};
      step = count - at >= 2 * kPanel ? 2 * kPanel : kPanel;
      if (step > kPanel) {
        grad_rows<2 * kMaxVectors>(task, source, cuts, first + at, row, stop, tile, outputs);
      } else {
        grad_rows<kMaxVectors>(task, source, cuts, first + at, row, stop, tile, outputs);
      }
    }
  }
}

void conv_grad(const Task& task) {
  const Conv& c = *task.conv;
  const Weight& w = task.w;
  float* tile = task.workspace + conv_panel_floats(c);
  auto* offsets =
      reinterpret_cast<int32_t*>(tile + grad_tile_floats(kPanel) + conv_runs_floats(c, kPanel));
  const Cuts cuts = prepare_columns(task, offsets);
  for (uint32_t b = 0; b < w.blocks && !(task.flags & kAccumulate); ++b) {
    const uint32_t* rows = w.offsets + b * w.rows;
    for (uint32_t i = rows[task.begin_row]; i < rows[task.end_row]; ++i) task.y[i] = 0.0f;
  }
  for (int64_t p = 0; p * c.panels * kPanel < task.n; ++p)
    grad_panels(task, cuts, p, tile, offsets);
}
