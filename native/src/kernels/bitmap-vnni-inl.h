// Bitmap-packed int8 weight times a few columns with VBMI2 and VNNI. A column of X becomes 16-bit
// integers q with one scale; 256 h + l = q + 32768 are two unsigned bytes, so that two instructions
// multiply 64 weights exactly, and sum w q = 256 (sum w h - 128 sum w) + sum w l.

constexpr int64_t kMostIntegers = 32767;
constexpr float kLeastPeak = 1e-30f;  // of a column of X that integers can stand for

// sum + the products of four unsigned bytes of x with four signed ones of w, in each lane. Written
// out, as GCC 12 copies the sums around its intrinsic.
inline __m512i dot_bytes(__m512i sum, const uint32_t* x, __m512i w) {
  const __m512i four = _mm512_set1_epi32(static_cast<int>(*x));
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(four), "v"(w));
  return sum;
}

inline __m512i spread_bytes(const int8_t* from, uint64_t mask) {
  return _mm512_mask_expand_epi8(none(), mask, apart(_mm512_loadu_si512(from)));
}

// high[j] = start + sum w h and low[j] = sum w l of column j, with integers that quantise made.
template <int N>
inline void multiply_bytes(const uint64_t* masks, int64_t quads, const int8_t* values,
                           const uint32_t* x, __m512i start, __m512i (&high)[N],
                           __m512i (&low)[N]) {
  constexpr int kChains = N <= 3 ? 2 : 1;
  __m512i highs[kChains][N], lows[kChains][N];
  for (int chain = 0; chain < kChains; ++chain)
    for (int j = 0; j < N; ++j) {
      highs[chain][j] = chain == 0 ? start : _mm512_setzero_si512();
      lows[chain][j] = _mm512_setzero_si512();
    }
  int64_t q = 0;
  for (; q + kChains <= quads; q += kChains)
#pragma GCC unroll 2
    for (int chain = 0; chain < kChains; ++chain, x += 2 * N) {
      const __m512i w = spread_bytes(values, masks[q + chain]);
      values += count_bits(masks[q + chain]);
#pragma GCC unroll 16
      for (int j = 0; j < N; ++j) {
        highs[chain][j] = dot_bytes(highs[chain][j], x + 2 * j, w);
        lows[chain][j] = dot_bytes(lows[chain][j], x + 2 * j + 1, w);
      }
    }
  const __m512i rest = q < quads ? spread_bytes(values, masks[q]) : _mm512_setzero_si512();
#pragma GCC unroll 16
  for (int j = 0; j < N; ++j) {
    __m512i last_high = highs[kChains - 1][j], last_low = lows[kChains - 1][j];
    if (kChains == 2 && q < quads) {
      last_high = dot_bytes(last_high, x + 2 * j, rest);
      last_low = dot_bytes(last_low, x + 2 * j + 1, rest);
    }
    high[j] = kChains == 2 ? _mm512_add_epi32(highs[0][j], last_high) : last_high;
    low[j] = kChains == 2 ? _mm512_add_epi32(lows[0][j], last_low) : last_low;
  }
}

// The largest magnitude of a column as the bits of a float; at least those of infinity if the
// column holds infinity or NaN.
inline uint32_t peak_bits(const float* x, int64_t count) {
  const __m512i sign = _mm512_set1_epi32(INT32_MIN);
  __m512i most = _mm512_setzero_si512();
  for (int64_t c = 0; c < count; c += kLanes)
    most = _mm512_max_epu32(
        most, _mm512_andnot_si512(sign, _mm512_castps_si512(load_n(x + c, count - c))));
  return _mm512_reduce_max_epu32(most);
}

// Four columns of X as two times four bytes at to[0], [stride], ...; the scale it was divided by.
// False where integers cannot stand for the column.
inline bool quantise(const float* x, int64_t cols, int64_t quads, int64_t stride, uint32_t* to,
                     float* scale) {
  const uint32_t bits = peak_bits(x, cols);
  float peak;
  memcpy(&peak, &bits, sizeof peak);
  if (bits >= 0x7F800000u || (bits != 0 && peak < kLeastPeak)) return false;
  *scale = peak / kMostIntegers;
  const __m512 inverse = _mm512_set1_ps(bits == 0 ? 0.0f : kMostIntegers / peak);
  for (int64_t q = 0; q < quads; q += 4) {
    const Vec v = load_n(x + q * kQuad, cols - q * kQuad);
    const __m512i shifted =
        _mm512_add_epi32(_mm512_cvtps_epi32(_mm512_mul_ps(v, inverse)), _mm512_set1_epi32(32768));
    const __m128i high = _mm512_cvtepi32_epi8(_mm512_srli_epi32(shifted, 8));
    const __m128i low = _mm512_cvtepi32_epi8(shifted);
    const __m128i pairs[2] = {_mm_unpacklo_epi32(high, low), _mm_unpackhi_epi32(high, low)};
    uint64_t words[4];
    memcpy(words, pairs, sizeof words);
    for (int64_t i = 0; i < 4 && q + i < quads; ++i)
      memcpy(to + (q + i) * stride, words + i, sizeof words[i]);
  }
  return true;
}

template <int N>
void multiply_integers(const Task& task, Groups groups, int64_t first, const float* scales) {
  const BitmapWeight& w = *task.bitmap;
  const auto* x = reinterpret_cast<const uint32_t*>(task.workspace);
  for (int64_t g = groups.begin; g < groups.end; ++g) {
    const __m512i sums = _mm512_loadu_si512(w.sums + g * kRowGroup);
    const __m512i start = _mm512_mullo_epi32(sums, _mm512_set1_epi32(-128));
    __m512i high[N], low[N];
    multiply_bytes<N>(w.masks + g * w.quads, w.quads,
                      static_cast<const int8_t*>(w.values) + w.offsets[g], x, start, high, low);
    for (int64_t j = 0; j < N; ++j) {
      const __m512 whole = fma(_mm512_cvtepi32_ps(high[j]), broadcast(256.0f),
                               _mm512_cvtepi32_ps(low[j]));
      write_rows(task, g * kRowGroup, first + j, {{mul(whole, broadcast(scales[j]))}});
    }
  }
}

template <int N = kMostColumns>
void multiply_integers_of(const Task& task, Groups groups, int64_t first, int64_t count,
                          const float* scales) {
  if (count == N) return multiply_integers<N>(task, groups, first, scales);
  if constexpr (N > 1) multiply_integers_of<N - 1>(task, groups, first, count, scales);
}

void bitmap_i8(const Task& task) {
  const BitmapWeight& w = *task.bitmap;
  each_piece(task, kMostColumns, [&](Groups groups, int64_t first, int64_t count) {
    auto* to = reinterpret_cast<uint32_t*>(task.workspace);
    float scales[kMostColumns];
    bool finite = true;
    for (int64_t j = 0; finite && j < count; ++j)
      finite = quantise(task.x + (first + j) * task.ldx, w.cols, w.quads, 2 * count, to + 2 * j,
                        scales + j);
    if (finite) return multiply_integers_of(task, groups, first, count, scales);
    for (int64_t j = 0; j < count; ++j) multiply_exactly<int8_t>(task, groups, first + j);
  });
}
