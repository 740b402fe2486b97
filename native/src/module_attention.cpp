// Attention and layer normalisation of the Python module prunus._native.
#include "module_attention.h"

#include <nanobind/nanobind.h>
#include <nanobind/stl/array.h>

#include <array>
#include <new>
#include <string>

#include "attention.h"
#include "dispatch.h"
#include "norm.h"

namespace nb = nanobind;

namespace prunus {
namespace {

[[noreturn]] void bad_value(const std::string& message) {
  const nb::object type = nb::module_::import_("prunus.errors").attr("ValueRangeError");
  PyErr_SetString(type.ptr(), message.c_str());
  throw nb::python_error();
}

// batch, heads, queries, keys, dim, value dim, heads that share one of k and v.
using Sizes = std::array<int64_t, 7>;
// Floats between batches, heads and rows of q, k, v and out; of the mask also between columns.
using Strides = std::array<int64_t, 16>;

constexpr int64_t kMostSize = int64_t{1} << 31;
enum : int { kNoMask = 0, kAdded = 1, kAllowed = 2 };

HeadStrides at(const Strides& s, int i) {
  return {s[static_cast<size_t>(i)], s[static_cast<size_t>(i) + 1], s[static_cast<size_t>(i) + 2]};
}

void attention_ptr(uintptr_t q, uintptr_t k, uintptr_t v, uintptr_t out, const Sizes& sizes,
                   const Strides& strides, float scale, uintptr_t mask, int kind, bool causal,
                   int threads, int isa) {
  for (const int64_t size : sizes)
    if (size < 0 || size >= kMostSize) bad_value("a size is out of range");
  if (sizes[6] < 1 || sizes[1] % sizes[6] != 0)
    bad_value("the heads do not divide by the heads that share keys");
  if (threads < 1 || isa >= all_count()) bad_value("no such number of threads or instruction set");
  const bool empty = sizes[0] * sizes[1] * sizes[2] == 0 || sizes[5] == 0;
  for (const uintptr_t address : {q, k, v, out})
    if (address % 4 != 0) bad_value("an address is not aligned");
  if (!empty && (out == 0 || (sizes[3] > 0 && (v == 0 || (sizes[4] > 0 && (q == 0 || k == 0))))))
    bad_value("an address is null");
  if (kind < kNoMask || kind > kAllowed || (kind == kAdded && mask % 4 != 0) ||
      (kind != kNoMask && !empty && sizes[3] > 0 && mask == 0))
    bad_value("the mask is null, not aligned or of no known kind");
  AttentionCall call{};
  Attention& a = call.attention;
  a.batch = sizes[0];
  a.heads = sizes[1];
  a.queries = sizes[2];
  a.keys = sizes[3];
  a.dim = sizes[4];
  a.value_dim = sizes[5];
  a.sharing = sizes[6];
  a.q = reinterpret_cast<const float*>(q);
  a.k = reinterpret_cast<const float*>(k);
  a.v = reinterpret_cast<const float*>(v);
  a.out = reinterpret_cast<float*>(out);
  a.q_strides = at(strides, 0);
  a.k_strides = at(strides, 3);
  a.v_strides = at(strides, 6);
  a.out_strides = at(strides, 9);
  a.mask_strides = at(strides, 12);
  a.mask_column = strides[15];
  a.bias = kind == kAdded ? reinterpret_cast<const float*>(mask) : nullptr;
  a.allowed = kind == kAllowed ? reinterpret_cast<const uint8_t*>(mask) : nullptr;
  a.causal = causal;
  a.scale = scale;
  call.threads = threads;
  call.kernels = &kernels_at(isa < 0 ? active_index() : isa);
  bool ok = true;
  if (!empty) {
    nb::gil_scoped_release release;
    ok = run_attention(call);
  }
  if (!ok) throw std::bad_alloc();
}

// y[rows, columns]; gamma and beta may be 0.
void layer_norm_ptr(uintptr_t x, uintptr_t y, uintptr_t gamma, uintptr_t beta, int64_t rows,
                    int64_t columns, float eps, int threads, int isa) {
  if (rows < 0 || columns < 0) bad_value("a size is out of range");
  if (threads < 1 || isa >= all_count()) bad_value("no such number of threads or instruction set");
  for (const uintptr_t address : {x, y, gamma, beta})
    if (address % 4 != 0) bad_value("an address is not aligned");
  if (rows > 0 && columns > 0 && (x == 0 || y == 0)) bad_value("an address is null");
  const LayerNorm norm{reinterpret_cast<const float*>(x), reinterpret_cast<float*>(y),
                       reinterpret_cast<const float*>(gamma),
                       reinterpret_cast<const float*>(beta), rows, columns, eps};
  nb::gil_scoped_release release;
  run_layer_norm(norm, threads, kernels_at(isa < 0 ? active_index() : isa));
}

}  // namespace

void bind_attention(nanobind::module_& m) {
  m.def("attention_ptr", &attention_ptr, nb::arg("q_ptr"), nb::arg("k_ptr"), nb::arg("v_ptr"),
        nb::arg("out_ptr"), nb::arg("sizes"), nb::arg("strides"), nb::arg("scale"),
        nb::arg("mask_ptr") = 0, nb::arg("mask_kind") = 0, nb::arg("causal") = false,
        nb::arg("threads") = 1, nb::arg("isa") = -1);
  m.def("layer_norm_ptr", &layer_norm_ptr, nb::arg("x_ptr"), nb::arg("y_ptr"),
        nb::arg("gamma_ptr"), nb::arg("beta_ptr"), nb::arg("rows"), nb::arg("columns"),
        nb::arg("eps"), nb::arg("threads") = 1, nb::arg("isa") = -1);
}

}  // namespace prunus
