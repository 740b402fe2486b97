// Direct sparse convolution, for any instruction set: a panel is kPanel neighbouring positions (see
// conv.h) with all input that they see, and each non-zero of a row adds one shifted run of it.
// Included after spmm-inl.h and the definition of
//   load_even (from[0], from[2], ... of `count` floats).

constexpr int64_t kAhead = 8;  // channels
constexpr int64_t kLineFloats = 16;

// With 32 registers, two panels at once: what a non-zero and a row cost beside their multiply-adds
// is paid for half as often. Two partial sums in every width: see `accumulate`.
constexpr int kWide = kLanes == 16 ? 2 * kMaxVectors : kMaxVectors;
constexpr int kConvSets = kLanes == 16 ? 2 : kSets;
constexpr int64_t kConvRows = kTileRows * kMaxVectors / kWide;  // of a tile

// Where a panel holds the positions that a column reads: `offsets` from the group's first channel.
struct Shifted {
  const float* panel;  // of the first group it holds
  const int32_t* offsets;
  int64_t first_group, group_rows, group_floats;

  const float* row(uint16_t column) const { return panel + offsets[column]; }
  const float* operator()(uint16_t column) const { return row(column); }

  Shifted part(const Weight& w, uint32_t b, int64_t row) const {
    // No division where there is one group.
    const int64_t group = group_rows == w.rows ? 0 : row / group_rows;
    const float* from = panel + (group - first_group) * group_floats;
    return {from, offsets + static_cast<int64_t>(b) * w.block, group, group_rows, group_floats};
  }
};

// The offset of each column (channel, k down, k across), channels counted within a group.
inline void fill_offsets(const Conv& c, int32_t* offsets) {
  const Axis &down = c.down, &across = c.across;
  const int64_t area = down.kernel * across.kernel, cols = c.channels / c.groups * area;
  int32_t* at = offsets;
  for (int64_t i = 0; i < down.kernel && cols > 0; ++i)
    for (int64_t j = 0; j < across.kernel; ++j) {
      const int64_t copy = i % down.period * across.copies + j % across.period;
      const int64_t shift = shift_of(down, i) * across.extent + shift_of(across, j);
      *at++ = static_cast<int32_t>(copy * c.length + shift);
    }
  const auto channel = static_cast<int32_t>(conv_copies(c) * c.length);
  for (int64_t k = area; k < cols; ++k) offsets[k] = offsets[k - area] + channel;
}

inline int64_t clamp(int64_t value, int64_t low, int64_t high) {
  return value < low ? low : value > high ? high : value;
}

// Appends a run, but joins zeros; returns the end of the list.
inline Run* append(Run* begin, Run* end, int64_t from, int64_t at, int64_t count) {
  if (count == 0) return end;
  if (from < 0 && end != begin && end[-1].from < 0 && end[-1].at + end[-1].count == at) {
    end[-1].count += static_cast<int32_t>(count);
    return end;
  }
  *end = {from, static_cast<int32_t>(at), static_cast<int32_t>(count)};
  return end + 1;
}

// The runs that fill `count` places, from position `first` on, of every copy of a channel; `plane`:
// floats from one channel to the next.
inline Run* list_inputs(const Conv& c, int64_t plane, int64_t first, int64_t count, Run* runs) {
  const Axis &down = c.down, &across = c.across;
  Run* end = runs;
  for (int64_t m = 0; m < conv_copies(c); ++m) {
    const int64_t above = down.before - residue(down, m / across.copies);
    const int64_t left = across.before - residue(across, m % across.copies);
    const int64_t low = conv_ceil(left, across.stride);
    const int64_t high = conv_ceil(across.in + left, across.stride);
    for (int64_t done = 0; done < count;) {
      const int64_t line = (first + done) / across.extent, t = (first + done) % across.extent;
      const int64_t image = line / down.extent;
      const int64_t row = line % down.extent * down.stride - above;
      const int64_t stop = smaller(across.extent, t + count - done);
      const bool inside = image < c.batch && row >= 0 && row < down.in;
      const int64_t begin = inside ? clamp(low, t, stop) : stop;
      const int64_t until = clamp(high, begin, stop);
      const int64_t at = m * c.length + done - t;
      const int64_t from = image * c.channels * plane + row * across.in + begin * across.stride - left;
      end = append(runs, end, -1, at + t, begin - t);
      end = append(runs, end, from, at + begin, until - begin);
      end = append(runs, end, -1, at + until, stop - until);
      done += stop - t;
    }
  }
  return end;
}

// The runs that take `count` places of a tile, from position `first` on, to their pixels; `floats`:
// from one image to the next.
inline Run* list_outputs(const Conv& c, int64_t floats, int64_t first, int64_t count, Run* runs) {
  const Axis &down = c.down, &across = c.across;
  Run* end = runs;
  for (int64_t done = 0; done < count;) {
    const int64_t line = (first + done) / across.extent, t = (first + done) % across.extent;
    const int64_t image = line / down.extent, row = line % down.extent;
    const int64_t stop = smaller(across.extent, t + count - done);
    if (row < down.out && t < across.out)
      end = append(runs, end, image * floats + row * across.out + t, done,
                   smaller(stop, across.out) - t);
    done += stop - t;
  }
  return end;
}

// Whole vectors are stored: what lies behind a run is filled after it, or never read.
inline void fill_channel(const Conv& c, const float* x, const Run* run, const Run* end, float* to) {
  const int64_t step = c.across.stride;
  for (; run != end; ++run) {
    float* out = to + run->at;
    const float* from = x + run->from;
    const int64_t count = run->count;
    int64_t i = 0;
    if (run->from < 0) {
      for (; i < count; i += kLanes) store(out + i, zero());
    } else if (step == 1) {
      for (; i + kLanes <= count; i += kLanes) store(out + i, load(from + i));
      if (i < count) store(out + i, load_n(from + i, count - i));
    } else if (step == 2) {
      for (; i < count; i += kLanes)
        store(out + i, load_even(from + 2 * i, smaller(kLanes, count - i)));
    } else {
      for (; i < count; ++i) out[i] = from[i * step];
    }
  }
}

// Where the chunks of columns begin in each row: rows of `chunks` + 1 places.
struct Cuts {
  const uint32_t* places;
  int64_t chunks;

  const uint32_t* row(int64_t row) const { return places + row * (chunks + 1); }
};

inline void fill_cuts(const Weight& w, int64_t chunk, int64_t chunks, uint32_t* cuts) {
  for (int64_t row = 0; row < w.rows; ++row) {
    uint32_t at = w.offsets[row];
    const uint32_t end = w.offsets[row + 1];
    for (int64_t k = 0; k < chunks; ++k) {
      while (k > 0 && at < end && w.columns[at] < k * chunk) ++at;
      *cuts++ = at;
    }
    *cuts++ = end;
  }
}

// acc[v] += sum of values[i] * panel row columns[i], as `accumulate`, of kConvSets partial sums.
template <int V>
inline void add_run(const Weight& w, const Shifted& source, uint32_t i, uint32_t end,
                    Vec (&acc)[V]) {
  Vec sums[kConvSets][V];
#pragma GCC unroll 16
  for (int s = 0; s < kConvSets; ++s)
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) sums[s][v] = s == 0 ? acc[v] : zero();
  for (; i + kConvSets <= end; i += kConvSets) {
#pragma GCC unroll 16
    for (int s = 0; s < kConvSets; ++s) {
      const Vec weight = broadcast(w.values[i + s]);
      const float* from = source.row(w.columns[i + s]);
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v) sums[s][v] = fma(weight, load(from + v * kLanes), sums[s][v]);
    }
  }
  for (; i < end; ++i) {
    const Vec weight = broadcast(w.values[i]);
    const float* from = source.row(w.columns[i]);
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) sums[0][v] = fma(weight, load(from + v * kLanes), sums[0][v]);
  }
#pragma GCC unroll 16
  for (int step = kConvSets / 2; step > 0; step /= 2)
#pragma GCC unroll 16
    for (int s = 0; s < step; ++s)
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v) sums[s][v] = add(sums[s][v], sums[s + step][v]);
#pragma GCC unroll 16
  for (int v = 0; v < V; ++v) acc[v] = sums[0][v];
}

// tile[row - begin] = W[row] * source for rows [begin, end): chunk by chunk, or block by block.
template <int V>
inline void conv_multiply(const Weight& w, const Shifted& source, const Cuts& cuts, int64_t begin,
                          int64_t end, float* tile) {
  const int64_t passes = cuts.places ? cuts.chunks : w.blocks;
  for (int64_t pass = 0; pass < passes; ++pass) {
    for (int64_t row = begin; row < end; ++row) {
      float* out = tile + (row - begin) * V * kLanes;
      const uint32_t b = cuts.places ? 0 : static_cast<uint32_t>(pass);
      const uint32_t* places = cuts.places ? cuts.row(row) + pass : w.offsets + b * w.rows + row;
      Vec acc[V];
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v) acc[v] = pass == 0 ? zero() : load(out + v * kLanes);
      add_run<V>(w, source.part(w, b, row), places[0], places[1], acc);
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v) store(out + v * kLanes, acc[v]);
    }
  }
}

// Asks for the runs of a channel that is filled later: they are too short for the hardware to see
// them coming. Always inline: GCC 12 drops calls that only prefetch.
__attribute__((always_inline)) inline void fetch_channel(const Conv& c, const float* x,
                                                         const Run* run, const Run* end) {
  for (; run != end; ++run) {
    // The copies across share their lines.
    if (run->from < 0 || run->at / c.length % c.across.copies != 0) continue;
    const float* from = x + run->from;
    const int64_t count = (run->count - 1) * c.across.stride + 1;
    for (int64_t i = 0; i < count; i += kLineFloats) __builtin_prefetch(from + i);
  }
}

// Asks for the residual of rows that are finished next, for the same reason.
__attribute__((always_inline)) inline void fetch_residual(const Task& task, const Run* runs,
                                                          const Run* end, int64_t row,
                                                          int64_t stop) {
  for (; row < stop; ++row) {
    for (const Run* run = runs; run != end; ++run) {
      const float* from = task.residual + run->from + row * (task.ldy + task.skew);
      for (int64_t i = 0; i < run->count; i += kLineFloats) __builtin_prefetch(from + i);
    }
  }
}

template <int V>
inline void scatter_pixels(const Task& task, const Run* runs, const Run* end, int64_t begin,
                           int64_t stop, const float* tile) {
  for (int64_t row = begin; row < stop; ++row) {
    const Vec bias = task.bias ? broadcast(task.bias[row]) : zero();
    const float* from = tile + (row - begin) * V * kLanes;
    for (const Run* run = runs; run != end; ++run) {
      const int64_t place = run->from + row * task.ldy;
      for (int64_t i = 0; i < run->count; i += kLanes)
        write(task, place + i, load(from + run->at + i), bias, smaller(kLanes, run->count - i),
              row * task.skew);
    }
  }
}

// Rows [begin, end) of the positions from `first` on; `panel` holds their input.
template <int V>
inline void conv_rows(const Task& task, const Shifted& source, const Cuts& cuts, int64_t first,
                      int64_t begin, int64_t end, float* tile, Run* runs) {
  const int64_t count = smaller(V * kLanes, task.n - first);
  const Run* last = list_outputs(*task.conv, task.w.rows * task.ldy, first, count, runs);
  if (task.residual) fetch_residual(task, runs, last, begin, end);
  conv_multiply<V>(task.w, source, cuts, begin, end, tile);
  scatter_pixels<V>(task, runs, last, begin, end, tile);
}

// Fills `count` positions from `first` on with the input of some groups, from the first on; returns
// the end of its list of runs.
inline Run* fill_panel(const Task& task, int64_t first, int64_t count, int64_t first_group,
                       int64_t last_group, Run* inputs) {
  const Conv& c = *task.conv;
  const int64_t group_channels = c.channels / c.groups, stride = conv_copies(c) * c.length;
  const int64_t reach = c.down.shift * c.across.extent + c.across.shift;
  Run* end = list_inputs(c, task.ldx, first, count + reach, inputs);
  const int64_t until = (last_group + 1) * group_channels;
  for (int64_t i = first_group * group_channels; i < until; ++i) {
    if (c.far && i + kAhead < until)
      fetch_channel(c, task.x + (i + kAhead) * task.ldx, inputs, end);
    fill_channel(c, task.x + i * task.ldx, inputs, end,
                 task.workspace + (i - first_group * group_channels) * stride);
  }
  return end;
}

// The panels number `index` * panels and following, rows [begin, end).
inline void conv_panels(const Task& task, const Cuts& cuts, int64_t index, int64_t begin,
                        int64_t end) {
  const Conv& c = *task.conv;
  const int64_t first = index * c.panels * kPanel, group_rows = task.w.rows / c.groups;
  const int64_t group_channels = c.channels / c.groups, stride = conv_copies(c) * c.length;
  float* panel = task.workspace;
  float* tile = panel + conv_panel_floats(c);
  Run* inputs = reinterpret_cast<Run*>(tile + conv_tile_floats(kPanel));
  const int64_t count = smaller(c.panels, (task.n - first + kPanel - 1) / kPanel) * kPanel;
  const int64_t first_group = begin / group_rows;
  Run* outputs = fill_panel(task, first, count, first_group, (end - 1) / group_rows, inputs);
  const auto* offsets = reinterpret_cast<const int32_t*>(
      tile + conv_tile_floats(kPanel) + conv_runs_floats(c, kPanel));
  for (int64_t row = begin; row < end; row += kConvRows) {
    const int64_t stop = smaller(row + kConvRows, end);
    for (int64_t at = 0, step = 0; at < count; at += step) {
      const Shifted source{panel + at, offsets, first_group, group_rows, group_channels * stride};
      const int64_t left = smaller(count - at, task.n - first - at);
      step = left > kPanel && count - at >= kWide * kLanes ? kWide * kLanes : kPanel;
      if (step > kPanel) {
        conv_rows<kWide>(task, source, cuts, first + at, row, stop, tile, outputs);
        continue;
      }
      switch ((smaller(left, kPanel) + kLanes - 1) / kLanes) {
        case 1: conv_rows<1>(task, source, cuts, first + at, row, stop, tile, outputs); break;
        case 2: conv_rows<2>(task, source, cuts, first + at, row, stop, tile, outputs); break;
        case 3: conv_rows<3>(task, source, cuts, first + at, row, stop, tile, outputs); break;
        default: conv_rows<4>(task, source, cuts, first + at, row, stop, tile, outputs); break;
      }
    }
  }
}

// Fills the offsets of the columns, and behind them the cuts if there are several chunks.
inline Cuts prepare_columns(const Task& task, int32_t* offsets) {
  const Weight& w = task.w;
  fill_offsets(*task.conv, offsets);
  auto* places = reinterpret_cast<uint32_t*>(offsets + (w.cols + 15) / 16 * 16);
  const int64_t chunk = conv_chunk(w, *task.conv, kPanel), chunks = conv_chunks(w, chunk);
  if (chunks > 1) fill_cuts(w, chunk, chunks, places);
  return {chunks > 1 ? places : nullptr, chunks};
}

void conv(const Task& task) {
  const Conv& c = *task.conv;
  const Cuts cuts = prepare_columns(
      task, reinterpret_cast<int32_t*>(task.workspace + conv_panel_floats(c) +
                                       conv_tile_floats(kPanel) + conv_runs_floats(c, kPanel)));
  for (int64_t p = task.begin_panel; p <= task.end_panel; ++p) {
    const int64_t begin = p == task.begin_panel ? task.begin_row : 0;
    const int64_t end = p == task.end_panel ? task.end_row : task.w.rows;
    if (begin < end) conv_panels(task, cuts, p, begin, end);
  }
}
