// Layer normalisation, row by row: the mean first, then the squares of the differences from it, so
// that nothing cancels; the row stays in the first-level cache.

constexpr int kNormSets = 4;

inline float sum_of(const Vec (&sums)[kNormSets]) {
  float lanes[kLanes];
  store(lanes, add(add(sums[0], sums[1]), add(sums[2], sums[3])));
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  return lanes[0];
}

// The sum over a row of x - shift, squared or not.
template <bool Squared>
inline float row_sum(const float* x, int64_t columns, float shift) {
  const Vec mean = broadcast(shift);
  Vec sums[kNormSets] = {zero(), zero(), zero(), zero()};
  int64_t i = 0;
  for (; i + kNormSets * kLanes <= columns; i += kNormSets * kLanes) {
#pragma GCC unroll 4
    for (int s = 0; s < kNormSets; ++s) {
      const Vec value = load(x + i + s * kLanes);
      const Vec apart = sub(value, mean);
      sums[s] = Squared ? fma(apart, apart, sums[s]) : add(sums[s], value);
    }
  }
  for (; i + kLanes <= columns; i += kLanes) {
    const Vec value = load(x + i), apart = sub(value, mean);
    sums[0] = Squared ? fma(apart, apart, sums[0]) : add(sums[0], value);
  }
  float rest = 0.0f;
  for (; i < columns; ++i) rest += Squared ? (x[i] - shift) * (x[i] - shift) : x[i];
  return sum_of(sums) + rest;
}

inline void layer_norm(const Task& task) {
  const LayerNorm& n = *task.norm;
  const float columns = static_cast<float>(n.columns);
  for (int64_t row = task.begin_row; row < task.end_row; ++row) {
    const float* x = n.x + row * n.columns;
    float* y = n.y + row * n.columns;
    const float mean = row_sum<false>(x, n.columns, 0.0f) / columns;
    const float variance = row_sum<true>(x, n.columns, mean) / columns;
    const Vec middle = broadcast(mean);
    const Vec factor = broadcast(1.0f / n.root(variance + n.eps));
    for (int64_t i = 0; i < n.columns; i += kLanes) {
      const int64_t count = n.columns - i;
      Vec value = mul(sub(load_n(x + i, count), middle), factor);
      if (n.gamma != nullptr) value = mul(value, load_n(n.gamma + i, count));
      if (n.beta != nullptr) value = add(value, load_n(n.beta + i, count));
      store_n(y + i, value, count);
    }
  }
}
