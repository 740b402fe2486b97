// The Python module prunus._native: addresses in, nothing converted.
#include <nanobind/nanobind.h>
#include <nanobind/stl/map.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <map>
#include <string>
#include <vector>

#include "bitmap.h"
#include "dispatch.h"
#include "module.h"
#include "module_attention.h"
#include "nm.h"
#include "pool.h"

namespace nb = nanobind;
using namespace prunus;

namespace prunus {

[[noreturn]] void fail(const char* kind, const std::string& message) {
  const nb::object type = nb::module_::import_("prunus.errors").attr(kind);
  PyErr_SetString(type.ptr(), message.c_str());
  throw nb::python_error();
}

[[noreturn]] void bad_value(const std::string& message) { fail("ValueRangeError", message); }

// Null unless the blob is one of groups.
static const VectorHeader* vectors_at(uintptr_t address) {
  if (address == 0 || address % 8 != 0) return nullptr;
  const auto& header = *reinterpret_cast<const VectorHeader*>(address);
  return is_vectors(header) ? &header : nullptr;
}

const BlobHeader& checked_blob(uintptr_t address, bool tiles) {
  if (address == 0 || address % 8 != 0)
    bad_value("the blob's address is null or not 8-byte aligned");
  const auto& header = *reinterpret_cast<const BlobHeader*>(address);
  if (!is_blob(header)) fail("FormatError", "not a kernel blob of this version; pack it again");
  if (is_tiled(header) && !tiles)
    fail("FormatError", "this kernel takes a weight by rows, not in tiles; pack it again");
  return header;
}

void check_floats(const char* name, uintptr_t address, bool needed) {
  if (address % 4 != 0 || (needed && address == 0))
    bad_value(std::string("the address of ") + name + " is null or not 4-byte aligned");
}

// All of a call but its weight.
static Call checked_options(uint64_t rows, uint64_t cols, uintptr_t x, uintptr_t y, int64_t n,
                     uintptr_t bias, uintptr_t residual, uint32_t flags, int threads, int isa) {
  Call call{};
  if (n < 0 || n > INT32_MAX || threads < 1)
    bad_value("n must lie within 0 and 2^31 - 1, threads must be at least 1");
  if (flags > kRelu6 || (flags & (flags - 1)) != 0)
    bad_value(
        "unknown flags; known: one of 1 (ReLU), 2 (GELU), 4 (GELU by tanh), 8 (SiLU), 16 (ReLU6)");
  if (isa >= all_count()) bad_value("no such instruction set; see available_isas()");
  check_floats("x", x, n > 0 && cols > 0);
  check_floats("y", y, n > 0 && rows > 0);
  check_floats("the bias", bias, false);
  check_floats("the residual", residual, false);
  call.x = reinterpret_cast<const float*>(x);
  call.y = reinterpret_cast<float*>(y);
  call.n = n;
  call.bias = reinterpret_cast<const float*>(bias);
  call.residual = reinterpret_cast<const float*>(residual);
  call.flags = flags;
  call.threads = threads;
  call.kernels = &kernels_at(isa < 0 ? active_index() : isa);
  return call;
}

Call checked_call(uintptr_t blob, uintptr_t x, uintptr_t y, int64_t n, uintptr_t bias,
                  uintptr_t residual, uint32_t flags, int threads, int isa) {
  if (const VectorHeader* groups = vectors_at(blob)) {
    const Vectors v = open_vectors(groups);
    Call call = checked_options(v.rows, v.cols, x, y, n, bias, residual, flags, threads, isa);
    call.vectors = v;
    call.w.rows = v.rows;
    call.w.cols = v.cols;
    return call;
  }
  const BlobHeader& h = checked_blob(blob, true);
  Call call = checked_options(h.rows, h.cols, x, y, n, bias, residual, flags, threads, isa);
  call.w = open_blob(reinterpret_cast<const void*>(blob));
  return call;
}

void execute(const Call& call) {
  bool ok;
  {
    nb::gil_scoped_release release;
    ok = call.vectors.height > 0 ? run_vectors(call) : run(call);
  }
  if (!ok) throw std::bad_alloc();
}

SampledCall checked_sampled(uintptr_t blob, uintptr_t x, uintptr_t g, uintptr_t out, int64_t n,
                            bool accumulate, int threads, int isa) {
  checked_blob(blob);
  SampledCall call{};
  call.pattern = open_blob(reinterpret_cast<const void*>(blob));
  if (n < 0 || n > INT32_MAX || threads < 1)
    bad_value("n must lie within 0 and 2^31 - 1, threads must be at least 1");
  if (isa >= all_count()) bad_value("no such instruction set; see available_isas()");
  check_floats("x", x, n > 0 && call.pattern.nnz > 0);
  check_floats("g", g, n > 0 && call.pattern.nnz > 0);
  check_floats("out", out, call.pattern.nnz > 0);
  call.x = reinterpret_cast<const float*>(x);
  call.g = reinterpret_cast<const float*>(g);
  call.n = n;
  call.out = reinterpret_cast<float*>(out);
  call.accumulate = accumulate;
  call.threads = threads;
  call.kernels = &kernels_at(isa < 0 ? active_index() : isa);
  return call;
}

void execute(const SampledCall& call) {
  bool ok;
  {
    nb::gil_scoped_release release;
    ok = run_sampled(call);
  }
  if (!ok) throw std::bad_alloc();
}

}  // namespace prunus

namespace {

void bitmap_ptr(uintptr_t blob, const Call& call) {
  bool ok;
  {
    nb::gil_scoped_release release;
    ok = run_bitmap({open_bitmap(reinterpret_cast<const void*>(blob)), call.x, call.y, call.n,
                     call.bias, call.residual, call.flags, call.threads, call.kernels});
  }
  if (!ok) throw std::bad_alloc();
}

void nm_ptr(const NmWeight& weight, const Call& call) {
  bool ok;
  {
    nb::gil_scoped_release release;
    ok = run_nm({weight, call.x, call.y, call.n, call.bias, call.residual, call.flags,
                 call.threads, call.kernels});
  }
  if (!ok) throw std::bad_alloc();
}

void linear_ptr(uintptr_t blob, uintptr_t x, uintptr_t y, int64_t n, uintptr_t bias,
                uint32_t flags, int threads, int isa, uintptr_t residual) {
  if (blob != 0 && blob % 8 == 0 && is_bitmap(*reinterpret_cast<const BlobHeader*>(blob)))
    return bitmap_ptr(blob, checked_options(reinterpret_cast<const BlobHeader*>(blob)->rows,
                                            reinterpret_cast<const BlobHeader*>(blob)->cols, x, y,
                                            n, bias, residual, flags, threads, isa));
  if (blob != 0 && blob % 8 == 0 && is_nm(*reinterpret_cast<const BlobHeader*>(blob))) {
    const NmWeight w = open_nm(reinterpret_cast<const void*>(blob));
    return nm_ptr(w, checked_options(w.rows, w.cols, x, y, n, bias, residual, flags, threads, isa));
  }
  Call call = checked_call(blob, x, y, n, bias, residual, flags, threads, isa);
  call.layout = Layout::tokens;
  call.ldx = call.w.cols;
  call.ldy = call.w.rows;
  execute(call);
}

void planes_ptr(uintptr_t blob, uintptr_t x, uintptr_t y, int64_t n, uintptr_t bias,
                uint32_t flags, int threads, int64_t ldx, int64_t ldy, int isa,
                uintptr_t residual) {
  Call call = checked_call(blob, x, y, n, bias, residual, flags, threads, isa);
  if (ldx < n || ldy < n) bad_value("the row strides ldx and ldy must be at least n");
  call.layout = Layout::planes;
  call.ldx = ldx;
  call.ldy = ldy;
  execute(call);
}

// Addresses of blobs in tiles and of their biases (or 0), the flags of each: y = the last layer's
// output, of n tokens.
void chain_ptr(const std::vector<uintptr_t>& blobs, const std::vector<uintptr_t>& biases,
               const std::vector<uint32_t>& flags, uintptr_t x, uintptr_t y, int64_t n,
               int threads, int isa, uintptr_t residual) {
  const size_t count = blobs.size();
  if (count < 2 || biases.size() != count || flags.size() != count)
    bad_value("a chain takes two or more blobs, and as many biases and flags");
  std::vector<ChainLayer> layers(count);
  Call first{};
  for (size_t i = 0; i < count; ++i) {
    const bool last = i + 1 == count;
    const uintptr_t in = i == 0 ? x : y, added = last ? residual : 0;
    const Call call = checked_call(blobs[i], in, y, n, biases[i], added, flags[i], threads, isa);
    if (call.w.tile == 0) fail("FormatError", "a chain takes weights in tiles; see kernels.tile");
    if (i > 0 && call.w.cols != layers[i - 1].w.rows)
      fail("ShapeError", "the layers of a chain do not fit each other");
    layers[i] = {call.w, call.bias, call.flags};
    if (i == 0) first = call;
  }
  ChainCall chain{};
  chain.layers = layers.data();
  chain.count = static_cast<int>(count);
  chain.x = first.x;
  chain.y = first.y;
  chain.n = n;
  chain.residual = reinterpret_cast<const float*>(residual);
  chain.threads = threads;
  chain.kernels = first.kernels;
  bool ok;
  {
    nb::gil_scoped_release release;
    ok = run_chain(chain);
  }
  if (!ok) throw std::bad_alloc();
}

// out[nnz] (+)= G^T X at the non-zeros of the blob; rows of x and g lie ldx and ldg floats apart.
void sddmm_ptr(uintptr_t blob, uintptr_t x, uintptr_t g, uintptr_t out, int64_t n, bool tokens,
               bool accumulate, int threads, int64_t ldx, int64_t ldg, int isa) {
  SampledCall call = checked_sampled(blob, x, g, out, n, accumulate, threads, isa);
  if (ldx < (tokens ? call.pattern.cols : n) || ldg < (tokens ? call.pattern.rows : n))
    bad_value("the row strides ldx and ldg must be at least the length of a row");
  call.tokens = tokens;
  call.ldx = ldx;
  call.ldg = ldg;
  execute(call);
}

void check_turn(const Turn& turn) {
  const Weight& w = turn.w;
  if (turn.area < 1 || turn.groups < 1 || w.blocks > 1 || w.cols % turn.area != 0 ||
      w.rows % turn.groups != 0 || turn.width < 1 || turn.width > 65536 ||
      w.rows / turn.groups * turn.width > 65536)
    bad_value("area and groups do not divide this weight, or its transpose is too wide");
  if (turn.phases < 1 || turn.phases > turn.area)
    bad_value("a kernel has at least one phase, and at most one for each element");
  std::vector<int32_t> last(static_cast<size_t>(turn.phases), -1);
  for (int64_t i = turn.area; i-- > 0;) {
    const Spot spot = turn.into[i];
    if (spot.phase < 0 || spot.phase >= turn.phases || spot.place >= turn.width ||
        spot.place <= last[static_cast<size_t>(spot.phase)])
      bad_value("the places of a kernel's elements are out of range or not in order");
    last[static_cast<size_t>(spot.phase)] = spot.place;
  }
}

// See turn_index and turn_values; into: address of Spot [area]; columns 0: fills values, the
// offsets are there.
void turn_ptr(uintptr_t blob, int64_t area, int64_t groups, int64_t phases, int64_t width,
              uintptr_t into, uintptr_t offsets, uintptr_t columns, uintptr_t values) {
  checked_blob(blob);
  const Turn turn{open_blob(reinterpret_cast<const void*>(blob)), area, groups, phases, width,
                  reinterpret_cast<const Spot*>(into)};
  if (into == 0 || into % 4 != 0 || offsets == 0 || offsets % 4 != 0 || columns % 2 != 0 ||
      values % 4 != 0)
    bad_value("an address is null or not aligned");
  check_turn(turn);
  if ((columns == 0) == (values == 0)) bad_value("either columns or values are filled");
  nb::gil_scoped_release release;
  std::vector<uint32_t> counters(static_cast<size_t>(turn.rows()));
  auto* starts = reinterpret_cast<uint32_t*>(offsets);
  if (columns != 0) {
    turn_index(turn, starts, reinterpret_cast<uint16_t*>(columns), counters.data());
  } else {
    turn_values(turn, starts, reinterpret_cast<float*>(values), counters.data());
  }
}

void transpose_ptr(uintptr_t from, uintptr_t to) {
  const BlobHeader& source = checked_blob(from);
  const BlobHeader& target = checked_blob(to);
  if (source.rows != target.cols || source.cols != target.rows || source.nnz != target.nnz)
    bad_value("the target blob does not have the transposed shape");
  nb::gil_scoped_release release;
  transpose_blob(reinterpret_cast<const void*>(from), reinterpret_cast<void*>(to));
}

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (int i = 0; i < available_count(); ++i) names.emplace_back(kernels_at(i).isa);
  return names;
}

std::vector<std::string> test_isas() {
  std::vector<std::string> names;
  for (int i = available_count(); i < all_count(); ++i) names.emplace_back(kernels_at(i).isa);
  return names;
}

// {instruction set: why it is not offered}
std::map<std::string, std::string> refused_isas() {
  if (amx_status() == nullptr) return {};
  return {{"amx", amx_status()}};
}

void set_active_isa(const std::string& name) {
  for (int i = 0; i < available_count(); ++i)
    if (name == kernels_at(i).isa) return set_active_index(i);
  bad_value("instruction set " + name + " is not available here");
}

nb::list table() {
  nb::list rows;
  const auto append = [&](const char* name, const char* layout, const char* description) {
    nb::dict row;
    row["name"] = name;
    row["layout"] = layout;
    row["description"] = description;
    rows.append(row);
  };
#define PRUNUS_KERNEL(name, layout, description) append(#name, layout, description);
#include "kernels.def"
#undef PRUNUS_KERNEL
  return rows;
}

}  // namespace

NB_MODULE(_native, m) {
  m.doc() = "Sparse kernels of prunus; prunus.kernels is their Python face.";
  m.def("linear_ptr", &linear_ptr, nb::arg("blob_ptr"), nb::arg("x_ptr"), nb::arg("y_ptr"),
        nb::arg("n"), nb::arg("bias_ptr") = 0, nb::arg("flags") = 0, nb::arg("threads") = 1,
        nb::arg("isa") = -1, nb::arg("residual_ptr") = 0);
  m.def("chain_ptr", &chain_ptr, nb::arg("blob_ptrs"), nb::arg("bias_ptrs"), nb::arg("flags"),
        nb::arg("x_ptr"), nb::arg("y_ptr"), nb::arg("n"), nb::arg("threads") = 1,
        nb::arg("isa") = -1, nb::arg("residual_ptr") = 0);
  m.def("planes_ptr", &planes_ptr, nb::arg("blob_ptr"), nb::arg("x_ptr"), nb::arg("y_ptr"),
        nb::arg("n"), nb::arg("bias_ptr"), nb::arg("flags"), nb::arg("threads"), nb::arg("ldx"),
        nb::arg("ldy"), nb::arg("isa") = -1, nb::arg("residual_ptr") = 0);
  m.def("sddmm_ptr", &sddmm_ptr, nb::arg("blob_ptr"), nb::arg("x_ptr"), nb::arg("g_ptr"),
        nb::arg("out_ptr"), nb::arg("n"), nb::arg("tokens"), nb::arg("accumulate"),
        nb::arg("threads"), nb::arg("ldx"), nb::arg("ldg"), nb::arg("isa") = -1);
  bind_convolutions(m);
  bind_moves(m);
  m.def("turn_ptr", &turn_ptr, nb::arg("blob_ptr"), nb::arg("area"), nb::arg("groups"),
        nb::arg("phases"), nb::arg("width"), nb::arg("into_ptr"), nb::arg("offsets_ptr"),
        nb::arg("columns_ptr") = 0, nb::arg("values_ptr") = 0);
  bind_attention(m);
  bind_token(m);
  m.def("transpose_ptr", &transpose_ptr, nb::arg("from_ptr"), nb::arg("to_ptr"));
  m.def("available_isas", &available_isas);
  m.def("test_isas", &test_isas);
  m.def("refused_isas", &refused_isas);
  m.def("active_isa", [] { return kernels_at(active_index()).isa; });
  m.def("set_active_isa", &set_active_isa, nb::arg("name"));
  m.def("lend_team", [](uintptr_t address) { lend_team(reinterpret_cast<Team>(address)); },
        nb::arg("address"));
  m.def("has_team", &has_team);
  m.def("grain", &grain);
  m.def("set_grain", &set_grain, nb::arg("multiply_adds"));
  m.def("table", &table);
}
