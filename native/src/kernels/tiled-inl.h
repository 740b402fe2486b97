// Sparse weight in tiles times dense matrix, for any instruction set. Included after spmm-inl.h.
//
// A tile is some rows of the weight, cut into blocks of columns so that the part of the panel that
// a block reads stays in the first-level cache while all rows of the tile pass. Within a tile and
// block the rows come by falling number of non-zeros: loops of equal length follow each other, and
// their ends are predicted. A row's partial sum waits in the output tile between blocks.

// The output as a panel: rows of kPanelRow floats next to each other, bias and activation applied.
struct Panel {
  template <int V>
  static const float* in_place(const Task& task, int64_t, int64_t) {
    return task.x;
  }

  template <int V>
  static void gather(const Task&, int64_t, int64_t, int64_t, int64_t, float*) {}

  template <int V>
  static void scatter(const Task& task, int64_t, int64_t, int64_t begin, int64_t end,
                      const float* tile) {
    for (int64_t row = begin; row < end; ++row) {
      const Vec bias = task.bias ? broadcast(task.bias[row]) : zero();
      for (int v = 0; v < V; ++v) {
        const Vec value = load(tile + ((row - begin) * V + v) * kLanes);
        write(task, (row * V + v) * kLanes, value, bias, kLanes);
      }
    }
  }
};

constexpr int kTiledSets = kSets < 2 ? kSets : 2;

// out += sum over i < count of values[i] * panel row columns[i]; out = it if `first`. The order of
// the sum depends on `count` alone.
template <int V>
inline void add_row(const float* values, const uint16_t* columns, uint32_t count,
                    const float* panel, bool first, float* out) {
  constexpr int64_t stride = V * kLanes;
  constexpr int last = kTiledSets - 1;
  Vec sums[kTiledSets][V];
#pragma GCC unroll 16
  for (int v = 0; v < V; ++v) sums[0][v] = first ? zero() : load(out + v * kLanes);
#pragma GCC unroll 16
  for (int s = 1; s < kTiledSets; ++s)
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) sums[s][v] = zero();
  uint32_t i = 0;
  for (; i + kQuad <= count; i += kQuad) {
    const Quad weights = load_quad(values + i);
    const uint64_t quad = load_columns(columns + i);
    add_product<V>(repeat<0>(weights), panel + (quad & 0xFFFF) * stride, sums[0]);
    add_product<V>(repeat<1>(weights), panel + (quad >> 16 & 0xFFFF) * stride, sums[last]);
    add_product<V>(repeat<2>(weights), panel + (quad >> 32 & 0xFFFF) * stride, sums[0]);
    add_product<V>(repeat<3>(weights), panel + (quad >> 48) * stride, sums[last]);
  }
  for (; i < count; ++i)
    add_product<V>(broadcast(values[i]), panel + columns[i] * stride, sums[0]);
#pragma GCC unroll 16
  for (int v = 0; v < V; ++v) {
    const Vec sum = kTiledSets > 1 ? add(sums[0][v], sums[last][v]) : sums[0][v];
    store(out + v * kLanes, sum);
  }
}

// tile += block `b` of the weight's rows [row, row + rows) times the panel; returns the number of
// non-zeros, whose values and columns come first.
template <int V>
inline uint32_t add_block(const uint32_t* entries, int64_t rows, const float* values,
                          const uint16_t* columns, const float* panel, bool first, float* tile) {
  uint32_t at = 0;
  for (int64_t i = 0; i < rows; ++i) {
    const uint32_t count = entries[i] >> 16;
    if (count == 0 && !first) break;
    add_row<V>(values + at, columns + at, count, panel, first,
               tile + static_cast<int64_t>(entries[i] & 0xFFFF) * (V * kLanes));
    at += count;
  }
  return at;
}

// All rows of one panel that fit into the output tile, block by block.
template <class In, class Out, int V>
inline void tiled_rows(const Task& task, int64_t first, int64_t count, int64_t begin, int64_t end,
                       const float* source, float* fill, bool keep) {
  constexpr int64_t stride = V * kLanes;
  const Weight& w = task.w;
  float* tile = task.workspace + (w.cols + kRowGroup) / kRowGroup * kRowGroup * kPanel;
  uint32_t at[kMostTiledRows / kLeastTile];
  for (int64_t row = begin; row < end; row += w.tile)
    at[(row - begin) / w.tile] = w.starts[row / w.tile];
  for (uint32_t b = 0; b < w.blocks; ++b) {
    const int64_t column = static_cast<int64_t>(b) * w.block;
    const float* part = source + (keep ? column * stride : 0);
    if (fill != nullptr)
      In::template gather<V>(task, first, count, column, smaller(column + w.block, w.cols),
                             fill + (keep ? column * stride : 0));
    for (int64_t row = begin; row < end; row += w.tile) {
      const int64_t rows = smaller(w.tile, w.rows - row);
      const uint32_t* entries = w.offsets + row * w.blocks + b * rows;
      uint32_t& next = at[(row - begin) / w.tile];
      float* out = tile + (row - begin) * stride;
      next += add_block<V>(entries, rows, w.values + next, w.columns + next, part, b == 0, out);
      if (b + 1 == w.blocks) Out::template scatter<V>(task, first, count, row, row + rows, out);
    }
  }
}

template <class In, class Out, int V>
inline void tiled_panel(const Task& task, int64_t panel_index, int64_t begin, int64_t end) {
  const int64_t first = panel_index * kPanel;
  const int64_t count = smaller(kPanel, task.n - first);
  const float* held = In::template in_place<V>(task, first, count);
  const int64_t step = kMostTiledRows / task.w.tile * task.w.tile;
  // Read once, a part of the panel is dropped with its block and never leaves the first cache.
  const bool keep = held != nullptr || end - begin > step;
  for (int64_t row = begin; row < end; row += step) {
    float* fill = held == nullptr && row == begin ? task.workspace : nullptr;
    tiled_rows<In, Out, V>(task, first, count, row, smaller(row + step, end),
                           held == nullptr ? task.workspace : held, fill, keep);
  }
}

template <class In, class Out>
inline void tiled(const Task& task) {
  for (int64_t p = task.begin_panel; p <= task.end_panel; ++p) {
    const int64_t begin = p == task.begin_panel ? task.begin_row : 0;
    const int64_t end = p == task.end_panel ? task.end_row : task.w.rows;
    if (begin >= end) continue;
    const int64_t count = smaller(kPanel, task.n - p * kPanel);
    switch ((count + kLanes - 1) / kLanes) {
      case 1: tiled_panel<In, Out, 1>(task, p, begin, end); break;
      case 2: tiled_panel<In, Out, 2>(task, p, begin, end); break;
      case 3: tiled_panel<In, Out, 3>(task, p, begin, end); break;
      default: tiled_panel<In, Out, 4>(task, p, begin, end); break;
    }
  }
}
