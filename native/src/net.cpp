#include "net.h"

#include <algorithm>
#include <atomic>
#include <cstring>

#include "pool.h"
#include "workspace.h"

namespace prunus {
namespace {

thread_local Workspace workspace;
thread_local int64_t cleared = 0;

// Room for the values between the steps. What lies behind a plane is multiplied, too, and thrown
// away: it is zero at first, as numbers close to zero are slow.
float* between_steps(int64_t floats) {
  float* held = workspace.at_least(std::max<int64_t>(floats, 1));
  if (held == nullptr) {
    cleared = 0;
  } else if (floats > cleared) {
    std::memset(held, 0, static_cast<size_t>(floats) * sizeof(float));
    cleared = floats;
  }
  return held;
}

bool run_image(const NetCall& net, int64_t image, int threads) {
  float* held = between_steps(net.floats);
  if (held == nullptr) return false;
  const float* x = net.x + image * net.floats_in;
  for (const NetStep* step = net.steps; step != net.steps + net.count; ++step) {
    Call call = step->call;
    const auto source = [&](int64_t at) { return at == kNetInput ? x : held + at; };
    call.x = source(step->input);
    call.residual = step->residual == kNetNothing ? nullptr : source(step->residual);
    call.y = step->output == kNetOutput ? net.y + image * net.floats_out : held + step->output;
    call.threads = threads;
    if (!run(call)) return false;
  }
  return true;
}

// Images that are taken one by one by whoever is free.
struct Images {
  const NetCall& net;
  const int64_t count;
  std::atomic<int64_t> next;
};

bool run_some(void* context, int) {
  auto& images = *static_cast<Images*>(context);
  for (int64_t i = images.next.fetch_add(1); i < images.count; i = images.next.fetch_add(1))
    if (!run_image(images.net, i, 1)) return false;
  return true;
}

}  // namespace

// As many images as all threads can share evenly go one to a thread, the rest one after another.
bool run_net(const NetCall& net) {
  Images images{net, net.threads > 1 ? net.images / net.threads * net.threads : 0, {0}};
  if (images.count > 0 && !run_parts(net.threads, run_some, &images)) return false;
  for (int64_t image = images.count; image < net.images; ++image)
    if (!run_image(net, image, net.threads)) return false;
  return true;
}

}  // namespace prunus
