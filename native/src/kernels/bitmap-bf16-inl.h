// Bitmap-packed bfloat16 weight times two columns or more with VBMI2 and AVX512_BF16: X is rounded
// to bfloat16, and one instruction multiplies 16 rows by two neighbouring columns. Sums are float32.
// After bitmap-vnni-inl.h.

constexpr int kLeastHalves = 2;     // columns at a time, so that one sums as many do
constexpr float kLargestHalf = 3.38e38f;  // of float32 that rounds to a finite bfloat16

// Of two vectors of 16 halves side by side: lane r holds r of the first and r of the second.
inline __m512i side_by_side(__m512i halves) {
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24,
                                         8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return _mm512_permutexvar_epi16(order, halves);
}

// sum += the products of two halves of x with two of w, in each lane. Written out, so that x stays
// an operand in memory.
inline void dot_pair(Vec& sum, const uint32_t* x, __m512i w) {
  asm("vdpbf16ps %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(w), "m"(*x));
}

// sums[j] = 16 rows times column j; x as gather_halves leaves it, `N` columns wide. The order of
// additions is the same for every N.
template <int N>
inline void multiply_pairs(const uint64_t* masks, int64_t quads, const uint16_t* values,
                           const uint32_t* x, Tile (&sums)[N]) {
  Vec even[N], odd[N];
  for (int j = 0; j < N; ++j) even[j] = odd[j] = zero();
  for (int64_t q = 0; q < quads; ++q, x += 2 * N) {
    const uint64_t mask = masks[q];
    const __m512i first = side_by_side(spread_halves(values, static_cast<uint32_t>(mask)));
    const __m512i second = side_by_side(
        spread_halves(values + count_bits(mask << 32), static_cast<uint32_t>(mask >> 32)));
    values += count_bits(mask);
#pragma GCC unroll 16
    for (int j = 0; j < N; ++j) dot_pair(even[j], x + j, first);
#pragma GCC unroll 16
    for (int j = 0; j < N; ++j) dot_pair(odd[j], x + N + j, second);
  }
  for (int j = 0; j < N; ++j) sums[j].part[0] = add(even[j], odd[j]);
}

// Columns [first, first + count) of X as [cols / 2, width] pairs in `to`, zeros beyond count and up
// to whole quads. The bits that are set stand for columns that halves cannot hold: NaN, infinity
// and what rounds to it, or nothing but values whose products the instruction takes for zero.
inline uint32_t gather_halves(const Task& task, int64_t first, int64_t count, int64_t width,
                              uint32_t* to) {
  const int64_t cols = task.bitmap->cols, end = kQuad * task.bitmap->quads;
  const float* x = task.x + first * task.ldx;
  const __m512i sign = _mm512_set1_epi32(INT32_MIN);
  __m512i most = _mm512_setzero_si512();
  for (int64_t c = 0; c < end; c += kLanes) {
    const int64_t left = cols - c < kLanes ? cols - c : kLanes;
    Vec block[kLanes];
    for (int64_t j = 0; j < kLanes; ++j)
      block[j] = j < count ? load_n(x + j * task.ldx + c, left) : zero();
    transpose(block);
    for (const Vec v : block)
      most = _mm512_max_epu32(most, _mm512_andnot_si512(sign, _mm512_castps_si512(v)));
    // Each store runs over into what the next one writes.
    for (int64_t i = 0; i < kLanes && c + i < end; i += 2) {
      const __m512bh halves = _mm512_cvtne2ps_pbh(block[i + 1], block[i]);
      _mm512_storeu_si512(to + (c + i) / 2 * width, side_by_side((__m512i)halves));
    }
  }
  const __m512i largest = _mm512_castps_si512(broadcast(kLargestHalf));
  const __m512i least = _mm512_castps_si512(broadcast(kLeastPeak));
  const __mmask16 small = _mm512_cmplt_epu32_mask(most, least);
  return _mm512_cmpgt_epu32_mask(most, largest) |
         (small & _mm512_test_epi32_mask(most, most));
}

template <int N = kMostColumns>
void multiply_halves(const Task& task, Groups groups, int64_t first, int64_t count, int64_t width,
                     uint32_t skipped) {
  if (width == N) {
    const BitmapWeight& w = *task.bitmap;
    for (int64_t g = groups.begin; g < groups.end; ++g) {
      Tile sums[N];
      multiply_pairs<N>(w.masks + g * w.quads, w.quads,
                        static_cast<const uint16_t*>(w.values) + w.offsets[g],
                        reinterpret_cast<const uint32_t*>(task.workspace), sums);
      for (int64_t j = 0; j < count; ++j)
        if ((skipped >> j & 1) == 0) write_rows(task, g * kRowGroup, first + j, sums[j]);
    }
    return;
  }
  if constexpr (N > kLeastHalves) multiply_halves<N - 1>(task, groups, first, count, width, skipped);
}

void bitmap_bf16(const Task& task) {
  if (task.n == 1) return multiply_bitmap<uint16_t>(task);  // reading the weight takes the time
  each_piece(task, kMostColumns, [&](Groups groups, int64_t first, int64_t count) {
    const int64_t width = count < kLeastHalves ? kLeastHalves : count;
    auto* to = reinterpret_cast<uint32_t*>(task.workspace);
    const uint32_t skipped = gather_halves(task, first, count, width, to);
    multiply_halves(task, groups, first, count, width, skipped);
    for (int64_t j = 0; j < count; ++j)
      if ((skipped >> j & 1) != 0) multiply_exactly<uint16_t>(task, groups, first + j);
  });
}
