// Sparse weight times dense matrix, for any instruction set.
// Included by src/isa/*.cpp inside an anonymous namespace, after these are defined there:
//   Vec, kLanes, kSets, zero, load, store, load_n, store_n, broadcast, fma, add, transpose, write,
//   Quad, load_quad, repeat.
// No inline library function may be used here: its weak symbol would carry this file's
// instructions into programs on older CPUs.

constexpr int kMaxVectors = 4;
constexpr int64_t kPanel = kMaxVectors * kLanes;

// Floats taken from one token before the next: whole neighbouring lines, because tokens that are a
// power of two apart compete for the same places in the cache.
constexpr int64_t kChunk = 64;

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// Where a panel holds the row of a column: rows next to each other.
template <int V>
struct Contiguous {
  const float* panel;
  const float* row(uint16_t column) const { return panel + column * int64_t{V * kLanes}; }

  // The rows of column block `b` for row `row` of the weight.
  Contiguous part(const Weight& w, uint32_t b, int64_t) const {
    return {panel + static_cast<int64_t>(b) * w.block * V * kLanes};
  }
};

// Four weights and their columns come by one load each: with an address of its own for each,
// loads would be the bound.
constexpr int kQuad = 4;

inline uint64_t load_columns(const uint16_t* columns) {
  uint64_t quad;
  __builtin_memcpy(&quad, columns, sizeof quad);
#if defined(__GNUC__)
  asm("" : "+r"(quad));  // the compiler would load each column by itself again
#endif
  return quad;
}

template <int V>
inline void add_product(Vec weight, const float* row, Vec (&sums)[V]) {
#pragma GCC unroll 16
  for (int v = 0; v < V; ++v) sums[v] = fma(weight, load(row + v * kLanes), sums[v]);
}

// acc[v] += sum of values[i] * panel row columns[i], i in [begin, end). kSets partial sums hide
// the latency of the multiply-add; their order does not depend on V, so a column's result does
// not depend on its place in the panel.
template <int V, class Source>
inline void accumulate(const float* values, const uint16_t* columns, uint32_t begin, uint32_t end,
                       const Source& source, Vec (&acc)[V]) {
  Vec sums[kSets][V];
#pragma GCC unroll 16
  for (int v = 0; v < V; ++v) sums[0][v] = acc[v];
#pragma GCC unroll 16
  for (int s = 1; s < kSets; ++s)
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) sums[s][v] = zero();
  uint32_t i = begin;
  for (; i + kQuad <= end; i += kQuad) {
    const Quad weights = load_quad(values + i);
    const uint64_t quad = load_columns(columns + i);
    add_product<V>(repeat<0>(weights), source.row(quad & 0xFFFF), sums[0]);
    add_product<V>(repeat<1>(weights), source.row(quad >> 16 & 0xFFFF), sums[1 % kSets]);
    add_product<V>(repeat<2>(weights), source.row(quad >> 32 & 0xFFFF), sums[2 % kSets]);
    add_product<V>(repeat<3>(weights), source.row(quad >> 48), sums[3 % kSets]);
  }
  for (; i < end; ++i) add_product<V>(broadcast(values[i]), source.row(columns[i]), sums[0]);
#pragma GCC unroll 16
  for (int step = kSets / 2; step > 0; step /= 2)
#pragma GCC unroll 16
    for (int s = 0; s < step; ++s)
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v) sums[s][v] = add(sums[s][v], sums[s + step][v]);
#pragma GCC unroll 16
  for (int v = 0; v < V; ++v) acc[v] = sums[0][v];
}

// tile[row - begin] = W[row] * source for rows [begin, end), block by block.
template <int V, class Source>
inline void multiply(const Weight& w, const Source& source, int64_t begin, int64_t end,
                     float* tile) {
  constexpr int64_t stride = V * kLanes;
  for (uint32_t b = 0; b < w.blocks; ++b) {
    const uint32_t* offsets = w.offsets + b * w.rows;
    for (int64_t row = begin; row < end; ++row) {
      float* out = tile + (row - begin) * stride;
      Vec acc[V];
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v) acc[v] = b == 0 ? zero() : load(out + v * kLanes);
      const Source part = source.part(w, b, row);
      accumulate<V>(w.values, w.columns, offsets[row], offsets[row + 1], part, acc);
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v) store(out + v * kLanes, acc[v]);
    }
  }
}

// Square blocks of kLanes by kLanes; whole ones stay in registers. `count` rows exist, each has
// `width` columns within the matrix.
inline void load_block(const float* from, int64_t stride, int64_t count, int64_t width,
                       Vec (&block)[kLanes]) {
  if (count >= kLanes && width >= kLanes) {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) block[i] = load(from + i * stride);
  } else {
    for (int i = 0; i < kLanes; ++i)
      block[i] = i < count ? load_n(from + i * stride, width) : zero();
  }
}

inline void store_block(const Vec (&block)[kLanes], float* to, int64_t stride, int64_t count) {
  if (count >= kLanes) {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) store(to + i * stride, block[i]);
  } else {
    for (int64_t i = 0; i < count; ++i) store(to + i * stride, block[i]);
  }
}

// Tokens: x [n, cols] and y [n, rows]; panels are made and taken apart by register transposes.
struct Tokens {
  // Where the row of a column begins in x.
  static int64_t row_of(const Task&, int64_t column) { return column; }

  // Where the input already is a panel; null: nowhere.
  template <int V>
  static const float* in_place(const Task&, int64_t, int64_t) {
    return nullptr;
  }

  // The rows of the columns [begin, end), to `panel` on.
  template <int V>
  static void gather(const Task& task, int64_t first, int64_t count, int64_t begin, int64_t end,
                     float* panel) {
    for (int64_t chunk = begin; chunk < end; chunk += kChunk) {
      const int64_t stop = smaller(end, chunk + kChunk);
      for (int v = 0; v < V; ++v) {
        const int64_t token = v * kLanes;
        for (int64_t k = chunk; k < stop; k += kLanes) {
          const float* from = task.x + (first + token) * task.ldx + k;
          const int64_t width = smaller(kLanes, stop - k);
          Vec block[kLanes];
          load_block(from, task.ldx, count - token, width, block);
          transpose(block);
          store_block(block, panel + (k - begin) * V * kLanes + token, V * kLanes, width);
        }
      }
    }
  }

  template <int V>
  static void scatter(const Task& task, int64_t first, int64_t count, int64_t begin, int64_t end,
                      const float* tile) {
    // Each token gets several whole lines at a time: single ones, a power of two apart, collide.
    alignas(64) float turned[kLanes * kTileRows];
    for (int v = 0; v < V; ++v)
      for (int64_t chunk = begin; chunk < end; chunk += kTileRows) {
        const int64_t stop = smaller(chunk + kTileRows, end);
        for (int64_t row = chunk; row < stop; row += kLanes) {
          const float* from = tile + ((row - begin) * V + v) * kLanes;
          Vec block[kLanes];
#pragma GCC unroll 16
          for (int i = 0; i < kLanes; ++i) block[i] = load(from + i * V * kLanes);
          transpose(block);
#pragma GCC unroll 16
          for (int i = 0; i < kLanes; ++i) store(turned + i * kTileRows + row - chunk, block[i]);
        }
        const int64_t token = first + v * kLanes;
        const int64_t tokens = smaller(kLanes, first + count - token);
        for (int64_t i = 0; i < tokens; ++i)
          for (int64_t row = chunk; row < stop; row += kLanes) {
            const int64_t width = smaller(kLanes, stop - row);
            const Vec bias = task.bias ? load_n(task.bias + row, width) : zero();
            const Vec value = load(turned + i * kTileRows + row - chunk);
            write(task, (token + i) * task.ldy + row, value, bias, width);
          }
      }
  }
};

// Planes: x [cols, n] and y [rows, n], columns next to each other.
struct Planes {
  static int64_t row_of(const Task& task, int64_t column) { return column * task.ldx; }

  template <int V>
  static const float* in_place(const Task& task, int64_t first, int64_t count) {
    const bool whole = task.ldx == V * kLanes && count == V * kLanes;
    const bool aligned = reinterpret_cast<uintptr_t>(task.x) % sizeof(Vec) == 0;
    return whole && aligned && first == 0 ? task.x : nullptr;
  }

  template <int V>
  static void gather(const Task& task, int64_t first, int64_t count, int64_t begin, int64_t end,
                     float* panel) {
    for (int64_t k = begin; k < end; ++k) {
      const float* from = task.x + k * task.ldx + first;
      for (int v = 0; v < V; ++v) {
        const int64_t width = smaller(kLanes, count - v * kLanes);
        const float* at = from + v * kLanes;
        const Vec value = width == kLanes ? load(at) : load_n(at, width);
        store(panel + ((k - begin) * V + v) * kLanes, value);
      }
    }
  }

  template <int V>
  static void scatter(const Task& task, int64_t first, int64_t count, int64_t begin, int64_t end,
                      const float* tile) {
    for (int64_t row = begin; row < end; ++row) {
      const Vec bias = task.bias ? broadcast(task.bias[row]) : zero();
      const int64_t place = row * task.ldy + first;
      for (int v = 0; v < V; ++v) {
        const Vec value = load(tile + ((row - begin) * V + v) * kLanes);
        write(task, place + v * kLanes, value, bias, smaller(kLanes, count - v * kLanes));
      }
    }
  }
};

template <class Layout, int V>
inline void one_panel(const Task& task, int64_t panel_index, int64_t begin, int64_t end) {
  const int64_t first = panel_index * kPanel;
  const int64_t count = smaller(kPanel, task.n - first);
  float* panel = task.workspace;
  float* tile = panel + (task.w.cols + kRowGroup) / kRowGroup * kRowGroup * kPanel;
  const float* source = Layout::template in_place<V>(task, first, count);
  if (source == nullptr) {
    Layout::template gather<V>(task, first, count, 0, task.w.cols, panel);
    source = panel;
  }
  for (int64_t row = begin; row < end; row += kTileRows) {
    const int64_t stop = smaller(row + kTileRows, end);
    multiply<V>(task.w, Contiguous<V>{source}, row, stop, tile);
    Layout::template scatter<V>(task, first, count, row, stop, tile);
  }
}

template <class Layout>
void spmm(const Task& task) {
  for (int64_t p = task.begin_panel; p <= task.end_panel; ++p) {
    const int64_t begin = p == task.begin_panel ? task.begin_row : 0;
    const int64_t end = p == task.end_panel ? task.end_row : task.w.rows;
    if (begin >= end) continue;
    const int64_t count = smaller(kPanel, task.n - p * kPanel);
    switch ((count + kLanes - 1) / kLanes) {
      case 1: one_panel<Layout, 1>(task, p, begin, end); break;
      case 2: one_panel<Layout, 2>(task, p, begin, end); break;
      case 3: one_panel<Layout, 3>(task, p, begin, end); break;
      default: one_panel<Layout, 4>(task, p, begin, end); break;
    }
  }
}
