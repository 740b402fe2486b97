// Depthwise convolution with a full square kernel of 5 or 7 and the same stride, 1 or 2, both
// ways: blocks of output rows by one vector, straight from the planes. Included after conv-inl.h and
// the definition of
//   Mask, between (lanes [low, high)), load_where (the lanes of a mask, zero elsewhere: no others
//   are read), even (every second lane of two vectors).

constexpr int kBlockRows = 4;

// The lanes of a vector of outputs whose input under one column of the kernel, from[lane * S], lies
// within the plane; of two vectors of input if S is 2.
struct Reach {
  Mask low, high;
};

template <int K, int S>
inline void reaches(int64_t from, int64_t width, Reach (&reach)[K]) {
  for (int j = 0; j < K; ++j, ++from) {
    const int64_t stop = smaller(width - from, S * (kLanes - 1) + 1);  // more is never read
    reach[j] = {between(-from, stop), between(-from - kLanes, stop - kLanes)};
  }
}

template <int S, bool Edge>
inline Vec load_reach(const float* from, const Reach& reach) {
  const Vec low = Edge ? load_where(from, reach.low) : load(from);
  if (S == 1) return low;
  return even(low, Edge ? load_where(from + kLanes, reach.high) : load_n(from + kLanes, kLanes - 1));
}

struct Plane {
  const float *x, *weight, *zeros;  // zeros: a line of them, in place of those above and below
  Vec bias;
  int64_t height, width;
};

// kBlockRows outputs below each other; `top` and `from`: the input row and column of the first.
// Edge: some of the lanes or rows lie outside of the plane.
template <int K, int S, bool Edge>
inline void depthwise_block(const Plane& plane, int64_t top, int64_t from, const Reach (&reach)[K],
                            Vec (&acc)[kBlockRows]) {
  // Kept in registers if there are enough of them.
  Vec weight[K * K];
#pragma GCC unroll 64
  for (int k = 0; k < K * K; ++k) weight[k] = broadcast(plane.weight[k]);
#pragma GCC unroll 16
  for (int r = 0; r < kBlockRows; ++r) acc[r] = plane.bias;
  Reach lanes[K];
#pragma GCC unroll 16
  for (int j = 0; j < K; ++j) lanes[j] = reach[j];
#pragma GCC unroll 16
  for (int i = 0; i < (kBlockRows - 1) * S + K; ++i) {
    const bool inside = !Edge || (top + i >= 0 && top + i < plane.height);
    const float* row = (inside ? plane.x + (top + i) * plane.width : plane.zeros) + from;
    Vec seen[K];
#pragma GCC unroll 16
    for (int j = 0; j < K; ++j) seen[j] = load_reach<S, Edge>(row + j, lanes[j]);
#pragma GCC unroll 16
    for (int r = 0; r < kBlockRows; ++r) {
      const int k = i - r * S;
      if (k < 0 || k >= K) continue;
#pragma GCC unroll 16
      for (int j = 0; j < K; ++j) acc[r] = fma(weight[k * K + j], seen[j], acc[r]);
    }
  }
}

// y[place + r * columns ...] = activation(acc[r] + residual[... + skew]) for `rows` lines of `count`.
inline void write_block(const Task& task, Vec (&acc)[kBlockRows], int64_t place, int64_t columns,
                        int64_t rows, int64_t count, int64_t skew) {
  const uint32_t flags = task.flags;
  if (task.residual || (flags & ~(kRelu | kRelu6))) {
    for (int64_t r = 0; r < rows; ++r)
      write(task, place + r * columns, acc[r], zero(), count, skew);
    return;
  }
  if (flags) {
    const Vec most = broadcast(flags & kRelu6 ? 6.0f : __builtin_inff());
#pragma GCC unroll 16
    for (int r = 0; r < kBlockRows; ++r) acc[r] = minimum(most, relu(acc[r]));
  }
  float* y = task.y + place;
  if (rows == kBlockRows && count >= kLanes) {
#pragma GCC unroll 16
    for (int r = 0; r < kBlockRows; ++r) store(y + r * columns, acc[r]);
    return;
  }
#pragma GCC unroll 16
  for (int r = 0; r < kBlockRows; ++r)
    if (r < rows) store_n(y + r * columns, acc[r], count);
}

// The outputs of one plane; `first` and `last` belong to the first and the last vector of a line.
template <int K, int S>
inline void depthwise_plane(const Task& task, const Conv& c, const Plane& plane, int64_t number,
                            const Reach (&first)[K], const Reach (&last)[K]) {
  const int64_t lines = c.down.out, columns = c.across.out;
  const int64_t place = number * task.ldy, skew = number * task.skew;
  constexpr int64_t kReach = (kBlockRows - 1) * S + K;
  for (int64_t line = 0; line < lines; line += kBlockRows) {
    const int64_t top = line * S - c.down.before, rows = smaller(kBlockRows, lines - line);
    const bool inside = top >= 0 && top + kReach <= plane.height;
    for (int64_t at = 0; at < columns; at += kLanes) {
      const int64_t from = at * S - c.across.before;
      Vec acc[kBlockRows];
      if (inside && from >= 0 && from + K - 1 + S * (kLanes - 1) < plane.width) {
        depthwise_block<K, S, false>(plane, top, from, first, acc);
      } else if (at == 0 || at + kLanes >= columns) {
        depthwise_block<K, S, true>(plane, top, from, at == 0 ? first : last, acc);
      } else {
        Reach reach[K];
        reaches<K, S>(from, plane.width, reach);
        depthwise_block<K, S, true>(plane, top, from, reach, acc);
      }
      write_block(task, acc, place + line * columns + at, columns, rows,
                  smaller(kLanes, columns - at), skew);
    }
  }
}

template <int K, int S>
void depthwise(const Task& task) {
  const auto& c = static_cast<const GroupConv&>(*task.conv);
  const int64_t multiplier = task.w.rows / c.all_groups, width = c.across.in;
  const int64_t last_at = (c.across.out - 1) / kLanes * kLanes;
  for (int64_t i = 0; i < width; i += kLanes) store(task.workspace + i, zero());
  Reach first[K], last[K];
  reaches<K, S>(-c.across.before, width, first);
  reaches<K, S>(last_at * S - c.across.before, width, last);
  for (int64_t plane = task.begin_panel; plane < task.end_panel; ++plane) {
    const int64_t row = plane % task.w.rows, image = plane / task.w.rows;
    const float* x = task.x + (image * c.all_groups + row / multiplier) * task.ldx;
    const Plane one{x, task.w.values + row * K * K, task.workspace,
                    task.bias ? broadcast(task.bias[row]) : zero(), c.down.in, width};
    depthwise_plane<K, S>(task, c, one, plane, first, last);
  }
}
