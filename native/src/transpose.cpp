#include "blob.h"
#include "run.h"

namespace prunus {

// A counting sort by the target's (block, row). Walking the source in its own order leaves the
// columns of each target row ascending: all of a target row lies in one block of the source.
void transpose_blob(const void* from, void* to) {
  const Weight source = open_blob(from);
  const Weight target = open_blob(to);
  auto* offsets = const_cast<uint32_t*>(target.offsets);
  auto* columns = const_cast<uint16_t*>(target.columns);
  auto* values = const_cast<float*>(target.values);
  const int64_t segments = target.rows * target.blocks;
  for (int64_t i = 0; i <= segments; ++i) offsets[i] = 0;

  const auto visit = [&](auto&& each) {
    for (uint32_t b = 0; b < source.blocks; ++b)
      for (int64_t row = 0; row < source.rows; ++row) {
        const uint32_t* bounds = source.offsets + b * source.rows + row;
        const int64_t block = row / target.block;
        for (uint32_t i = bounds[0]; i < bounds[1]; ++i) {
          const int64_t column = static_cast<int64_t>(b) * source.block + source.columns[i];
          each(i, block * target.rows + column, row - block * target.block);
        }
      }
  };
  visit([&](uint32_t, int64_t segment, int64_t) { ++offsets[segment + 1]; });
  for (int64_t i = 0; i < segments; ++i) offsets[i + 1] += offsets[i];
  visit([&](uint32_t i, int64_t segment, int64_t column) {
    const uint32_t place = offsets[segment]++;
    columns[place] = static_cast<uint16_t>(column);
    values[place] = source.values[i];
  });
  for (int64_t i = segments; i > 0; --i) offsets[i] = offsets[i - 1];
  offsets[0] = 0;
}

namespace {

// each(i, row, column) of the target: a row's elements from its last to its first, so that the
// columns of a target row come in ascending order. Area: 0 if it is known at run time only.
template <int64_t Area, class Each>
void walk_turned(const Turn& turn, const Each& each) {
  const int64_t area = Area ? Area : turn.area, width = turn.width, phases = turn.phases;
  const int64_t group_rows = turn.w.rows / turn.groups, group_channels = turn.w.cols / area;
  const Spot first_spot = turn.into[0];
  for (int64_t row = 0; row < turn.w.rows; ++row) {
    const int64_t group = turn.groups == 1 ? 0 : row / group_rows;
    const int64_t first = (row - group * group_rows) * width;
    const int64_t from = group * group_channels;
    for (uint32_t i = turn.w.offsets[row + 1]; i-- > turn.w.offsets[row];) {
      const uint32_t column = turn.w.columns[i];
      const int64_t channel = column / static_cast<uint32_t>(area);
      const Spot spot = Area == 1 ? first_spot : turn.into[column - channel * area];
      each(i, (from + channel) * phases + spot.phase, first + spot.place);
    }
  }
}

template <class Each>
void walk(const Turn& turn, const Each& each) {
  switch (turn.area) {
    case 1: walk_turned<1>(turn, each); break;
    case 9: walk_turned<9>(turn, each); break;
    default: walk_turned<0>(turn, each); break;
  }
}

}  // namespace

void turn_index(const Turn& turn, uint32_t* offsets, uint16_t* columns, uint32_t* counters) {
  const int64_t rows = turn.rows();
  for (int64_t r = 0; r <= rows; ++r) offsets[r] = 0;
  walk(turn, [&](uint32_t, int64_t row, int64_t) { ++offsets[row + 1]; });
  for (int64_t r = 0; r < rows; ++r) offsets[r + 1] += offsets[r];
  for (int64_t r = 0; r < rows; ++r) counters[r] = offsets[r];
  walk(turn, [&](uint32_t, int64_t row, int64_t column) {
    columns[counters[row]++] = static_cast<uint16_t>(column);
  });
}

void turn_values(const Turn& turn, const uint32_t* offsets, float* values, uint32_t* counters) {
  const int64_t rows = turn.rows();
  for (int64_t r = 0; r < rows; ++r) counters[r] = offsets[r];
  walk(turn, [&](uint32_t i, int64_t row, int64_t) {
    values[counters[row]++] = turn.w.values[i];
  });
}

}  // namespace prunus
