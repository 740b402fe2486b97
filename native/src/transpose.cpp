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

}  // namespace prunus
