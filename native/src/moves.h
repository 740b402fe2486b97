// Moves of the connections of a sparse weight of one block: what grows, found in rows of a dense
// gradient, and the index after what is dropped and what grows.
#pragma once
#include "blob.h"

namespace prunus {

// The best places so far, in ascending order: `used` of `room`, with their scores.
struct Best {
  int64_t* places;
  float* scores;
  int64_t used, room, count;
  float least;  // scores up to here are none of the `count` best
};

// Leaves the `count` highest scores, of equal ones those at lower places; raises `least`.
void keep_best(Best& best, int64_t count);

// Looks at |dense| of rows [begin, end) outside of the pattern. `room` must hold `count` places and a
// row. False if a value is not finite.
bool collect_best(const Weight& pattern, const float* dense, int64_t begin, int64_t end, Best& best);

// A new index [rows + 1], [kept + grown]: what `drop` [nnz] leaves, and the ascending places
// `grow`; source: where each non-zero was, -1 for what grows. False if a place to grow is stored,
// out of bounds or not in order.
struct Rewiring {
  Weight from;
  const uint8_t* drop;
  const int64_t* grow;
  int64_t grown;
  uint32_t* offsets;
  uint16_t* columns;
  int32_t* source;
};
bool rewire(const Rewiring& move);

}  // namespace prunus
