// Weights with few values in each window of 16 columns, times tokens. Lanes are rows of the weight:
// each takes the value of its own column from the window of a token by a permutation, so that one
// load of X and one multiply-add serve 16 rows. Included after spmm-inl.h and vectors-inl.h.

constexpr int kNmParts = kRowGroup / kLanes;
constexpr int64_t kNmChunk = 16;  // windows whose weights stay in the first-level cache
#if defined(__AVX512F__)
constexpr int kNmGroups = 2, kNmTokens = 8;
#else
constexpr int kNmGroups = 1, kNmTokens = 4;
#endif

// The picks of 16 rows as numbers: of a slot in float32, of slot s of a pair in bfloat16.
struct NmLanes {
  alignas(64) int32_t of[kRowGroup];
};
inline NmLanes single_lanes(uint64_t picks) {
  NmLanes lanes;
  for (int r = 0; r < kRowGroup; ++r) lanes.of[r] = picks >> (32 * (r % 2) + 4 * (r / 2)) & 15;
  return lanes;
}
inline NmLanes pair_lanes(const uint64_t* picks, int s) {
  NmLanes lanes;
  for (int r = 0; r < kRowGroup; ++r)
    lanes.of[r] = picks[r % 4 / 2] >> (32 * (r % 2) + 16 * s + 4 * (r / 4)) & 15;
  return lanes;
}

// Lanes of a window that 16 rows pick.
#if defined(__AVX512F__)
using NmPicks = __m512i;
inline NmPicks picks_of(const NmLanes& lanes) { return _mm512_load_si512(lanes.of); }
inline Vec picked(const float* window, NmPicks picks, int) {
  return _mm512_permutexvar_ps(picks, load(window));
}
#elif defined(__AVX2__)
struct NmPicks {
  __m256i lanes[2];
};
inline NmPicks picks_of(const NmLanes& lanes) {
  const auto* from = reinterpret_cast<const __m256i*>(lanes.of);
  return {{_mm256_load_si256(from), _mm256_load_si256(from + 1)}};
}
inline Vec picked(const float* window, const NmPicks& picks, int part) {
  const __m256i lanes = picks.lanes[part];
  const Vec low = _mm256_permutevar8x32_ps(load(window), lanes);
  const Vec high = _mm256_permutevar8x32_ps(load(window + kLanes), lanes);
  return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(lanes, 28)));
}
#else
using NmPicks = NmLanes;
inline const NmPicks& picks_of(const NmLanes& lanes) { return lanes; }
inline Vec picked(const float* window, const NmPicks& picks, int part) {
  float lane[kLanes];
  for (int i = 0; i < kLanes; ++i) lane[i] = window[picks.of[part * kLanes + i]];
  return load(lane);
}
#endif

// The values and picks of a slot of a float32 weight, of half a pair of a bfloat16 one.
struct NmSingle {
  using Value = float;
  using X = float;
  static NmPicks picks(const uint64_t* from, int64_t slot) {
#if defined(__AVX512F__)
    const __m512i shifts =
        _mm512_setr_epi32(0, 0, 4, 4, 8, 8, 12, 12, 16, 16, 20, 20, 24, 24, 28, 28);
    return _mm512_srlv_epi32(_mm512_set1_epi64(static_cast<int64_t>(from[slot])), shifts);
#else
    return picks_of(single_lanes(from[slot]));
#endif
  }
  static Vec values(const float* from, int64_t slot, int part) {
    return load(from + slot * kRowGroup + part * kLanes);
  }
  static float value(const float* from, int64_t slot, int64_t row) {
    return from[slot * kRowGroup + row];
  }
  static int64_t pick(const uint64_t* from, int64_t slot, int64_t row) {
    return static_cast<int64_t>(from[slot] >> (32 * (row % 2) + 4 * (row / 2)) & 15);
  }
  static float seen(float x) { return x; }
  static void put(float* to, Vec x) { store(to, x); }
};

struct NmHalf {
  using Value = uint16_t;
  using X = float;
  static NmPicks picks(const uint64_t* from, int64_t slot) {
    return picks_of(pair_lanes(from + slot / 2 * 2, static_cast<int>(slot % 2)));
  }
  static Vec values(const uint16_t* from, int64_t slot, int part) {
    float rows[kLanes];
    const uint16_t* at = from + slot / 2 * 2 * kRowGroup + slot % 2 + part * kLanes * 2;
    for (int i = 0; i < kLanes; ++i) rows[i] = widen(at[2 * i]);
    return load(rows);
  }
  static float value(const uint16_t* from, int64_t slot, int64_t row) {
    return widen(from[(slot / 2 * kRowGroup + row) * 2 + slot % 2]);
  }
  static int64_t pick(const uint64_t* from, int64_t slot, int64_t row) {
    const int64_t bit = 32 * (row % 2) + 16 * (slot % 2) + 4 * (row / 4);
    return static_cast<int64_t>(from[slot / 2 * 2 + row % 4 / 2] >> bit & 15);
  }
  static float seen(float x) {
    round_to_bf16(&x, 1);
    return x;
  }
  static void put(float* to, Vec x) {
    store(to, x);
    round_to_bf16(to, kLanes);
  }
};

// Where a window of a group begins.
template <class Kind>
inline const typename Kind::Value* nm_values(const NmWeight& w, int64_t group, int64_t window) {
  return static_cast<const typename Kind::Value*>(w.values) +
         (group * w.windows + window) * w.slots * kRowGroup;
}
inline const uint64_t* nm_picks(const NmWeight& w, int64_t group, int64_t window) {
  return w.picks + (group * w.windows + window) * w.slots;
}

// out [T tokens][64] (+)= G groups of rows times T tokens, over windows [begin, end). The order of
// a sum depends on neither G nor T.
template <class Kind, int G, int T>
inline void nm_rows(const NmWeight& w, int64_t group, int64_t begin, int64_t end, const float* x,
                    int64_t pitch, float* out) {
  Vec acc[G][T][kNmParts];
#pragma GCC unroll 16
  for (int g = 0; g < G; ++g)
#pragma GCC unroll 16
    for (int t = 0; t < T; ++t)
#pragma GCC unroll 16
      for (int i = 0; i < kNmParts; ++i)
        acc[g][t][i] = begin == 0 ? zero() : load(out + t * kTileRows + g * kRowGroup + i * kLanes);
  for (int64_t window = begin; window < end; ++window)
    for (int64_t s = 0; s < w.slots; ++s) {
      NmPicks picks[G];
      Vec values[G][kNmParts];
#pragma GCC unroll 16
      for (int g = 0; g < G; ++g) {
        picks[g] = Kind::picks(nm_picks(w, group + g, window), s);
#pragma GCC unroll 16
        for (int i = 0; i < kNmParts; ++i)
          values[g][i] = Kind::values(nm_values<Kind>(w, group + g, window), s, i);
      }
#pragma GCC unroll 16
      for (int t = 0; t < T; ++t)
#pragma GCC unroll 16
        for (int g = 0; g < G; ++g)
#pragma GCC unroll 16
          for (int i = 0; i < kNmParts; ++i)
            acc[g][t][i] = fma(values[g][i],
                               picked(x + t * pitch + window * kWindow, picks[g], i), acc[g][t][i]);
    }
#pragma GCC unroll 16
  for (int g = 0; g < G; ++g)
#pragma GCC unroll 16
    for (int t = 0; t < T; ++t)
#pragma GCC unroll 16
      for (int i = 0; i < kNmParts; ++i)
        store(out + t * kTileRows + g * kRowGroup + i * kLanes, acc[g][t][i]);
}

#if defined(PRUNUS_PAIRS)
// The same in bfloat16 by dot products of pairs; x holds bfloat16.
struct NmPair : NmHalf {
  using X = uint16_t;
  static void put(uint16_t* to, Vec x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), (__m256i)_mm512_cvtneps_pbh(x));
  }
};

template <class Kind, int G, int T>
inline void nm_rows(const NmWeight& w, int64_t group, int64_t begin, int64_t end,
                    const uint16_t* x, int64_t pitch, float* out) {
  const __m512i shifts = _mm512_set_epi64(0x000C000C000C000C, 0x000C000C000C000C,
                                          0x0008000800080008, 0x0008000800080008,
                                          0x0004000400040004, 0x0004000400040004, 0, 0);
  Vec acc[G][T];
#pragma GCC unroll 16
  for (int g = 0; g < G; ++g)
#pragma GCC unroll 16
    for (int t = 0; t < T; ++t)
      acc[g][t] = begin == 0 ? zero() : load(out + t * kTileRows + g * kRowGroup);
  for (int64_t window = begin; window < end; ++window)
    for (int64_t s = 0; s < w.slots; s += 2) {
      __m512i picks[G], values[G];
#pragma GCC unroll 16
      for (int g = 0; g < G; ++g) {
        const auto* from =
            reinterpret_cast<const __m128i*>(nm_picks(w, group + g, window) + s);
        picks[g] = _mm512_srlv_epi16(_mm512_broadcast_i32x4(_mm_loadu_si128(from)), shifts);
        values[g] =
            _mm512_loadu_si512(nm_values<Kind>(w, group + g, window) + s * kRowGroup);
      }
#pragma GCC unroll 16
      for (int t = 0; t < T; ++t) {
        const auto* at = reinterpret_cast<const __m256i*>(x + t * pitch + window * kWindow);
        // The window twice: the fifth bit of a pick, its neighbour's, does not matter.
        const __m512i twice = _mm512_broadcast_i64x4(_mm256_loadu_si256(at));
#pragma GCC unroll 16
        for (int g = 0; g < G; ++g)
          acc[g][t] = _mm512_dpbf16_ps(acc[g][t], (__m512bh)values[g],
                                       (__m512bh)_mm512_permutexvar_epi16(picks[g], twice));
      }
    }
#pragma GCC unroll 16
  for (int g = 0; g < G; ++g)
#pragma GCC unroll 16
    for (int t = 0; t < T; ++t) store(out + t * kTileRows + g * kRowGroup, acc[g][t]);
}
#endif

// A token of the panel, zeros behind its last column. False, and all zeros, unless every value is
// finite, in bfloat16, too: times the zeros of empty slots, others would be NaN.
template <class Kind>
inline bool nm_gather(const float* from, int64_t cols, int64_t pitch, typename Kind::X* to) {
  const Vec slack = broadcast(1.01f);
  Vec check = zero();
  for (int64_t c = 0; c < pitch; c += kLanes) {
    const Vec x = c + kLanes <= cols ? load(from + c)
                  : c < cols         ? load_n(from + c, cols - c)
                                     : zero();
    const Vec more = mul(x, slack);
    check = add(check, sub(more, more));
    Kind::put(to + c, x);
  }
  float lanes[kLanes];
  store(lanes, check);
  bool finite = true;
  for (float lane : lanes) finite = finite && lane == 0.0f;
  for (int64_t c = 0; c < pitch && !finite; c += kLanes) Kind::put(to + c, zero());
  return finite;
}

// Stored weights only, one after the other: for tokens with NaN or infinity.
template <class Kind>
inline void nm_exactly(const NmWeight& w, int64_t group, const float* x, float* out) {
  for (int64_t r = 0; r < kRowGroup; ++r) out[r] = 0.0f;
  for (int64_t window = 0; window < w.windows; ++window)
    for (int64_t s = 0; s < w.slots; ++s)
      for (int64_t r = 0; r < kRowGroup; ++r) {
        const float value = Kind::value(nm_values<Kind>(w, group, window), s, r);
        if (value == 0.0f) continue;
        const int64_t column = Kind::pick(nm_picks(w, group, window), s, r);
        out[r] += value * Kind::seen(x[window * kWindow + column]);
      }
}

template <class Kind, int T>
inline int64_t nm_tokens(const NmWeight& w, int64_t group, bool both, int64_t begin, int64_t end,
                         const typename Kind::X* x, int64_t pitch, int64_t from, int64_t count,
                         float* sums) {
  for (; from + T <= count; from += T) {
    float* out = sums + from * kTileRows;
    if (both) {
      nm_rows<Kind, kNmGroups, T>(w, group, begin, end, x + from * pitch, pitch, out);
    } else {
      nm_rows<Kind, 1, T>(w, group, begin, end, x + from * pitch, pitch, out);
    }
  }
  return from;
}

// sums [count tokens][64] = the groups [begin, end), four at most, times the panel.
template <class Kind>
inline void nm_sums(const NmWeight& w, int64_t begin, int64_t end, const typename Kind::X* x,
                    int64_t count, float* sums) {
  const int64_t pitch = nm_pitch(w);
  for (int64_t group = begin; group < end; group += kNmGroups) {
    const bool both = group + kNmGroups <= end;
    float* out = sums + (group - begin) * kRowGroup;
    int64_t window = 0;
    do {
      const int64_t stop = smaller(window + kNmChunk, w.windows);
      int64_t at =
          nm_tokens<Kind, kNmTokens>(w, group, both, window, stop, x, pitch, 0, count, out);
      if constexpr (kNmTokens > 4)
        at = nm_tokens<Kind, 4>(w, group, both, window, stop, x, pitch, at, count, out);
      at = nm_tokens<Kind, 2>(w, group, both, window, stop, x, pitch, at, count, out);
      nm_tokens<Kind, 1>(w, group, both, window, stop, x, pitch, at, count, out);
      window = stop;
    } while (window < w.windows);
  }
}

// begin_row and end_row of the task count groups.
template <class Kind>
inline void nm_product(const Task& task) {
  const NmWeight& w = *task.nm;
  const int64_t pitch = nm_pitch(w);
  auto* panel = reinterpret_cast<typename Kind::X*>(task.workspace);
  float* sums = task.workspace + pitch * task.panel;
  float* odd = sums + kTileRows * task.panel;
  for (int64_t p = task.begin_panel; p <= task.end_panel; ++p) {
    const int64_t top = p == task.begin_panel ? task.begin_row : 0;
    const int64_t bottom = p == task.end_panel ? task.end_row : w.groups;
    const int64_t first = p * task.panel, count = smaller(task.panel, task.n - first);
    if (top >= bottom || count <= 0) continue;
    for (int64_t t = 0; t < count; ++t)
      odd[t] = nm_gather<Kind>(task.x + (first + t) * task.ldx, w.cols, pitch, panel + t * pitch)
                   ? 0.0f
                   : 1.0f;
    for (int64_t g = top; g < bottom; g += kTileRows / kRowGroup) {
      const int64_t stop = smaller(smaller(g + kTileRows / kRowGroup, bottom), w.groups);
      nm_sums<Kind>(w, g, stop, panel, count, sums);
      const int64_t row = g * kRowGroup, end = smaller(stop * kRowGroup, w.rows);
      for (int64_t t = 0; t < count; ++t) {
        float* own = sums + t * kTileRows;
        for (int64_t i = g; odd[t] != 0.0f && i < stop; ++i)
          nm_exactly<Kind>(w, i, task.x + (first + t) * task.ldx, own + (i - g) * kRowGroup);
        for (int64_t r = row; r < end; r += kLanes) {
          const int64_t width = smaller(kLanes, end - r);
          const Vec bias = task.bias ? load_n(task.bias + r, width) : zero();
          write(task, (first + t) * task.ldy + r, load(own + r - row), bias, width);
        }
      }
    }
  }
}
