#include "run.h"

#include <algorithm>
#include <atomic>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "groups.h"
#include "pool.h"
#include "workspace.h"

namespace prunus {
namespace {

constexpr int kMaxThreads = 256;
constexpr int64_t kRowCost = 4;  // of a row without non-zeros, in non-zeros

// For convolutions. Unrolled copies cost more to fill than they save unless they are much smaller.
constexpr double kUnrolledCost = 1.33;
constexpr double kMostFloats = 1 << 28;       // of a panel: a gigabyte
constexpr int64_t kCachedFloats = 80 * 1024;  // of the panels that are filled at once
constexpr int64_t kMostPanels = 8;
constexpr double kFarFloats = 1 << 20;  // inputs from here on are asked for ahead of time

std::atomic<int64_t> least_work{1 << 20};

thread_local Workspace workspace;
thread_local Workspace between;  // the panels between the layers of a chain

// Work of the rows before `row`, summed over the column blocks.
int64_t work_before(const Weight& w, int64_t row) {
  int64_t total = row * kRowCost;
  if (w.tile != 0) return total + w.starts[(row + w.tile - 1) / w.tile];
  for (uint32_t b = 0; b < w.blocks; ++b) {
    const uint32_t* offsets = w.offsets + b * w.rows;
    total += static_cast<int64_t>(offsets[row]) - offsets[0];
  }
  return total;
}

struct Plan {
  Task task;  // without its share and workspace
  KernelFunction kernel;
  int64_t panel, panels, work;  // columns per panel, panels, work of one panel
  int64_t floats;  // of the workspace
  int parts;

  // The position where share `index` begins: work is panels * work, cut into equal pieces.
  void position(int index, int64_t* at_panel, int64_t* at_row) const {
    const double exact = static_cast<double>(panels) * static_cast<double>(work) * index / parts;
    const int64_t target = std::min<int64_t>(static_cast<int64_t>(exact), panels * work);
    *at_panel = index == parts ? panels : std::min(target / work, panels);
    *at_row = 0;
    if (index == 0 || *at_panel == panels) return;
    const int64_t rest = target - *at_panel * work;
    const int64_t group = task.w.tile != 0 ? task.w.tile : kRowGroup;
    int64_t low = 0, high = (task.w.rows + group - 1) / group;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (work_before(task.w, std::min(middle * group, task.w.rows)) < rest) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    *at_row = std::min(low * group, task.w.rows);
  }
};

bool run_share(void* context, int index) {
  const Plan& plan = *static_cast<const Plan*>(context);
  Task task = plan.task;
  plan.position(index, &task.begin_panel, &task.begin_row);
  plan.position(index + 1, &task.end_panel, &task.end_row);
  if (plan.floats > 0) {
    task.workspace = workspace.at_least(plan.floats);
    if (task.workspace == nullptr) return false;
  }
  plan.kernel(task);
  return true;
}

// Runs of pixels of one image instead of panels, and no workspace.
void plan_points(const Call& call, Plan& plan) {
  const int64_t pixels = conv_pixels(call.conv);
  plan.task.conv = &call.conv;
  plan.task.n = pixels;
  plan.kernel = call.kernels->pointwise_f32;
  plan.panel = call.kernels->panel * kPointPanels;
  plan.panels = (pixels + plan.panel - 1) / plan.panel * call.conv.batch;
}

int64_t floats_of(const Call& call, int64_t panel) {
  if (panel == 1) return 0;
  if (call.layout != Layout::conv) return workspace_floats(call.w, panel);
  return conv_workspace_floats(call.w, call.conv, panel / call.conv.panels);
}

// Outputs from here on often come fresh from the system: glibc keeps nothing over 32 MiB.
constexpr int64_t kFreshBytes = int64_t{8} << 20;

// Lets the system back a large output with huge pages: touching 4 KiB pages one by one costs more
// than most products. A hint; nothing depends on it.
void expect_large(const Call& call) {
#if defined(MADV_HUGEPAGE)
  const Conv& c = call.conv;
  const int64_t columns = call.layout == Layout::conv ? c.batch * c.down.out * c.across.out : call.n;
  const int64_t bytes = columns * call.w.rows * int64_t{sizeof(float)};
  if (bytes < kFreshBytes || (call.layout == Layout::planes && call.ldy != call.n)) return;
  constexpr uintptr_t kPage = uintptr_t{2} << 20;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(call.y) + kPage - 1) / kPage * kPage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(call.y) + bytes) / kPage * kPage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)call;
#endif
}

}  // namespace

int64_t grain() { return least_work.load(std::memory_order_relaxed); }
void set_grain(int64_t multiply_adds) {
  least_work.store(std::max<int64_t>(1, multiply_adds), std::memory_order_relaxed);
}

double fold_conv(Conv& conv, int64_t panel) {
  const Conv bare = conv;
  double least = 0;
  for (const bool unroll_down : {false, true})
    for (const bool unroll_across : {false, true}) {
      Conv form = bare;
      finish_axis(form.down, unroll_down);
      finish_axis(form.across, unroll_across);
      form.length = conv_length(form, panel);
      const double floats = static_cast<double>(conv_copies(form)) *
                            static_cast<double>(form.length) *
                            (unroll_down || unroll_across ? kUnrolledCost : 1.0);
      if (least != 0 && floats >= least) continue;
      least = floats;
      conv = form;
    }
  return least;
}

bool plan_conv(Conv& conv, int64_t panel) {
  conv.panels = 1;
  const double least = fold_conv(conv, panel);
  const double positions = static_cast<double>(conv.batch) *
                           static_cast<double>(conv.down.extent) *
                           static_cast<double>(conv.across.extent);
  if (least * static_cast<double>(conv.channels) > kMostFloats || positions > INT32_MAX)
    return false;
  conv.positions = conv_positions(conv);
  conv.far = static_cast<double>(conv.batch) * static_cast<double>(conv.channels) *
                 static_cast<double>(conv.down.in) * static_cast<double>(conv.across.in) >
             kFarFloats;
  // Several panels at once share the input around them, as long as the second-level cache holds it.
  for (int64_t panels = 2; panels <= kMostPanels; panels *= 2) {
    Conv wider = conv;
    wider.panels = panels;
    wider.length = conv_length(wider, panel);
    if (conv_panel_floats(wider) > kCachedFloats || panels / 2 * panel >= conv.positions) break;
    conv = wider;
  }
  return true;
}

bool run(const Call& call) {
  const Weight& w = call.w;
  if (call.n == 0 || w.rows == 0) return true;
  expect_large(call);
  if (call.layout == Layout::conv && suits_groups(w, call.conv)) return run_groups(call);
  Plan plan{};
  plan.task.w = w;
  plan.task.x = call.x;
  plan.task.ldx = call.ldx;
  plan.task.y = call.y;
  plan.task.ldy = call.ldy;
  plan.task.n = call.n;
  plan.task.bias = call.bias;
  plan.task.residual = call.residual;
  plan.task.flags = call.flags;
  plan.task.skew = call.skew;
  plan.task.padded_in = call.padded_in;
  plan.task.padded_out = call.padded_out;
  const bool tokens = call.layout == Layout::tokens;
  const bool points = call.layout == Layout::conv && is_pointwise(w, call.conv);
  if (points) {
    plan_points(call, plan);
  } else if (call.layout == Layout::conv) {
    plan.task.conv = &call.conv;
    plan.kernel = call.kernels->conv_f32;
    plan.panel = call.kernels->panel * call.conv.panels;
  } else if (call.n == 1 && (tokens || call.ldx == 1)) {
    plan.kernel = call.kernels->spmv_f32;
    plan.panel = 1;
    if (tokens) plan.task.ldy = 1;
  } else if (w.tile != 0) {
    plan.kernel = tokens ? call.kernels->tiled_tokens_f32 : call.kernels->tiled_planes_f32;
    plan.panel = call.kernels->panel;
  } else {
    plan.kernel = tokens ? call.kernels->spmm_tokens_f32 : call.kernels->spmm_planes_f32;
    plan.panel = call.kernels->panel;
  }
  if (!points) {
    plan.panels = (call.n + plan.panel - 1) / plan.panel;
    plan.floats = floats_of(call, plan.panel);
  }
  plan.work = work_before(w, w.rows);
  const double work = static_cast<double>(plan.work) * static_cast<double>(call.n);
  // A matrix-vector product spends about four times as long on each non-zero and column.
  const int64_t least = plan.panel > 1 ? grain() : std::max<int64_t>(1, grain() / 4);
  const double useful = std::min(work / static_cast<double>(least), double{kMaxThreads});
  plan.parts = std::max(1, std::min(call.threads, static_cast<int>(useful)));
  return run_parts(plan.parts, run_share, &plan);
}

namespace {

struct ChainPlan {
  const ChainCall& call;
  int64_t panel, panels, widest;  // widest: floats of the widest panel between two layers
  int parts;
};

bool run_chain_panel(const ChainPlan& plan, int64_t index, float* held) {
  const ChainCall& call = plan.call;
  for (int i = 0; i < call.count; ++i) {
    const ChainLayer& layer = call.layers[i];
    Task task{};
    task.w = layer.w;
    task.bias = layer.bias;
    task.flags = layer.flags;
    task.n = call.n;
    task.begin_panel = index;
    task.end_panel = index + 1;
    task.panel_in = i > 0;
    task.panel_out = i + 1 < call.count;
    task.x = task.panel_in ? held + (i - 1) % 2 * plan.widest : call.x;
    task.y = task.panel_out ? held + i % 2 * plan.widest : call.y;
    task.ldx = layer.w.cols;
    task.ldy = layer.w.rows;
    task.residual = task.panel_out ? nullptr : call.residual;
    task.workspace = workspace.at_least(workspace_floats(layer.w, plan.panel));
    if (task.workspace == nullptr) return false;
    call.kernels->tiled_tokens_f32(task);
  }
  return true;
}

bool run_chain_share(void* context, int index) {
  const ChainPlan& plan = *static_cast<const ChainPlan*>(context);
  float* held = between.at_least(2 * plan.widest);
  if (held == nullptr) return false;
  const int64_t end = plan.panels * (index + 1) / plan.parts;
  for (int64_t p = plan.panels * index / plan.parts; p < end; ++p)
    if (!run_chain_panel(plan, p, held)) return false;
  return true;
}

// One layer after another: for a single token, which is no panel, and where there are fewer panels
// than threads, as these can share the rows of a layer.
bool run_layers(const ChainCall& call) {
  int64_t widest = 0;
  for (int i = 0; i + 1 < call.count; ++i) widest = std::max(widest, call.layers[i].w.rows);
  float* held = between.at_least(2 * widest * call.n);
  if (held == nullptr) return false;
  for (int i = 0; i < call.count; ++i) {
    const ChainLayer& layer = call.layers[i];
    const bool last = i + 1 == call.count;
    Call one{};
    one.w = layer.w;
    one.layout = Layout::tokens;
    one.x = i == 0 ? call.x : held + (i - 1) % 2 * widest * call.n;
    one.ldx = layer.w.cols;
    one.y = last ? call.y : held + i % 2 * widest * call.n;
    one.ldy = layer.w.rows;
    one.n = call.n;
    one.bias = layer.bias;
    one.residual = last ? call.residual : nullptr;
    one.flags = layer.flags;
    one.threads = call.threads;
    one.kernels = call.kernels;
    if (!run(one)) return false;
  }
  return true;
}

}  // namespace

bool run_chain(const ChainCall& call) {
  if (call.n == 0) return true;
  const int64_t panel = call.kernels->panel;
  ChainPlan plan{call, panel, (call.n + panel - 1) / panel, 0, 1};
  if (call.n == 1 || plan.panels < call.threads) return run_layers(call);
  double work = 0;
  for (int i = 0; i < call.count; ++i) {
    const Weight& w = call.layers[i].w;
    work += static_cast<double>(work_before(w, w.rows)) * static_cast<double>(call.n);
    if (i + 1 < call.count) plan.widest = std::max(plan.widest, (w.rows + kRowGroup) * panel);
  }
  const double useful = std::min(work / static_cast<double>(grain()), double{kMaxThreads});
  const int threads = std::max(1, std::min(call.threads, static_cast<int>(useful)));
  plan.parts = static_cast<int>(std::min<int64_t>(threads, plan.panels));
  return run_parts(plan.parts, run_chain_share, &plan);
}

}  // namespace prunus
