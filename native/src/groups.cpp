#include "groups.h"

#include <algorithm>

#include "pool.h"
#include "workspace.h"

namespace prunus {
namespace {

constexpr int kMaxParts = 256;
constexpr int64_t kMostColumns = 64;      // of a sparse weight: small groups, 8 channels of 3x3
constexpr int64_t kMostPanels = 64;       // of a band
constexpr int64_t kBandFloats = 16 * 1024;  // of a band's input, so that the caches hold it

thread_local Workspace workspace;

struct Units {
  Task task;
  KernelFunction kernel;
  GroupConv conv;
  int64_t panel, count, floats;  // floats: of the workspace
  int parts;
};

bool run_units(void* context, int index) {
  const Units& units = *static_cast<const Units*>(context);
  Task task = units.task;
  task.conv = &units.conv;
  task.begin_panel = units.count * index / units.parts;
  task.end_panel = units.count * (index + 1) / units.parts;
  if (task.begin_panel >= task.end_panel) return true;
  task.workspace = workspace.at_least(units.floats);
  if (task.workspace == nullptr) return false;
  units.kernel(task);
  return true;
}

// What the kernel for depthwise convolutions is made for.
bool is_depthwise(const Weight& w, const Conv& c) {
  const Axis &down = c.down, &across = c.across;
  const bool odd = down.kernel == 3 || down.kernel == 5 || down.kernel == 7;
  return is_full(w) && c.channels == c.groups && odd && across.kernel == down.kernel &&
         across.stride == down.stride && down.stride <= 2 && down.dilation == 1 &&
         across.dilation == 1;
}

// One group of one image, with as many panels to a band as the caches hold; bands of equal size.
void plan_bands(GroupConv& c, int64_t panel) {
  c.panels = 1;
  fold_conv(c, panel);
  c.positions = conv_positions(c);
  const int64_t least = (c.positions + panel - 1) / panel;
  int64_t most = std::min(least, kMostPanels);
  for (; most > 1; --most) {
    c.panels = most;
    if (c.channels * conv_copies(c) * conv_length(c, panel) <= kBandFloats) break;
  }
  const int64_t bands = (least + most - 1) / most;
  c.panels = (least + bands - 1) / bands;
  c.length = conv_length(c, panel);
}

GroupConv one_group(const Conv& whole) {
  GroupConv c{};
  static_cast<Conv&>(c) = whole;
  c.images = whole.batch;
  c.all_groups = whole.groups;
  c.batch = c.groups = 1;
  c.channels = whole.channels / whole.groups;
  return c;
}

}  // namespace

bool suits_groups(const Weight& w, const Conv& conv) {
  return is_full(w) || (conv.groups > 1 && w.cols <= kMostColumns);
}

bool run_groups(const Call& call) {
  Units units{};
  units.panel = call.kernels->panel;
  units.conv = one_group(call.conv);
  const GroupConv& c = units.conv;
  units.task.w = call.w;
  units.task.x = call.x;
  units.task.ldx = call.ldx;
  units.task.y = call.y;
  units.task.ldy = call.ldy;
  units.task.bias = call.bias;
  units.task.residual = call.residual;
  units.task.skew = call.skew;
  units.task.flags = call.flags;
  if (is_depthwise(call.w, call.conv)) {
    units.kernel = call.kernels->depthwise_f32;
    units.count = c.images * call.w.rows;
    units.floats = c.across.in + 16;
  } else {
    plan_bands(units.conv, units.panel);
    units.kernel = call.kernels->conv_groups_f32;
    const int64_t band = c.panels * units.panel;
    units.count = (c.positions + band - 1) / band * c.images * c.all_groups;
    units.floats = group_workspace_floats(call.w, c, units.panel);
  }
  units.task.n = c.positions;
  // Filling the panel costs about as much as four non-zeros a row.
  const double work = (static_cast<double>(call.w.nnz) + 4.0 * static_cast<double>(call.w.rows)) *
                      static_cast<double>(conv_pixels(c)) * static_cast<double>(c.images);
  const double useful = std::min(work / static_cast<double>(grain()), double{kMaxParts});
  units.parts = std::max(1, std::min(call.threads, static_cast<int>(useful)));
  return run_parts(units.parts, run_units, &units);
}

}  // namespace prunus
