// Moves of connections in the Python module.
#include <nanobind/stl/tuple.h>

#include <algorithm>
#include <tuple>

#include "module.h"
#include "moves.h"

namespace nb = nanobind;

namespace prunus {
namespace {

Weight checked_pattern(uintptr_t blob) {
  checked_blob(blob);
  const Weight w = open_blob(reinterpret_cast<const void*>(blob));
  if (w.blocks > 1) bad_value("moves are made in weights of one block");
  return w;
}

void check_address(uintptr_t address, uintptr_t alignment, bool needed) {
  if ((needed && address == 0) || address % alignment != 0)
    bad_value("an address is null or not aligned");
}

Best checked_best(uintptr_t places, uintptr_t scores, int64_t used, int64_t room, int64_t count,
                  float least) {
  check_address(places, 8, room > 0);
  check_address(scores, 4, room > 0);
  if (used < 0 || count < 0 || used > room || count > room)
    bad_value("a list of places holds 0 to `room` of them");
  return {reinterpret_cast<int64_t*>(places), reinterpret_cast<float*>(scores), used, room, count,
          least};
}

using Found = std::tuple<int64_t, float, bool>;  // used, least, finite

Found collect_ptr(uintptr_t blob, uintptr_t dense, int64_t begin, int64_t end, uintptr_t places,
                  uintptr_t scores, int64_t used, int64_t room, int64_t count, float least) {
  const Weight w = checked_pattern(blob);
  Best best = checked_best(places, scores, used, room, count, least);
  if (begin < 0 || begin > end || end > w.rows) bad_value("rows of the gradient are out of range");
  if (room - count < w.cols) bad_value("`room` must hold `count` places and a row");
  check_address(dense, 4, begin < end);
  nb::gil_scoped_release release;
  const bool finite =
      collect_best(w, reinterpret_cast<const float*>(dense), begin, end, best);
  return {best.used, best.least, finite};
}

Found best_ptr(uintptr_t places, uintptr_t scores, int64_t used, int64_t count, float least) {
  Best best = checked_best(places, scores, used, std::max(used, count), count, least);
  nb::gil_scoped_release release;
  keep_best(best, count);
  return {best.used, best.least, true};
}

bool rewire_ptr(uintptr_t blob, uintptr_t drop, uintptr_t grow, int64_t grown, uintptr_t offsets,
                uintptr_t columns, uintptr_t source) {
  const Weight w = checked_pattern(blob);
  if (grown < 0) bad_value("a count is negative");
  check_address(drop, 1, w.nnz > 0);
  check_address(grow, 8, grown > 0);
  check_address(offsets, 4, true);
  check_address(columns, 2, w.nnz + grown > 0);
  check_address(source, 4, w.nnz + grown > 0);
  nb::gil_scoped_release release;
  return rewire({w, reinterpret_cast<const uint8_t*>(drop), reinterpret_cast<const int64_t*>(grow),
                 grown, reinterpret_cast<uint32_t*>(offsets), reinterpret_cast<uint16_t*>(columns),
                 reinterpret_cast<int32_t*>(source)});
}

}  // namespace

void bind_moves(nb::module_& m) {
  m.def("collect_ptr", &collect_ptr, nb::arg("blob_ptr"), nb::arg("dense_ptr"), nb::arg("begin"),
        nb::arg("end"), nb::arg("places_ptr"), nb::arg("scores_ptr"), nb::arg("used"),
        nb::arg("room"), nb::arg("count"), nb::arg("least"));
  m.def("best_ptr", &best_ptr, nb::arg("places_ptr"), nb::arg("scores_ptr"), nb::arg("used"),
        nb::arg("count"), nb::arg("least"));
  m.def("rewire_ptr", &rewire_ptr, nb::arg("blob_ptr"), nb::arg("drop_ptr"), nb::arg("grow_ptr"),
        nb::arg("grown"), nb::arg("offsets_ptr"), nb::arg("columns_ptr"), nb::arg("source_ptr"));
}

}  // namespace prunus
