#include "moves.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <vector>

namespace prunus {
namespace {

constexpr int64_t kSpan = 16;

// Whether one of some values exceeds `least`; all are counted in `finite`.
bool exceeds(const float* values, int64_t count, float least, bool& finite) {
  float most = 0;
  int odd = 0;
  for (int64_t i = 0; i < count; ++i) {
    const float size = std::fabs(values[i]);
    most = most < size ? size : most;
    odd |= !(size <= std::numeric_limits<float>::max());
  }
  finite = finite && odd == 0;
  return most > least;
}

}  // namespace

void keep_best(Best& best, int64_t count) {
  if (best.used <= count) return;
  float last = std::numeric_limits<float>::infinity();
  int64_t ties = 0;
  if (count > 0) {
    std::vector<float> order(best.scores, best.scores + best.used);
    std::nth_element(order.begin(), order.begin() + (count - 1), order.end(), std::greater<float>());
    last = order[static_cast<size_t>(count - 1)];
    ties = count - std::count_if(order.begin(), order.begin() + count,
                                 [last](float score) { return score > last; });
  }
  int64_t at = 0;
  for (int64_t i = 0; i < best.used; ++i) {
    const float score = best.scores[i];
    const bool tie = score == last && ties > 0;
    ties -= tie ? 1 : 0;
    best.scores[at] = score;
    best.places[at] = best.places[i];
    at += score > last || tie ? 1 : 0;
  }
  best.used = at;
  if (last > best.least) best.least = last;
}

bool collect_best(const Weight& pattern, const float* dense, int64_t begin, int64_t end,
                  Best& best) {
  bool finite = true;
  const int64_t cols = pattern.cols;
  for (int64_t row = begin; row < end && finite; ++row, dense += cols) {
    if (best.room - best.used < cols) keep_best(best, best.count);
    uint32_t at = pattern.offsets[row];
    const uint32_t stop = pattern.offsets[row + 1];
    for (int64_t from = 0; from < cols; from += kSpan) {
      const int64_t until = std::min(cols, from + kSpan);
      if (!exceeds(dense + from, until - from, best.least, finite)) continue;
      for (int64_t column = from; column < until; ++column) {
        const float size = std::fabs(dense[column]);
        if (!(size > best.least)) continue;
        while (at < stop && pattern.columns[at] < column) ++at;
        if (at < stop && pattern.columns[at] == column) continue;
        best.places[best.used] = row * cols + column;
        best.scores[best.used++] = size;
      }
    }
  }
  return finite;
}

bool rewire(const Rewiring& move) {
  const Weight& w = move.from;
  int64_t next = 0;
  uint32_t count = 0;
  const auto add = [&](int64_t column, int64_t source) {
    move.columns[count] = static_cast<uint16_t>(column);
    move.source[count++] = static_cast<int32_t>(source);
  };
  move.offsets[0] = 0;
  for (int64_t row = 0; row < w.rows; ++row) {
    const int64_t first = row * w.cols, end = first + w.cols;
    int64_t before = -1;
    const auto grow_below = [&](int64_t column) {
      for (; next < move.grown && move.grow[next] < first + column; ++next) {
        if (move.grow[next] < first || move.grow[next] - first <= before) return false;
        before = move.grow[next] - first;
        add(before, -1);
      }
      return true;
    };
    for (uint32_t i = w.offsets[row]; i < w.offsets[row + 1]; ++i) {
      const int64_t column = w.columns[i];
      if (!grow_below(column)) return false;
      if (next < move.grown && move.grow[next] == first + column) return false;
      before = column;
      if (move.drop[i] == 0) add(column, i);
    }
    if (!grow_below(end - first)) return false;
    move.offsets[row + 1] = count;
  }
  return next == move.grown;
}

}  // namespace prunus
