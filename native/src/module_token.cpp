// One token through a decoder layer, of the Python module prunus._native.
#include <nanobind/nanobind.h>
#include <nanobind/stl/array.h>

#include <array>
#include <new>

#include "bitmap.h"
#include "dispatch.h"
#include "module.h"
#include "module_attention.h"
#include "nm.h"
#include "token.h"

namespace nb = nanobind;

namespace prunus {
namespace {

// hidden, heads, groups, dim, inner, half; seven blobs and seven biases; two gammas: int64 each.
constexpr int64_t kNumbers = 6 + 2 * kTokenLayers + 2, kMostSize = int64_t{1} << 24;

// Rows and columns of a blob of any kind.
void expect_shape(uintptr_t blob, int64_t rows, int64_t cols) {
  if (blob == 0 || blob % 8 != 0) bad_value("the blob's address is null or not 8-byte aligned");
  const auto& groups = *reinterpret_cast<const VectorHeader*>(blob);
  const auto& header = *reinterpret_cast<const BlobHeader*>(blob);
  if (!is_vectors(groups) && !is_bitmap(header) && !is_nm(header)) checked_blob(blob, true);
  if (static_cast<int64_t>(header.rows) != rows || static_cast<int64_t>(header.cols) != cols)
    fail("ShapeError", "the layers of a decoder layer do not fit each other");
}

TokenCall checked(uintptr_t table, uintptr_t x, float eps, int threads, int isa) {
  if (table == 0 || table % 8 != 0 || x == 0 || x % 2 != 0)
    bad_value("an address is null or not aligned");
  if (threads < 1 || isa >= all_count()) bad_value("no such number of threads or instruction set");
  const auto* n = reinterpret_cast<const int64_t*>(table);
  TokenCall call{};
  TokenLayer& l = call.layer;
  l.hidden = n[0];
  l.heads = n[1];
  l.groups = n[2];
  l.dim = n[3];
  l.inner = n[4];
  l.half = n[5];
  for (const int64_t size : {l.hidden, l.heads, l.groups, l.dim, l.inner})
    if (size < 1 || size > kMostSize) bad_value("a size is out of range");
  if (l.heads % l.groups != 0 || l.dim % 2 != 0)
    bad_value("the heads do not divide by those of the keys, or their width is odd");
  const bool joined = n[6 + kKey] == 0, paired = n[6 + kUp] == 0;
  const int64_t queries = l.heads * l.dim, keys = l.groups * l.dim;
  const int64_t rows[] = {joined ? queries + 2 * keys : queries, keys, keys, l.hidden,
                          paired ? 2 * l.inner : l.inner, l.inner, l.hidden};
  const int64_t cols[] = {l.hidden, l.hidden, l.hidden, queries, l.hidden, l.hidden, l.inner};
  for (int i = 0; i < kTokenLayers; ++i) {
    if (!(joined && (i == kKey || i == kValue)) && !(paired && i == kUp))
      expect_shape(static_cast<uintptr_t>(n[6 + i]), rows[i], cols[i]);
    l.blobs[i] = reinterpret_cast<const void*>(n[6 + i]);
    l.biases[i] = reinterpret_cast<const float*>(n[6 + kTokenLayers + i]);
  }
  for (int i = 0; i < 2; ++i) {
    l.gammas[i] = reinterpret_cast<const void*>(n[6 + 2 * kTokenLayers + i]);
    if (l.gammas[i] == nullptr) bad_value("an address is null or not aligned");
  }
  call.x = reinterpret_cast<const void*>(x);
  call.eps = eps;
  call.threads = threads;
  call.kernels = &kernels_at(isa < 0 ? active_index() : isa);
  return call;
}

void token_in_ptr(uintptr_t table, uintptr_t x, uintptr_t cos, uintptr_t sin, uintptr_t q,
                  uintptr_t k, uintptr_t v, float eps, int threads, int isa) {
  const TokenCall call = checked(table, x, eps, threads, isa);
  for (const uintptr_t address : {cos, sin, q, k, v})
    if (address == 0 || address % 2 != 0) bad_value("an address is null or not aligned");
  bool ok;
  {
    nb::gil_scoped_release release;
    ok = run_token_in(call, reinterpret_cast<const void*>(cos), reinterpret_cast<const void*>(sin),
                      reinterpret_cast<float*>(q), reinterpret_cast<void*>(k),
                      reinterpret_cast<void*>(v));
  }
  if (!ok) throw std::bad_alloc();
}

// strides: elements between heads and rows of k, then of v.
void token_out_ptr(uintptr_t table, uintptr_t x, uintptr_t q, uintptr_t k, uintptr_t v,
                   uintptr_t y, int64_t keys, const std::array<int64_t, 4>& strides, float scale,
                   float eps, int threads, int isa) {
  const TokenCall call = checked(table, x, eps, threads, isa);
  for (const uintptr_t address : {q, k, v, y})
    if (address == 0 || address % 2 != 0) bad_value("an address is null or not aligned");
  if (keys < 1 || keys > INT32_MAX) bad_value("the number of keys is out of range");
  TokenAttention a{};
  a.q = reinterpret_cast<const float*>(q);
  a.k = reinterpret_cast<const void*>(k);
  a.v = reinterpret_cast<const void*>(v);
  a.keys = keys;
  a.k_head = strides[0];
  a.k_row = strides[1];
  a.v_head = strides[2];
  a.v_row = strides[3];
  a.scale = scale;
  bool ok;
  {
    nb::gil_scoped_release release;
    ok = run_token_out(call, a, reinterpret_cast<void*>(y));
  }
  if (!ok) throw std::bad_alloc();
}

}  // namespace

void bind_token(nanobind::module_& m) {
  m.attr("TOKEN_NUMBERS") = kNumbers;
  m.def("token_in_ptr", &token_in_ptr, nb::arg("table_ptr"), nb::arg("x_ptr"), nb::arg("cos_ptr"),
        nb::arg("sin_ptr"), nb::arg("q_ptr"), nb::arg("k_ptr"), nb::arg("v_ptr"), nb::arg("eps"),
        nb::arg("threads") = 1, nb::arg("isa") = -1);
  m.def("token_out_ptr", &token_out_ptr, nb::arg("table_ptr"), nb::arg("x_ptr"), nb::arg("q_ptr"),
        nb::arg("k_ptr"), nb::arg("v_ptr"), nb::arg("y_ptr"), nb::arg("keys"), nb::arg("strides"),
        nb::arg("scale"), nb::arg("eps"), nb::arg("threads") = 1, nb::arg("isa") = -1);
}

}  // namespace prunus
