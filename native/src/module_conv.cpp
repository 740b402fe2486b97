// Convolutions in the Python module: one, several that feed each other, the weight's gradient.
#include <nanobind/stl/array.h>

#include <array>
#include <vector>

#include "module.h"
#include "net.h"

namespace nb = nanobind;

namespace prunus {
namespace {

// batch, channels, groups; then for the vertical and the horizontal axis: input size, output size,
// kernel, stride, dilation, zeros before.
using Geometry = std::array<int64_t, 15>;
constexpr int64_t kMostSize = int64_t{1} << 29;

Conv checked_conv(const Geometry& g, const Weight& w) {
  for (size_t i = 0; i < g.size(); ++i) {
    const bool counted = i == 2 || (i > 4 && i < 8) || (i > 10 && i < 14);  // at least one
    if (g[i] < (counted ? 1 : 0) || g[i] > kMostSize)
      bad_value("number " + std::to_string(i) + " of the geometry is out of range");
  }
  if ((g[5] - 1) * g[7] > kMostSize || (g[11] - 1) * g[13] > kMostSize)
    bad_value("the kernel reaches too far; kernel size times dilation must stay below 2^29");
  Conv c{};
  c.batch = g[0];
  c.channels = g[1];
  c.groups = g[2];
  c.down = {g[3], g[4], g[5], g[6], g[7], g[8], false, 0, 0, 0, 0};
  c.across = {g[9], g[10], g[11], g[12], g[13], g[14], false, 0, 0, 0, 0};
  if (c.channels % c.groups != 0 || w.rows % c.groups != 0)
    bad_value("channels and rows must be multiples of the groups");
  if (static_cast<double>(c.channels / c.groups) * c.down.kernel * c.across.kernel != w.cols)
    fail("ShapeError", "the blob's columns are not channels / groups * kernel height * width");
  return c;
}

// All of a convolution but its strides; false if it has no output.
bool finish_conv(Call& call, const Geometry& geometry) {
  call.layout = Layout::conv;
  call.conv = checked_conv(geometry, call.w);
  if (conv_pixels(call.conv) == 0 || call.conv.batch == 0) return false;
  if (is_pointwise(call.w, call.conv)) {
    call.conv.positions = conv_pixels(call.conv) * call.conv.batch;
  } else if (!plan_conv(call.conv, call.kernels->panel)) {
    bad_value("the kernel reaches too far for its workspace, or there are 2^31 pixels or more");
  }
  call.n = call.conv.positions;
  return true;
}

void conv_ptr(uintptr_t blob, uintptr_t x, uintptr_t y, const Geometry& geometry, uintptr_t bias,
              uint32_t flags, int threads, int isa, uintptr_t residual) {
  checked_blob(blob);  // groups have no convolution
  Call call = checked_call(blob, x, y, geometry[0], bias, residual, flags, threads, isa);
  if (!finish_conv(call, geometry)) return;
  call.ldx = call.conv.down.in * call.conv.across.in;
  call.ldy = conv_pixels(call.conv);
  execute(call);
}

// One step of a network as the caller describes it: addresses of blob and bias, flags, where input,
// residual and output lie (see net.h), floats between planes of input, output
// and residual, the geometry of one image.
struct StepRow {
  int64_t blob, bias, flags, input, residual, output, ldx, ldy, ldr;
  Geometry geometry;
};
static_assert(sizeof(StepRow) == 24 * sizeof(int64_t), "rows are read from one array of numbers");

// Planes of a value lie within the memory it is said to be in. Outside of `floats` they follow each
// other without gaps.
void check_value(const NetCall& net, int64_t at, int64_t planes, int64_t pixels, int64_t stride) {
  const bool held = at >= 0;
  const int64_t room = held ? net.floats - at : at == kNetInput ? net.floats_in : net.floats_out;
  if (at < kNetOutput || stride < pixels || stride > kMostSize || (!held && stride != pixels) ||
      static_cast<double>(planes) * static_cast<double>(stride) > static_cast<double>(room))
    bad_value("a value of the network does not lie where its step says");
}

NetStep checked_step(const NetCall& net, const StepRow& row, int isa) {
  const auto x = reinterpret_cast<uintptr_t>(net.x), y = reinterpret_cast<uintptr_t>(net.y);
  checked_blob(static_cast<uintptr_t>(row.blob));
  if (row.flags < 0 || row.flags > kRelu6 || row.output == kNetInput || row.input == kNetOutput ||
      row.residual == kNetOutput || row.geometry[0] != 1)
    bad_value("a step of the network has unknown flags, reads the output, or takes several images");
  NetStep step{};
  step.call = checked_call(static_cast<uintptr_t>(row.blob), x, y, 1,
                           static_cast<uintptr_t>(row.bias), 0, static_cast<uint32_t>(row.flags),
                           net.threads, isa);
  Call& call = step.call;
  if (!finish_conv(call, row.geometry)) bad_value("a step of the network has no output");
  const int64_t seen = call.conv.down.in * call.conv.across.in, made = conv_pixels(call.conv);
  check_value(net, row.input, call.conv.channels, seen, row.ldx);
  check_value(net, row.output, call.w.rows, made, row.ldy);
  if (row.residual != kNetNothing) check_value(net, row.residual, call.w.rows, made, row.ldr);
  call.ldx = row.ldx;
  call.ldy = row.ldy;
  call.skew = row.residual == kNetNothing ? 0 : row.ldr - row.ldy;
  call.padded_in = row.input >= 0 && row.ldx % kNetAlignment == 0;
  call.padded_out = row.output >= 0 && row.ldy % kNetAlignment == 0 && row.residual != kNetInput;
  step.input = row.input;
  step.residual = row.residual;
  step.output = row.output;
  return step;
}

// rows: address of `count` StepRow; x and y: images of floats_in and floats_out floats.
void net_ptr(uintptr_t rows, int64_t count, int64_t images, uintptr_t x, uintptr_t y,
             int64_t floats_in, int64_t floats_out, int64_t floats, int threads, int isa) {
  if (rows == 0 || rows % 8 != 0 || count < 1 || images < 0 || threads < 1 || floats < 0 ||
      floats_in < 1 || floats_out < 1)
    bad_value("a network has at least one step, and sizes of at least 0");
  NetCall net{nullptr, count, images, reinterpret_cast<const float*>(x),
              reinterpret_cast<float*>(y), floats_in, floats_out, floats, threads};
  check_floats("x", x, true);
  check_floats("y", y, true);
  const auto* described = reinterpret_cast<const StepRow*>(rows);
  std::vector<NetStep> steps;
  steps.reserve(static_cast<size_t>(count));
  for (int64_t i = 0; i < count; ++i) steps.push_back(checked_step(net, described[i], isa));
  net.steps = steps.data();
  bool ok;
  {
    nb::gil_scoped_release release;
    ok = run_net(net);
  }
  if (!ok) throw std::bad_alloc();
}

// out[nnz] = the gradient to the non-zeros of a convolution's weight, from its input and the
// gradient to its output.
void conv_grad_ptr(uintptr_t blob, uintptr_t x, uintptr_t g, uintptr_t out,
                   const Geometry& geometry, int threads, int isa) {
  SampledCall call = checked_sampled(blob, x, g, out, geometry[0], false, threads, isa);
  Conv conv = checked_conv(geometry, call.pattern);
  const int64_t pixels = conv_pixels(conv);
  call.n = 0;
  if (pixels > 0 && conv.batch > 0) {
    if (!plan_conv(conv, call.kernels->panel))
      bad_value("the kernel reaches too far for its workspace, or there are 2^31 pixels or more");
    call.n = conv.positions;
  }
  call.conv = &conv;
  call.ldx = conv.down.in * conv.across.in;
  call.ldg = pixels;
  execute(call);
}

}  // namespace

void bind_convolutions(nb::module_& m) {
  m.def("conv_ptr", &conv_ptr, nb::arg("blob_ptr"), nb::arg("x_ptr"), nb::arg("y_ptr"),
        nb::arg("geometry"), nb::arg("bias_ptr") = 0, nb::arg("flags") = 0, nb::arg("threads") = 1,
        nb::arg("isa") = -1, nb::arg("residual_ptr") = 0);
  m.def("net_ptr", &net_ptr, nb::arg("rows_ptr"), nb::arg("count"), nb::arg("images"),
        nb::arg("x_ptr"), nb::arg("y_ptr"), nb::arg("floats_in"), nb::arg("floats_out"),
        nb::arg("floats"), nb::arg("threads") = 1, nb::arg("isa") = -1);
  m.def("conv_grad_ptr", &conv_grad_ptr, nb::arg("blob_ptr"), nb::arg("x_ptr"), nb::arg("g_ptr"),
        nb::arg("out_ptr"), nb::arg("geometry"), nb::arg("threads") = 1, nb::arg("isa") = -1);
}

}  // namespace prunus
