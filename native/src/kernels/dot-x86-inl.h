// Sparse dot product for x86: four elements of x by loads and inserts, which beat the gather
// instruction (0.18 against 0.29 ns per non-zero on Zen 5, where x lies in the first-level cache).

struct Partial {
  __m128 lanes[4];
};

inline __m128 load_four(const float* x, const uint16_t* columns) {
  const auto index = static_cast<uint64_t>(
      _mm_cvtsi128_si64(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(columns))));
  __m128 v = _mm_load_ss(x + (index & 0xFFFF));
  v = _mm_insert_ps(v, _mm_load_ss(x + (index >> 16 & 0xFFFF)), 0x10);
  v = _mm_insert_ps(v, _mm_load_ss(x + (index >> 32 & 0xFFFF)), 0x20);
  return _mm_insert_ps(v, _mm_load_ss(x + (index >> 48)), 0x30);
}

inline void dot(const float* values, const uint16_t* columns, uint32_t begin, uint32_t end,
                const float* x, Partial& partial) {
  __m128(&lanes)[4] = partial.lanes;
  uint32_t i = begin;
  for (; i + 16 <= end; i += 16) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const __m128 weight = _mm_loadu_ps(values + i + 4 * j);
      lanes[j] = _mm_fmadd_ps(weight, load_four(x, columns + i + 4 * j), lanes[j]);
    }
  }
  for (; i + 4 <= end; i += 4)
    lanes[0] = _mm_fmadd_ps(_mm_loadu_ps(values + i), load_four(x, columns + i), lanes[0]);
  for (; i < end; ++i)
    lanes[1] = _mm_fmadd_ps(_mm_load_ss(values + i), _mm_load_ss(x + columns[i]), lanes[1]);
}

inline float total(const Partial& partial) {
  const __m128(&lanes)[4] = partial.lanes;
  const __m128 pair = _mm_add_ps(_mm_add_ps(lanes[0], lanes[1]), _mm_add_ps(lanes[2], lanes[3]));
  const __m128 one = _mm_add_ps(pair, _mm_movehl_ps(pair, pair));
  return _mm_cvtss_f32(_mm_add_ss(one, _mm_movehdup_ps(one)));
}
