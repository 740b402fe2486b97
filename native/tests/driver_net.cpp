// Convolutions that feed each other in one call, against one call for each, on exactly sized memory.
#include <cmath>
#include <cstdio>
#include <vector>

#include "dispatch.h"
#include "net.h"
#include "tests/blobs.h"

namespace {

using namespace driver;

constexpr int kSteps = 3;

// A 1x1 convolution, one of 3x3 that adds its input, another 1x1.
struct Net {
  int64_t width, side, pixels, stride;
  std::vector<Blob> blobs;
  NetStep steps[kSteps];
};

bool describe(Net& net, int isa) {
  net.blobs.resize(kSteps);
  const int64_t places[] = {kNetInput, 0, net.width * net.stride, kNetOutput};
  for (int i = 0; i < kSteps; ++i) {
    const int64_t kernel = i == 1 ? 3 : 1, cols = net.width * kernel * kernel;
    std::vector<float> dense(static_cast<size_t>(net.width * cols));
    for (float& value : dense) value = uniform() < 0.2 ? 0.0f : static_cast<float>(uniform());
    net.blobs[i] = pack(dense, net.width, cols, 65536);
    Call& call = net.steps[i].call;
    call.w = open_blob(net.blobs[i].bytes());
    call.layout = Layout::conv;
    call.kernels = &kernels_at(isa);
    call.flags = kRelu;
    call.conv.batch = call.conv.groups = 1;
    call.conv.channels = net.width;
    Axis& axis = call.conv.down;
    axis.in = axis.out = net.side;
    axis.kernel = kernel;
    axis.stride = axis.dilation = 1;
    axis.before = kernel / 2;
    call.conv.across = axis;
    if (!plan_conv(call.conv, call.kernels->panel)) return false;
    call.n = call.conv.positions;
    call.ldx = i == 0 ? net.pixels : net.stride;
    call.ldy = i == kSteps - 1 ? net.pixels : net.stride;
    call.padded_in = i > 0;
    call.padded_out = i < kSteps - 1;
    net.steps[i].input = places[i];
    net.steps[i].output = places[i + 1];
    net.steps[i].residual = i == 1 ? places[1] : kNetNothing;
  }
  return true;
}

// One image through one call after another; false if memory ran out.
bool one_by_one(const Net& net, const float* x, std::vector<float>& y) {
  std::vector<float> last(x, x + net.width * net.pixels);
  for (int i = 0; i < kSteps; ++i) {
    Call call = net.steps[i].call;
    y.assign(last.size(), 0.0f);
    call.x = last.data();
    call.y = y.data();
    call.residual = i == 1 ? last.data() : nullptr;
    call.ldx = call.ldy = net.pixels;
    call.padded_in = call.padded_out = false;
    call.threads = 1;
    if (!run(call)) return false;
    last = y;
  }
  return true;
}

bool net_case(int isa) {
  Net net{};
  net.width = 1 + static_cast<int64_t>(rng() % 20);
  net.side = 1 + static_cast<int64_t>(rng() % 12);
  net.pixels = net.side * net.side;
  net.stride = ((net.pixels + kNetAlignment - 1) / kNetAlignment | 1) * kNetAlignment;
  if (!describe(net, isa)) return false;
  const int64_t images = 1 + static_cast<int64_t>(rng() % 3), floats = net.width * net.pixels;
  const auto x = noise(static_cast<size_t>(images * floats));
  const auto y = noise(static_cast<size_t>(images * floats));
  const int threads = static_cast<int>(1 + rng() % 3);
  if (!run_net({net.steps, kSteps, images, x.get(), y.get(), floats, floats,
                2 * net.width * net.stride, threads}))
    return false;
  std::vector<float> wanted;
  for (int64_t image = 0; image < images; ++image) {
    if (!one_by_one(net, x.get() + image * floats, wanted)) return false;
    for (int64_t i = 0; i < floats; ++i) {
      const float found = y[static_cast<size_t>(image * floats + i)];
      const float exact = wanted[static_cast<size_t>(i)];
      if (std::fabs(found - exact) <= 1e-4f * (1 + std::fabs(exact))) continue;
      std::printf("%s net: y[%ld] = %g, not %g\n", kernels_at(isa).isa, static_cast<long>(i),
                  static_cast<double>(found), static_cast<double>(exact));
      return false;
    }
  }
  return true;
}

}  // namespace

int net_cases(int* done) {
  int failed = 0;
  for (int isa = 0; isa < available_count(); ++isa)
    for (int i = 0; i < 100; ++i, ++*done) failed += !net_case(isa);
  return failed;
}
