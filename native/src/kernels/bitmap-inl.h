// Bitmap-packed weight times a few columns, for any instruction set. Values are spread to 16 rows
// at a time, and each spread column serves all columns of X that are at hand. After epilogue-inl.h.

#include <string.h>

struct Tile {
  Vec part[kRowGroup / kLanes];
};

// Columns of X at a time, so that the sums stay in registers.
constexpr int kMostColumns = kLanes == 16 ? kBitmapPanel : 4;
static_assert(kMostColumns <= kLanes, "columns of X are transposed in one block");

inline int64_t count_bits(uint64_t mask) {
#if defined(__POPCNT__)
  return __builtin_popcountll(mask);
#else  // without the instruction it would be a call into the compiler's library
  mask -= mask >> 1 & 0x5555555555555555u;
  mask = (mask & 0x3333333333333333u) + (mask >> 2 & 0x3333333333333333u);
  mask = (mask + (mask >> 4)) & 0x0F0F0F0F0F0F0F0Fu;
  return static_cast<int64_t>(mask * 0x0101010101010101u >> 56);
#endif
}

#include "kernels/widen-inl.h"

#if defined(__AVX512F__)
// A load of its own: as an operand of the expansion it is slower.
template <class V>
inline V apart(V v) {
  asm("" : "+v"(v));
  return v;
}
// Zeros to expand into. An expansion waits for what its register held before, on Zen 5, even where
// it keeps nothing of it: zeros made on the spot cost less.
inline __m512i none() {
  __m512i zeros = _mm512_setzero_si512();
  asm("" : "+v"(zeros));
  return zeros;
}
template <bool Fresh>
inline Tile spread(const float* from, uint64_t mask) {
  const auto lanes = static_cast<__mmask16>(mask);
  const Vec values = apart(_mm512_loadu_ps(from));
  if (Fresh) return {{_mm512_mask_expand_ps(_mm512_castsi512_ps(none()), lanes, values)}};
  return {{_mm512_maskz_expand_ps(lanes, values)}};
}
template <bool Fresh>
inline Tile spread(const uint16_t* from, uint64_t mask) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  const __m512i wide = _mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16);
  return {{_mm512_castsi512_ps(_mm512_maskz_expand_epi32(static_cast<__mmask16>(mask), wide))}};
}
#elif defined(__AVX2__)
// For each mask of 8 bits: which value goes to which lane; -1 for none.
struct Lanes {
  int32_t of[256][8];
  constexpr Lanes() : of{} {
    for (int mask = 0; mask < 256; ++mask)
      for (int lane = 0, next = 0; lane < 8; ++lane)
        of[mask][lane] = (mask >> lane & 1) != 0 ? next++ : -1;
  }
};
constexpr Lanes kPlaces;

inline __m256 spread_eight(__m256 values, uint64_t mask) {
  const __m256i lanes =
      _mm256_loadu_si256(reinterpret_cast<const __m256i*>(kPlaces.of[mask & 0xFF]));
  const __m256 none = _mm256_castsi256_ps(_mm256_srai_epi32(lanes, 31));
  return _mm256_andnot_ps(none, _mm256_permutevar8x32_ps(values, lanes));
}
inline __m256 eight(const float* from) { return _mm256_loadu_ps(from); }
inline __m256 eight(const uint16_t* from) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
template <bool Fresh, class T>
inline Tile spread(const T* from, uint64_t mask) {
  const T* second = from + count_bits(mask & 0xFF);
  return {{spread_eight(eight(from), mask), spread_eight(eight(second), mask >> 8)}};
}
#else
template <bool Fresh, class T>
inline Tile spread(const T* from, uint64_t mask) {
  float rows[kRowGroup];
  for (int64_t r = 0; r < kRowGroup; ++r) rows[r] = (mask >> r & 1) != 0 ? widen(*from++) : 0.0f;
  Tile tile;
  for (int64_t i = 0; i < kRowGroup / kLanes; ++i) tile.part[i] = load(rows + i * kLanes);
  return tile;
}
#endif

// The four columns of a quad. Fresh: where expansions would wait for each other, see none().
template <bool Fresh, class T>
inline void spread_quad(const T* from, uint64_t mask, Tile (&tiles)[kQuad]) {
  tiles[0] = spread<Fresh>(from, mask & 0xFFFF);
  tiles[1] = spread<Fresh>(from + count_bits(mask << 48), mask >> 16 & 0xFFFF);
  tiles[2] = spread<Fresh>(from + count_bits(mask << 32), mask >> 32 & 0xFFFF);
  tiles[3] = spread<Fresh>(from + count_bits(mask << 16), mask >> 48);
}
#if defined(__AVX512VBMI2__)
// Rows 0 to 15 of two neighbouring columns.
inline __m512i spread_halves(const uint16_t* from, uint32_t mask) {
  asm("" : "+r"(mask));  // a shift of the mask register takes longer than one of the number
  const auto places = static_cast<__mmask32>(mask);
  return _mm512_mask_expand_epi16(none(), places, apart(_mm512_loadu_si512(from)));
}
// Sixteen halves, from the first or the seventeenth on, as float32.
inline Vec widened(__m512i halves, bool second) {
  const __m512i step = _mm512_set1_epi32(0x10000);
  const __m512i from = _mm512_mullo_epi32(
      step, _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
  const __m512i order = second ? _mm512_add_epi32(from, _mm512_set1_epi32(16 << 16)) : from;
  return _mm512_castsi512_ps(_mm512_maskz_permutexvar_epi16(0xAAAAAAAA, order, halves));
}
template <bool Fresh>
inline void spread_quad(const uint16_t* from, uint64_t mask, Tile (&tiles)[kQuad]) {
  const __m512i first = spread_halves(from, static_cast<uint32_t>(mask));
  const __m512i second =
      spread_halves(from + count_bits(mask << 32), static_cast<uint32_t>(mask >> 32));
  tiles[0] = {{widened(first, false)}};
  tiles[1] = {{widened(first, true)}};
  tiles[2] = {{widened(second, false)}};
  tiles[3] = {{widened(second, true)}};
}
#endif
template <bool Fresh>
inline void spread_quad(const int8_t* from, uint64_t mask, Tile (&tiles)[kQuad]) {
  float rows[kQuad * kRowGroup] = {};
  for (; mask != 0; mask &= mask - 1) {
    const int bit = __builtin_ctzll(mask);
    rows[bit % kQuad * kRowGroup + bit / kQuad] = *from++;
  }
  for (int64_t c = 0; c < kQuad; ++c)
    for (int64_t i = 0; i < kRowGroup / kLanes; ++i)
      tiles[c].part[i] = load(rows + c * kRowGroup + i * kLanes);
}

// sums[j] = 16 rows times column j; x as gather_columns leaves it, `N` columns wide. The order of
// additions is the same for every N but 1.
template <int N, class T>
inline void multiply(const uint64_t* masks, int64_t quads, const T* values, const float* x,
                     Tile (&sums)[N]) {
  constexpr int kParts = kRowGroup / kLanes;
  constexpr int kChains = N == 1 ? 4 : kLanes == 16 ? 2 : 1;
  Tile chains[kChains][N];
  for (auto& chain : chains)
    for (Tile& tile : chain)
      for (Vec& part : tile.part) part = zero();
  for (int64_t q = 0; q < quads; ++q, x += kQuad * N) {
    Tile tiles[kQuad];
    spread_quad<N == 2>(values, masks[q], tiles);
    values += count_bits(masks[q]);
#pragma GCC unroll 4
    for (int c = 0; c < kQuad; ++c)
#pragma GCC unroll 16
      for (int j = 0; j < N; ++j) {
        const Vec column = broadcast(x[c * N + j]);
        Tile& sum = chains[c % kChains][j];
        for (int i = 0; i < kParts; ++i) sum.part[i] = fma(tiles[c].part[i], column, sum.part[i]);
      }
  }
  for (int j = 0; j < N; ++j)
    for (int i = 0; i < kParts; ++i) {
      Vec sum = chains[0][j].part[i];
      for (int chain = 1; chain < kChains; ++chain) sum = add(sum, chains[chain][j].part[i]);
      sums[j].part[i] = sum;
    }
}

// y[column, row ...] of up to 16 rows, their sums scaled where the weight has scales.
inline void write_rows(const Task& task, int64_t row, int64_t column, const Tile& sums) {
  const BitmapWeight& w = *task.bitmap;
  for (int64_t i = 0; i < kRowGroup / kLanes; ++i, row += kLanes) {
    const int64_t count = w.rows - row < kLanes ? w.rows - row : kLanes;
    if (count <= 0) return;
    const Vec bias = task.bias ? load_n(task.bias + row, count) : zero();
    const Vec sum = w.scales ? mul(sums.part[i], load_n(w.scales + row, count)) : sums.part[i];
    write(task, column * task.ldy + row, sum, bias, count);
  }
}

// Columns [first, first + count) of X as [cols, width] in `to`, zeros beyond count and up to whole
// quads. False if a value is NaN or infinite: those may meet stored weights only.
inline bool gather_columns(const Task& task, int64_t first, int64_t count, int64_t width,
                           float* to) {
  const int64_t cols = task.bitmap->cols, end = kQuad * task.bitmap->quads;
  const float* x = task.x + first * task.ldx;
  Vec check = zero();
  for (int64_t c = 0; c < end; c += kLanes) {
    const int64_t left = cols - c < kLanes ? cols - c : kLanes;
    Vec block[kLanes];
    for (int64_t j = 0; j < kLanes; ++j) {
      block[j] = j < count ? load_n(x + j * task.ldx + c, left) : zero();
      if (j < count) check = add(check, sub(block[j], block[j]));
    }
    if (width == 1) {
      store(to + c, block[0]);
      continue;
    }
    transpose(block);
    // Each store runs over into what the next one writes.
    for (int64_t i = 0; i < kLanes && c + i < end; ++i) store(to + (c + i) * width, block[i]);
  }
  float lanes[kLanes];
  store(lanes, check);
  for (float lane : lanes)
    if (!(lane == 0.0f)) return false;
  return true;
}

// Rows that the share has in this panel, in groups of 16.
struct Groups {
  int64_t begin, end;
  Groups(const Task& task, int64_t panel)
      : begin(panel == task.begin_panel ? task.begin_row / kRowGroup : 0),
        end(panel == task.end_panel ? (task.end_row + kRowGroup - 1) / kRowGroup
                                    : task.bitmap->groups) {}
};

template <int N, class T>
void multiply_columns(const Task& task, Groups groups, int64_t first, int64_t count) {
  const BitmapWeight& w = *task.bitmap;
  for (int64_t g = groups.begin; g < groups.end; ++g) {
    Tile sums[N];
    multiply<N>(w.masks + g * w.quads, w.quads, static_cast<const T*>(w.values) + w.offsets[g],
                task.workspace, sums);
    for (int64_t j = 0; j < count; ++j) write_rows(task, g * kRowGroup, first + j, sums[j]);
  }
}

// Stored weights only, one after the other: for columns with NaN or infinity.
template <class T>
void multiply_exactly(const Task& task, Groups groups, int64_t column) {
  const BitmapWeight& w = *task.bitmap;
  const float* x = task.x + column * task.ldx;
  for (int64_t g = groups.begin; g < groups.end; ++g) {
    const T* values = static_cast<const T*>(w.values) + w.offsets[g];
    float sums[kRowGroup] = {};
    for (int64_t q = 0; q < w.quads; ++q)
      for (uint64_t mask = w.masks[g * w.quads + q]; mask != 0; mask &= mask - 1) {
        const int bit = __builtin_ctzll(mask);
        const int64_t row = sizeof(T) == 1 ? bit / kQuad : bit % kRowGroup;
        const int64_t c = sizeof(T) == 1 ? bit % kQuad : bit / kRowGroup;
        sums[row] += widen(*values++) * x[q * kQuad + c];
      }
    Tile tile;
    for (int64_t i = 0; i < kRowGroup / kLanes; ++i) tile.part[i] = load(sums + i * kLanes);
    write_rows(task, g * kRowGroup, column, tile);
  }
}

template <class T, int N = kMostColumns>
void multiply_width(const Task& task, Groups groups, int64_t first, int64_t count, int64_t width) {
  if (width == N) return multiply_columns<N, T>(task, groups, first, count);
  if constexpr (N > 1) multiply_width<T, N - 1>(task, groups, first, count, width);
}

// Calls part(groups, first column, columns) for pieces of equal size of each panel of the share.
template <class Part>
inline void each_piece(const Task& task, int64_t most, Part part) {
  for (int64_t panel = task.begin_panel; panel <= task.end_panel; ++panel) {
    const Groups groups(task, panel);
    const int64_t begin = panel * task.panel;
    const int64_t end = begin + task.panel < task.n ? begin + task.panel : task.n;
    if (groups.begin >= groups.end || begin >= end) continue;
    const int64_t pieces = (end - begin + most - 1) / most;
    const int64_t size = (end - begin + pieces - 1) / pieces;
    for (int64_t first = begin; first < end; first += size)
      part(groups, first, first + size < end ? size : end - first);
  }
}

template <class T>
void multiply_bitmap(const Task& task) {
  each_piece(task, kMostColumns, [&](Groups groups, int64_t first, int64_t count) {
    const int64_t width = task.n > 1 && count == 1 ? 2 : count;
    if (gather_columns(task, first, count, width, task.workspace))
      return multiply_width<T>(task, groups, first, count, width);
    for (int64_t j = 0; j < count; ++j) multiply_exactly<T>(task, groups, first + j);
  });
}
