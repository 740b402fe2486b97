// What one token needs beside products: attention against a cache, the lanes being columns of the
// heads, and SiLU. After bitmap-inl.h, which widens bfloat16.

inline Vec read_n(const float* from, int64_t count) { return load_n(from, count); }

inline Vec read_n(const uint16_t* from, int64_t count) {
#if defined(__AVX512BW__)
  const __m256i bits = _mm256_maskz_loadu_epi16(first(count), from);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
#else
#if defined(__AVX2__)
  if (count >= kLanes) return eight(from);
#endif
  float lanes[kLanes];
  for (int64_t i = 0; i < kLanes; ++i) lanes[i] = i < count ? widen(from[i]) : 0.0f;
  return load(lanes);
#endif
}

inline float sum_of_lanes(Vec v) {
  float lanes[kLanes];
  store(lanes, v);
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  return lanes[0];
}

// scores[i] = scale q k[i]; the largest of them, or NaN.
template <class T>
inline float score_token(const TokenAttention& a, const float* q, const T* k, float* scores) {
  float most = -3.402823466e38f;
  for (int64_t t = 0; t < a.keys; t += kLanes, k += kLanes * a.k_row) {
    const int64_t count = a.keys - t < kLanes ? a.keys - t : kLanes;
    Vec rows[kLanes];
    for (int64_t i = 0; i < kLanes; ++i) {
      rows[i] = zero();
      for (int64_t d = 0; i < count && d < a.dim; d += kLanes)
        rows[i] = fma(read_n(k + i * a.k_row + d, a.dim - d), load_n(q + d, a.dim - d), rows[i]);
    }
    transpose(rows);
    for (int width = kLanes / 2; width > 0; width /= 2)
      for (int i = 0; i < width; ++i) rows[i] = add(rows[i], rows[i + width]);
    store(scores + t, mul(rows[0], broadcast(a.scale)));
    for (int64_t i = 0; i < count; ++i)
      most = scores[t + i] > most || scores[t + i] != scores[t + i] ? scores[t + i] : most;
    if (most != most) return most;
  }
  return most;
}

// to[columns] = scores v / total, four vectors of columns at a time.
template <class T>
inline void mix_token(const TokenAttention& a, const T* v, const float* scores, float total,
                      float* to) {
  constexpr int kSums = 4;
  for (int64_t d = 0; d < a.dim; d += kSums * kLanes) {
    Vec sums[kSums] = {zero(), zero(), zero(), zero()};
    for (int64_t t = 0; t < a.keys; ++t) {
      const Vec score = broadcast(scores[t]);
#pragma GCC unroll 4
      for (int s = 0; s < kSums; ++s) {
        const int64_t place = d + s * kLanes;
        if (place < a.dim)
          sums[s] = fma(score, read_n(v + t * a.v_row + place, a.dim - place), sums[s]);
      }
    }
    for (int s = 0; s < kSums && d + s * kLanes < a.dim; ++s)
      store_n(to + d + s * kLanes, divide(sums[s], broadcast(total)), a.dim - d - s * kLanes);
  }
}

template <class T>
void attend_heads(const Task& task) {
  const TokenAttention& a = *task.token;
  float* scores = task.workspace;
  for (int64_t head = task.begin_row; head < task.end_row; ++head) {
    const int64_t group = head / a.sharing;
    const T* k = static_cast<const T*>(a.k) + group * a.k_head;
    const Vec most = broadcast(score_token(a, a.q + head * a.dim, k, scores));
    Vec total = zero();
    for (int64_t t = 0; t < a.keys; t += kLanes) {
      store(scores + t, exponential(sub(load(scores + t), most)));
      total = add(total, load_n(scores + t, a.keys - t));
    }
    // A score of NaN makes its whole head NaN, as the softmax does.
    float lanes[kLanes];
    store(lanes, most);
    const float sum = lanes[0] != lanes[0] ? lanes[0] : sum_of_lanes(total);
    mix_token(a, static_cast<const T*>(a.v) + group * a.v_head, scores, sum, a.out + head * a.dim);
  }
}

void attend_token(const Task& task) {
  task.token->half ? attend_heads<uint16_t>(task) : attend_heads<float>(task);
}

void silu_f32(const Task& task) {
  for (int64_t i = 0; i < task.n; i += kLanes) {
    const Vec value = load_n(task.x + i, task.n - i);
    store_n(task.y + i, gated(value, value), task.n - i);
  }
}
