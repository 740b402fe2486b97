// The kernels for depthwise convolutions and full weights, against a loop in double precision; every
// buffer has its exact size. Called by driver.cpp.
#include <cmath>
#include <cstdio>
#include <memory>
#include <random>
#include <vector>

#include "dispatch.h"
#include "groups.h"

using namespace prunus;

namespace {

std::mt19937 rng(20251122);

int64_t between(int64_t low, int64_t high) { return low + static_cast<int64_t>(rng() % (high - low + 1)); }

std::unique_ptr<float[]> noise(size_t count) {
  std::unique_ptr<float[]> data(new float[count]);
  std::uniform_real_distribution<float> draw(-1.0f, 1.0f);
  for (size_t i = 0; i < count; ++i) data[i] = draw(rng);
  return data;
}

// A weight in buffers of their exact size; about `zeros` of it is missing.
struct Matrix {
  std::vector<uint32_t> offsets;
  std::vector<uint16_t> columns;
  std::unique_ptr<float[]> values;
  Weight w{};

  Matrix(int64_t rows, int64_t cols, double zeros) {
    std::bernoulli_distribution drop(zeros);
    offsets.push_back(0);
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = 0; c < cols; ++c)
        if (!drop(rng)) columns.push_back(static_cast<uint16_t>(c));
      offsets.push_back(static_cast<uint32_t>(columns.size()));
    }
    columns.shrink_to_fit();
    values = noise(columns.size());
    w.rows = rows;
    w.cols = cols;
    w.nnz = static_cast<int64_t>(columns.size());
    w.block = 65536;
    w.blocks = 1;
    w.offsets = offsets.data();
    w.columns = columns.data();
    w.values = values.get();
  }
};

Axis axis(int64_t in, int64_t kernel, int64_t stride, int64_t dilation, int64_t before,
          int64_t after) {
  Axis a{};
  a.in = in;
  a.kernel = kernel;
  a.stride = stride;
  a.dilation = dilation;
  a.before = before;
  a.out = (in + before + after - dilation * (kernel - 1) - 1) / stride + 1;
  return a;
}

// A depthwise convolution with one of the kernel's own shapes, or any grouped or full one.
Conv geometry(bool depthwise) {
  for (;;) {
    Conv c{};
    c.batch = between(1, 3);
    c.groups = depthwise || rng() % 2 ? between(1, 5) : 1;
    c.channels = depthwise ? c.groups : c.groups * between(1, 4);
    const int64_t sizes[] = {1, 2, 3, 4, 5, 7, 8, 9, 13, 14, 15, 16, 17, 28, 31, 33, 37};
    const int64_t kernel = depthwise ? 3 + 2 * between(0, 2) : between(1, 5);
    const int64_t stride = between(1, depthwise ? 2 : 3), dilation = depthwise ? 1 : between(1, 3);
    const int64_t height = sizes[rng() % 17], width = sizes[rng() % 17];
    const int64_t across = depthwise ? kernel : between(1, 5);
    const int64_t reach = dilation * (kernel - 1) + 1, wide = dilation * (across - 1) + 1;
    const int64_t most = depthwise ? (rng() % 4 == 0 ? 20 : kernel) : 4;
    const int64_t top = between(0, most), left = between(0, most);
    const int64_t below = between(0, most), right = between(0, most);
    if (height + top + below < reach || width + left + right < wide) continue;
    c.down = axis(height, kernel, stride, dilation, top, below);
    c.across = axis(width, across, stride, dilation, left, right);
    return c;
  }
}

// (sum, sum of magnitudes, terms) of one output.
struct Sum {
  double exact, scale;
  int terms;
};

Sum output(const Conv& c, const Weight& w, const float* x, int64_t image, int64_t row, int64_t i,
           int64_t j) {
  Sum sum{0, 0, 3};
  const int64_t channels = c.channels / c.groups, area = c.down.kernel * c.across.kernel;
  for (uint32_t at = w.offsets[row]; at < w.offsets[row + 1]; ++at) {
    const int64_t channel = w.columns[at] / area, tap = w.columns[at] % area;
    const int64_t v = i * c.down.stride + tap / c.across.kernel * c.down.dilation - c.down.before;
    const int64_t h =
        j * c.across.stride + tap % c.across.kernel * c.across.dilation - c.across.before;
    if (v < 0 || v >= c.down.in || h < 0 || h >= c.across.in) continue;
    const int64_t plane = image * c.channels + row / (w.rows / c.groups) * channels + channel;
    const double term = static_cast<double>(w.values[at]) *
                        x[(plane * c.down.in + v) * c.across.in + h];
    sum.exact += term;
    sum.scale += std::fabs(term);
    ++sum.terms;
  }
  return sum;
}

bool group_case(int isa, bool depthwise) {
  Conv c = geometry(depthwise);
  const int64_t rows = c.groups * (rng() % 2 ? 1 : between(1, 9));
  const int64_t cols = c.channels / c.groups * c.down.kernel * c.across.kernel;
  const Matrix matrix(rows, cols, rng() % 3 == 0 ? 0.5 : 0.0);
  const Weight& w = matrix.w;
  const int64_t pixels = conv_pixels(c);
  const auto x = noise(c.batch * c.channels * c.down.in * c.across.in), bias = noise(rows);
  const auto residual = noise(c.batch * rows * pixels), y = noise(c.batch * rows * pixels);
  Call call{};
  call.w = w;
  call.layout = Layout::conv;
  call.kernels = &kernels_at(isa);
  call.x = x.get();
  call.ldx = c.down.in * c.across.in;
  call.y = y.get();
  call.ldy = pixels;
  call.bias = rng() % 2 ? bias.get() : nullptr;
  call.residual = rng() % 2 ? residual.get() : nullptr;
  call.flags = rng() % 3 == 0 ? kRelu : rng() % 3 == 0 ? kRelu6 : 0u;
  call.threads = static_cast<int>(between(1, 3));
  if (!plan_conv(c, call.kernels->panel)) return false;
  call.conv = c;
  call.n = c.positions;
  if (!run(call)) return false;
  int64_t at = 0;
  for (int64_t image = 0; image < c.batch; ++image)
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t i = 0; i < c.down.out; ++i)
        for (int64_t j = 0; j < c.across.out; ++j, ++at) {
          Sum sum = output(c, w, x.get(), image, row, i, j);
          for (const double added : {call.bias ? static_cast<double>(bias[row]) : 0.0,
                                     call.residual ? static_cast<double>(residual[at]) : 0.0}) {
            sum.exact += added;
            sum.scale += std::fabs(added);
          }
          double exact = sum.exact;
          if (call.flags && exact < 0) exact = 0;
          if (call.flags == kRelu6 && exact > 6) exact = 6;
          if (std::fabs(y[at] - exact) <= sum.terms * 1.2e-7 * sum.scale) continue;
          std::printf("%s groups: y[%ld] = %g, not %g\n", kernels_at(isa).isa,
                      static_cast<long>(at), y[at], exact);
          return false;
        }
  return true;
}

}  // namespace

int group_cases(int* done) {
  int failed = 0;
  for (int isa = 0; isa < available_count(); ++isa)
    for (int i = 0; i < 400; ++i, ++*done) failed += !group_case(isa, i % 2 == 0);
  return failed;
}
