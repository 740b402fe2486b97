// Attention, a block of queries of one head at a time. The lanes are queries: scores lie as
// [keys][queries], so that the softmax needs no sum across lanes, q and the output are turned over
// in registers, and k and v are read where they are. Keys pass in blocks; the running maximum
// corrects what was summed before (Milakov and Gimelshein, 2018, arXiv 1805.02867).

constexpr int kQuerySets = kLanes == 8 ? 2 : 4;
constexpr int64_t kQueries = int64_t{kQuerySets} * kLanes;
constexpr int kHeldRows = 6;
constexpr float kLeastScore = -3.402823466e38f;
static_assert(kQueries <= kMostQueries, "the workspace holds this many");

// What one block of queries works on; rows of kQueries floats each.
struct HeadBlock {
  const float *q, *k, *v;
  int64_t ldk, ldv, dim, value_dim;
  int64_t queries;      // of this block
  float* turned;        // scale q [dim]
  float* scores;        // [kKeyBlock]
  float* bias;          // [kKeyBlock]
  float* sums;          // the output [value_dim], not yet divided
  float* most;          // largest score of each query so far
  float* total;         // sum of its exponentials
  float* correction;    // what a new maximum multiplies earlier sums by
  float* mask_rows;     // [kLanes][kKeyBlock]
  float* triangle;      // minus infinity, then zeros: shifted, a causal mask
};

template <int R, int V>
inline void score_rows(const HeadBlock& b, const float* k, float* to) {
  Vec sums[R][V];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) sums[r][v] = zero();
  for (int64_t d = 0; d < b.dim; ++d) {
    Vec q[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) q[v] = load(b.turned + d * kQueries + v * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const Vec one = broadcast(k[r * b.ldk + d]);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sums[r][v] = fma(one, q[v], sums[r][v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) store(to + r * kQueries + v * kLanes, sums[r][v]);
}

// sums[R rows from d] = correction sums + v^T scores.
template <int R, int V>
inline void mix_rows(const HeadBlock& b, const float* value, int64_t keys, float* to) {
  Vec sums[R][V];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v)
      sums[r][v] = mul(load(to + r * kQueries + v * kLanes), load(b.correction + v * kLanes));
  for (int64_t i = 0; i < keys; ++i) {
    Vec p[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) p[v] = load(b.scores + i * kQueries + v * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const Vec one = broadcast(value[i * b.ldv + r]);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sums[r][v] = fma(one, p[v], sums[r][v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) store(to + r * kQueries + v * kLanes, sums[r][v]);
}

template <int V>
void multiply_keys(const HeadBlock& b, const float* k, int64_t keys) {
  int64_t i = 0;
  for (; i + kHeldRows <= keys; i += kHeldRows)
    score_rows<kHeldRows, V>(b, k + i * b.ldk, b.scores + i * kQueries);
  for (; i + 2 <= keys; i += 2) score_rows<2, V>(b, k + i * b.ldk, b.scores + i * kQueries);
  if (i < keys) score_rows<1, V>(b, k + i * b.ldk, b.scores + i * kQueries);
}

template <int V>
void multiply_values(const HeadBlock& b, const float* value, int64_t keys) {
  int64_t d = 0;
  for (; d + kHeldRows <= b.value_dim; d += kHeldRows)
    mix_rows<kHeldRows, V>(b, value + d, keys, b.sums + d * kQueries);
  for (; d + 2 <= b.value_dim; d += 2)
    mix_rows<2, V>(b, value + d, keys, b.sums + d * kQueries);
  if (d < b.value_dim) mix_rows<1, V>(b, value + d, keys, b.sums + d * kQueries);
}

// A score of minus infinity counts for nothing. e^-87.3, where `exponential` ends, is subtracted,
// so that it becomes zero; the maximum starts at the least finite number, so that no difference is
// infinity less infinity.
template <int V>
void softmax_keys(const HeadBlock& b, int64_t keys, bool biased) {
  const Vec least = exponential(broadcast(-87.3f));
  Vec most[V], total[V];
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) most[v] = load(b.most + v * kLanes);
  for (int64_t i = 0; i < keys; ++i) {
    float* row = b.scores + i * kQueries;
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      Vec score = load(row + v * kLanes);
      if (biased) {
        score = add(score, load(b.bias + i * kQueries + v * kLanes));
        store(row + v * kLanes, score);
      }
      most[v] = maximum(score, most[v]);
    }
  }
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) {
    const Vec factor = sub(exponential(sub(load(b.most + v * kLanes), most[v])), least);
    store(b.correction + v * kLanes, factor);
    store(b.most + v * kLanes, most[v]);
    total[v] = mul(factor, load(b.total + v * kLanes));
  }
  for (int64_t i = 0; i < keys; ++i) {
    float* row = b.scores + i * kQueries;
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      const Vec part = sub(exponential(sub(load(row + v * kLanes), most[v])), least);
      total[v] = add(total[v], part);
      store(row + v * kLanes, part);
    }
  }
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) store(b.total + v * kLanes, total[v]);
}

inline void turn_queries(const HeadBlock& b, int64_t ldq, float scale) {
  const Vec factor = broadcast(scale);
  for (int64_t q = 0; q < kQueries && q < b.queries; q += kLanes) {
    for (int64_t d = 0; d < b.dim; d += kLanes) {
      Vec square[kLanes];
      for (int i = 0; i < kLanes; ++i)
        square[i] = q + i < b.queries ? load_n(b.q + (q + i) * ldq + d, b.dim - d) : zero();
      transpose(square);
      for (int i = 0; i < kLanes && d + i < b.dim; ++i)
        store(b.turned + (d + i) * kQueries + q, mul(square[i], factor));
    }
  }
}

inline void write_heads(const HeadBlock& b, float* out, int64_t ldo) {
  const Vec tiny = broadcast(1e-37f);
  for (int64_t q = 0; q < b.queries; q += kLanes) {
    const Vec factor = divide(broadcast(1.0f), maximum(tiny, load(b.total + q)));
    for (int64_t d = 0; d < b.value_dim; d += kLanes) {
      Vec square[kLanes];
      for (int i = 0; i < kLanes; ++i)
        square[i] = d + i < b.value_dim ? mul(load(b.sums + (d + i) * kQueries + q), factor)
                                        : zero();
      transpose(square);
      for (int i = 0; i < kLanes && q + i < b.queries; ++i)
        store_n(out + (q + i) * ldo + d, square[i], b.value_dim - d);
    }
  }
}

// bias[keys][queries] from the mask, whose first query and key are those of the block.
inline void turn_mask(const HeadBlock& b, const Attention& a, int64_t place, int64_t keys) {
  const float never = -__builtin_inff();
  for (int64_t q = 0; q < b.queries; q += kLanes) {
    for (int i = 0; i < kLanes; ++i) {
      const int64_t query = q + i < b.queries ? q + i : b.queries - 1;
      const int64_t from = place + query * a.mask_strides.row;
      float* row = b.mask_rows + i * kKeyBlock;
      if (a.bias != nullptr) {
        for (int64_t j = 0; j < keys; ++j) row[j] = a.bias[from + j * a.mask_column];
      } else {
        for (int64_t j = 0; j < keys; ++j)
          row[j] = a.allowed[from + j * a.mask_column] ? 0.0f : never;
      }
    }
    for (int64_t j = 0; j < keys; j += kLanes) {
      Vec square[kLanes];
      for (int i = 0; i < kLanes; ++i) square[i] = load(b.mask_rows + i * kKeyBlock + j);
      transpose(square);
      for (int i = 0; i < kLanes; ++i) store(b.bias + (j + i) * kQueries + q, square[i]);
    }
  }
}

// Fills the bias of a block of keys; false if there is none.
inline bool fill_bias(const HeadBlock& b, const Attention& a, int64_t place, int64_t ahead,
                      int64_t keys) {
  const bool masked = a.bias != nullptr || a.allowed != nullptr;
  const bool cut = a.causal && ahead < keys - 1;  // some query of the block does not see some key
  if (masked && a.mask_strides.row == 0) {
    for (int64_t j = 0; j < keys; ++j) {
      const int64_t from = place + j * a.mask_column;
      const Vec value = broadcast(a.bias != nullptr    ? a.bias[from]
                                  : a.allowed[from] ? 0.0f
                                                    : -__builtin_inff());
      for (int v = 0; v < kQuerySets; ++v) store(b.bias + j * kQueries + v * kLanes, value);
    }
  } else if (masked) {
    turn_mask(b, a, place, keys);
  }
  if (cut) {
    for (int64_t j = 0; j < keys; ++j) {
      const float* row = b.triangle + kKeyBlock + kQueries + ahead - j;
      for (int v = 0; v < kQuerySets; ++v) {
        float* to = b.bias + j * kQueries + v * kLanes;
        store(to, masked ? add(load(to), load(row + v * kLanes)) : load(row + v * kLanes));
      }
    }
  }
  return masked || cut;
}

template <int V>
void attend_block(const HeadBlock& b, const Attention& a, int64_t first, int64_t mask) {
  const int64_t seen = a.causal && first + b.queries < a.keys ? first + b.queries : a.keys;
  for (int v = 0; v < V; ++v) {
    store(b.most + v * kLanes, broadcast(kLeastScore));
    store(b.total + v * kLanes, zero());
  }
  for (int64_t i = 0; i < b.value_dim * kQueries; i += kLanes) store(b.sums + i, zero());
  for (int64_t key = 0; key < seen; key += kKeyBlock) {
    const int64_t keys = seen - key < kKeyBlock ? seen - key : kKeyBlock;
    multiply_keys<V>(b, b.k + key * b.ldk, keys);
    const bool biased = fill_bias(b, a, mask + key * a.mask_column, first - key, keys);
    softmax_keys<V>(b, keys, biased);
    multiply_values<V>(b, b.v + key * b.ldv, keys);
  }
}

inline void attention(const Task& task) {
  const Attention& a = *task.attention;
  HeadBlock b{};
  b.ldk = a.k_strides.row;
  b.ldv = a.v_strides.row;
  b.dim = a.dim;
  b.value_dim = a.value_dim;
  b.turned = task.workspace;
  b.scores = b.turned + a.dim * kQueries;
  b.bias = b.scores + kKeyBlock * kQueries;
  b.sums = b.bias + kKeyBlock * kQueries;
  b.most = b.sums + a.value_dim * kQueries;
  b.total = b.most + kQueries;
  b.correction = b.total + kQueries;
  b.mask_rows = b.correction + kQueries;
  b.triangle = b.mask_rows + kLanes * kKeyBlock;
  for (int64_t i = 0; i < 2 * (kKeyBlock + kQueries); ++i)
    b.triangle[i] = i < kKeyBlock + kQueries ? -__builtin_inff() : 0.0f;
  for (int64_t i = 0; i < kLanes * kKeyBlock; ++i) b.mask_rows[i] = 0.0f;
  const int64_t blocks = (a.queries + kQueries - 1) / kQueries;
  for (int64_t place = task.begin_row; place < task.end_row; ++place) {
    const int64_t first = place % blocks * kQueries, head = place / blocks % a.heads;
    const int64_t text = place / blocks / a.heads, shared = head / a.sharing;
    b.queries = a.queries - first < kQueries ? a.queries - first : kQueries;
    b.q = a.q + text * a.q_strides.batch + head * a.q_strides.head + first * a.q_strides.row;
    b.k = a.k + text * a.k_strides.batch + shared * a.k_strides.head;
    b.v = a.v + text * a.v_strides.batch + shared * a.v_strides.head;
    const int64_t mask = text * a.mask_strides.batch + head * a.mask_strides.head +
                         first * a.mask_strides.row;
    turn_queries(b, a.q_strides.row, a.scale);
    switch ((b.queries + kLanes - 1) / kLanes) {
      case 1: attend_block<1>(b, a, first, mask); break;
      case 2: attend_block<2>(b, a, first, mask); break;
      case 3: attend_block<kQuerySets < 3 ? kQuerySets : 3>(b, a, first, mask); break;
      default: attend_block<kQuerySets>(b, a, first, mask);
    }
    float* out = a.out + text * a.out_strides.batch + head * a.out_strides.head;
    write_heads(b, out + first * a.out_strides.row, a.out_strides.row);
  }
}
