// Depthwise convolution with a 3x3 kernel and the same stride, 1 or 2, both ways: strips of one
// vector of columns, down the plane. Each row of input is read once per strip and adds its part to
// all outputs that see it. Included after depthwise-inl.h and the definition of
//   odd (every second lane of two vectors, from the second on), load_once (load, but not again for
//   each use).

// Strips that are done at the same time, as registers allow.
constexpr int64_t kMostStrips = kLanes == 16 ? 4 : 2;

// The nine weights of a plane, and its bias.
struct Window {
  Vec k[3][3];
  Vec bias;
};

// Lanes of the loads of a strip that lie within the plane: at columns `from`, from + kLanes, and two
// further.
struct Sight {
  Mask low, high, low2, high2;
};

template <int S>
inline Sight sight(int64_t from, int64_t width) {
  const auto mask = [&](int64_t at) { return between(-at, smaller(width - at, kLanes)); };
  if (S == 1) return {mask(from), mask(from + 1), mask(from + 2), mask(from + 2)};
  return {mask(from), mask(from + kLanes), mask(from + 2), mask(from + 2 + kLanes)};
}

// seen[j] = the input under column j of the kernel.
template <int S, bool Edge>
inline void see(const float* from, const Sight& s, Vec (&seen)[3]) {
  const Vec low = Edge ? load_where(from, s.low) : load_once(from);
  if (S == 1) {
    seen[0] = low;
    seen[1] = Edge ? load_where(from + 1, s.high) : load_once(from + 1);
    seen[2] = Edge ? load_where(from + 2, s.low2) : load_once(from + 2);
    return;
  }
  const Vec high = Edge ? load_where(from + kLanes, s.high) : load_once(from + kLanes);
  const Vec low2 = Edge ? load_where(from + 2, s.low2) : load_once(from + 2);
  const Vec high2 = Edge ? load_where(from + 2 + kLanes, s.high2) : load_once(from + 2 + kLanes);
  seen[0] = even(low, high);
  seen[1] = odd(low, high);
  seen[2] = even(low2, high2);
}

inline Vec weigh(const Vec (&k)[3], const Vec (&seen)[3], Vec sum) {
  return fma(k[2], seen[2], fma(k[1], seen[1], fma(k[0], seen[0], sum)));
}

inline Vec weigh(const Vec (&k)[3], const Vec (&seen)[3]) {
  return fma(k[2], seen[2], fma(k[1], seen[1], mul(k[0], seen[0])));
}

// Strips next to each other, of every plane. Only the first and the last may reach beyond its edges.
struct Strips {
  const Task& task;
  int64_t from, at;  // columns: of the first input under the kernel, of the first output
  int64_t count;     // outputs per line of the last strip
  Sight first, last;
  Vec least, most;  // of activations that only clamp
  bool clamps;
};

// One plane's part of them: `row` floats from row to row of x, the first row may lie above.
struct Column {
  const float* x;
  float* y;
  int64_t skew;  // of the residual
  int64_t row, line, next;  // floats from row to row of x and y, and to the next plane of x
  int64_t top, height, lines;
  const float* values;  // nine
  float bias;
};

inline Window window(const Column& c) {
  Window w;
#pragma GCC unroll 3
  for (int i = 0; i < 3; ++i)
#pragma GCC unroll 3
    for (int j = 0; j < 3; ++j) w.k[i][j] = broadcast(c.values[3 * i + j]);
  w.bias = broadcast(c.bias);
  return w;
}

template <int V>
__attribute__((always_inline)) inline void put(const Strips& p, const Column& c, int64_t line, Vec (&sum)[V]) {
  float* to = c.y + line * c.line;
  if (p.task.residual || !p.clamps) {
    const int64_t place = to - p.task.y;
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v)
      write(p.task, place + v * kLanes, sum[v], zero(), v + 1 < V ? kLanes : p.count, c.skew);
    return;
  }
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) sum[v] = minimum(p.most, maximum(p.least, sum[v]));
#pragma GCC unroll 4
  for (int v = 0; v + 1 < V; ++v) store(to + v * kLanes, sum[v]);
  if (p.count >= kLanes) return store(to + (V - 1) * kLanes, sum[V - 1]);
  store_n(to + (V - 1) * kLanes, sum[V - 1], p.count);
}

// Asks for the same place of the next plane: rows are too short for the hardware to see it coming.
// Into the second level if the first does not hold two planes.
template <int V>
__attribute__((always_inline)) inline void fetch_next(const Column& c, const float* from) {
  if (c.next <= kNearFloats / 2) {
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) __builtin_prefetch(from + c.next + v * kLineFloats, 0, 3);
  } else {
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) __builtin_prefetch(from + c.next + v * kLineFloats, 0, 2);
  }
}

template <int V, int S, bool Edge>
inline void see_strip(const Strips& p, const float* from, int v, Vec (&seen)[3]) {
  if (Edge && v == 0) return see<S, true>(from, p.first, seen);
  if (Edge && v == V - 1) return see<S, true>(from + v * S * kLanes, p.last, seen);
  see<S, false>(from + v * S * kLanes, p.first, seen);
}

// Output line l is finished by the row under its last row of weights; rows outside add nothing.
template <int V, bool Edge>
inline void strips_by_one(const Strips& p, const Column& c) {
  const Window w = window(c);
  Vec one[V], two[V];  // of the next line, and of the one after
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) one[v] = two[v] = w.bias;
  int64_t row = c.top;
  for (int64_t line = -2; line < c.lines; ++line, ++row) {
    Vec done[V];
    if (row >= 0 && row < c.height) {
      const float* from = c.x + row * c.row;
      fetch_next<V>(c, from);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        Vec seen[3];
        see_strip<V, 1, Edge>(p, from, v, seen);
        done[v] = add(one[v], weigh(w.k[2], seen));
        one[v] = add(two[v], weigh(w.k[1], seen));
        two[v] = weigh(w.k[0], seen, w.bias);
      }
    } else {
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        done[v] = one[v];
        one[v] = two[v];
        two[v] = w.bias;
      }
    }
    if (line >= 0) put<V>(p, c, line, done);
  }
}

template <int V, bool Edge>
inline void strips_by_two(const Strips& p, const Column& c) {
  const Window w = window(c);
  Vec sum[V], done[V];
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) sum[v] = w.bias;
  int64_t row = c.top;
  for (int64_t line = -1; line < c.lines; ++line, row += 2) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      done[v] = sum[v];
      sum[v] = w.bias;
    }
    Vec seen[3];
    if (row >= 0 && row < c.height) {
      const float* from = c.x + row * c.row;
      fetch_next<2 * V>(c, from);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        see_strip<V, 2, Edge>(p, from, v, seen);
        done[v] = add(done[v], weigh(w.k[2], seen));
        sum[v] = weigh(w.k[0], seen, w.bias);
      }
    }
    if (row + 1 >= 0 && row + 1 < c.height) {
      const float* from = c.x + (row + 1) * c.row;
      fetch_next<2 * V>(c, from);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        see_strip<V, 2, Edge>(p, from, v, seen);
        sum[v] = add(sum[v], weigh(w.k[1], seen));
      }
    }
    if (line >= 0) put<V>(p, c, line, done);
  }
}

// All planes of the task.
template <int V, int S, bool Edge>
void strips_down(const Strips& p) {
  const Task& task = p.task;
  const auto& c = static_cast<const GroupConv&>(*task.conv);
  const int64_t rows = task.w.rows, multiplier = rows / c.all_groups;
  int64_t row = task.begin_panel % rows, image = task.begin_panel / rows;
  for (int64_t plane = task.begin_panel; plane < task.end_panel; ++plane, ++row) {
    if (row == rows) {
      row = 0;
      ++image;
    }
    const int64_t channel = multiplier == 1 ? row : row / multiplier;
    const Column column{task.x + (image * c.all_groups + channel) * task.ldx + p.from,
                        task.y + plane * task.ldy + p.at,
                        plane * task.skew,
                        c.across.in,
                        c.across.out,
                        task.ldx,
                        -c.down.before,
                        c.down.in,
                        c.down.out,
                        task.w.values + row * 9,
                        task.bias ? task.bias[row] : 0.0f};
    S == 1 ? strips_by_one<V, Edge>(p, column) : strips_by_two<V, Edge>(p, column);
  }
}

template <int V, int S>
inline void strips_down(const Strips& p, bool edge) {
  edge ? strips_down<V, S, true>(p) : strips_down<V, S, false>(p);
}

template <int S>
void depthwise3(const Task& task) {
  const Axis& across = task.conv->across;
  constexpr int64_t kReach = S * kLanes + 2;
  const auto inside = [&](int64_t at) { return at >= 0 && at + kReach <= across.in; };
  const int64_t all = (across.out + kLanes - 1) / kLanes;
  for (int64_t done = 0, strips = 0; done < all; done += strips) {
    strips = smaller(all - done, kMostStrips);
    const int64_t begin = done * S * kLanes - across.before;
    const bool sound = inside(begin + S * kLanes) && inside(begin + (strips - 2) * S * kLanes);
    if (strips > 2 && !sound) strips = 1;
    const int64_t end = begin + (strips - 1) * S * kLanes;
    const Strips p{task,
                   begin,
                   done * kLanes,
                   smaller(kLanes, across.out - (done + strips - 1) * kLanes),
                   sight<S>(begin, across.in),
                   sight<S>(end, across.in),
                   task.flags ? zero() : broadcast(-__builtin_inff()),
                   broadcast(task.flags & kRelu6 ? 6.0f : __builtin_inff()),
                   (task.flags & ~(kRelu | kRelu6)) == 0};
    const bool edge = !(inside(begin) && inside(end));
    switch (strips) {
      case 1: strips_down<1, S>(p, edge); break;
      case 2: strips_down<2, S>(p, edge); break;
      case 3: strips_down<kMostStrips < 3 ? 2 : 3, S>(p, edge); break;
      default: strips_down<kMostStrips, S>(p, edge); break;
    }
  }
}

void depthwise(const Task& task) {
  const bool twice = task.conv->down.stride == 2;
  switch (task.conv->down.kernel) {
    case 3: return twice ? depthwise3<2>(task) : depthwise3<1>(task);
    case 5: return twice ? depthwise<5, 2>(task) : depthwise<5, 1>(task);
    default: return twice ? depthwise<7, 2>(task) : depthwise<7, 1>(task);
  }
}
