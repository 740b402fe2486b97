// 1x1 convolution with stride 1, straight from the planes: no panel is filled, and each output is
// written once. Included after depthwise-inl.h. A unit is a run of at most kPointVectors vectors of
// one image's pixels, all runs about equally long.

constexpr int kPointVectors = kPointPanels * kMaxVectors;
constexpr uint32_t kLongRow = 8;  // non-zeros from which two partial sums pay

// What rows of one run share; `rest`: pixels of its last vector, kLanes if all may be touched.
struct Points {
  const Task& task;
  const float* x;          // the run in the first channel
  int64_t place, skew;     // and in the first row of y, and of the residual beyond that
  int64_t rest_in, rest;   // readable and writable floats of the last vector
  Vec low, high;           // of the activations that only clamp
  bool clamps;
};

template <int V>
inline Vec load_point(const float* from, int v, int64_t rest) {
  return v + 1 < V || rest >= kLanes ? load(from + v * kLanes) : load_n(from + v * kLanes, rest);
}

template <int V, bool Whole>
inline void add_point(const Points& p, Vec weight, uint64_t column, Vec (&sums)[V]) {
  const float* from = p.x + static_cast<int64_t>(column) * p.task.ldx;
#pragma GCC unroll 16
  for (int v = 0; v < V; ++v)
    sums[v] = fma(weight, load_point<V>(from, v, Whole ? kLanes : p.rest_in), sums[v]);
}

// sums += the non-zeros i to `end` of a row, in S sums by turns.
template <int V, int S, bool Whole>
inline void add_points(const Points& p, uint32_t i, uint32_t end, Vec (&sums)[2][V]) {
  const Weight& w = p.task.w;
  for (; i + kQuad <= end; i += kQuad) {
    const Quad weights = load_quad(w.values + i);
    const uint64_t quad = load_columns(w.columns + i);
    add_point<V, Whole>(p, repeat<0>(weights), quad & 0xFFFF, sums[0]);
    add_point<V, Whole>(p, repeat<1>(weights), quad >> 16 & 0xFFFF, sums[S - 1]);
    add_point<V, Whole>(p, repeat<2>(weights), quad >> 32 & 0xFFFF, sums[0]);
    add_point<V, Whole>(p, repeat<3>(weights), quad >> 48, sums[S - 1]);
  }
  for (; i < end; ++i) add_point<V, Whole>(p, broadcast(w.values[i]), w.columns[i], sums[0]);
}

inline Vec finish_point(const Points& p, Vec value) {
  return p.clamps ? minimum(p.high, maximum(p.low, value)) : activate(value, p.task.flags);
}

template <int V>
__attribute__((always_inline)) inline void finish_points(const Points& p, int64_t row, Vec (&sum)[V]) {
  const Task& task = p.task;
  const int64_t place = p.place + row * task.ldy, last = place + (V - 1) * kLanes;
  if (task.residual) {
    const float* added = task.residual + place + p.skew + row * task.skew;
#pragma GCC unroll 16
    for (int v = 0; v + 1 < V; ++v) sum[v] = add(sum[v], load(added + v * kLanes));
    sum[V - 1] = add(sum[V - 1], load_n(added + last - place, p.rest));
  }
#pragma GCC unroll 16
  for (int v = 0; v + 1 < V; ++v) store(task.y + place + v * kLanes, finish_point(p, sum[v]));
  const Vec value = finish_point(p, sum[V - 1]);
  if (p.rest >= kLanes) return store(task.y + last, value);
  store_n(task.y + last, value, p.rest);
}

template <int V, bool Whole>
inline void point_rows(const Points& p, int64_t begin, int64_t end) {
  const Task& task = p.task;
  const uint32_t* offsets = task.w.offsets;
  for (int64_t row = begin; row < end; ++row) {
    const Vec bias = task.bias ? broadcast(task.bias[row]) : zero();
    const uint32_t start = offsets[row], stop = offsets[row + 1];
    Vec sums[2][V];
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) sums[0][v] = bias;
    if (stop - start >= kLongRow) {
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v) sums[1][v] = zero();
      add_points<V, 2, Whole>(p, start, stop, sums);
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v) sums[0][v] = add(sums[0][v], sums[1][v]);
    } else {
      add_points<V, 1, Whole>(p, start, stop, sums);
    }
    finish_points<V>(p, row, sums[0]);
  }
}

template <int V>
inline void point_run(const Points& p, int64_t begin, int64_t end) {
  if (p.rest_in >= kLanes) return point_rows<V, true>(p, begin, end);
  point_rows<V, false>(p, begin, end);
}

inline void point_unit(const Points& p, int64_t vectors, int64_t begin, int64_t end) {
  switch (vectors) {
    case 1: return point_run<1>(p, begin, end);
    case 2: return point_run<2>(p, begin, end);
    case 3: return point_run<3>(p, begin, end);
    case 4: return point_run<4>(p, begin, end);
    case 5: return point_run<5>(p, begin, end);
    case 6: return point_run<6>(p, begin, end);
    case 7: return point_run<7>(p, begin, end);
    default: return point_run<8>(p, begin, end);
  }
}
static_assert(kPointVectors == 8, "as many cases as vectors");

void pointwise(const Task& task) {
  const int64_t channels = task.conv->channels, pixels = task.n;
  const int64_t vectors = (pixels + kLanes - 1) / kLanes;
  const int64_t units = (vectors + kPointVectors - 1) / kPointVectors;
  const bool clamps = (task.flags & ~(kRelu | kRelu6)) == 0;
  const Vec low = task.flags ? zero() : broadcast(-__builtin_inff());
  const Vec high = broadcast(task.flags & kRelu6 ? 6.0f : __builtin_inff());
  for (int64_t unit = task.begin_panel; unit <= task.end_panel; ++unit) {
    const int64_t begin = unit == task.begin_panel ? task.begin_row : 0;
    const int64_t end = unit == task.end_panel ? task.end_row : task.w.rows;
    if (begin >= end) continue;
    const int64_t image = unit / units, part = unit % units;
    const int64_t first = vectors * part / units, last = vectors * (part + 1) / units;
    const int64_t at = first * kLanes, rest = pixels - (last - 1) * kLanes;
    const Points points{task,
                        task.x + image * channels * task.ldx + at,
                        image * task.w.rows * task.ldy + at,
                        image * task.w.rows * task.skew,
                        task.padded_in ? kLanes : rest,
                        task.padded_out ? kLanes : rest,
                        low,
                        high,
                        clamps};
    point_unit(points, last - first, begin, end);
  }
}
