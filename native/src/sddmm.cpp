#include "sddmm.h"

#include <algorithm>

#include "pool.h"
#include "run.h"
#include "workspace.h"

namespace prunus {
namespace {

constexpr int kMaxParts = 256;
// Of any instruction set, as sddmm-inl.h cuts them: floats of a panel row, and rows of a panel.
constexpr int64_t kLongestPanel = 128;
constexpr int64_t kLongestColumns = 1024;

thread_local Workspace scratch;

struct Shares {
  Task task;
  KernelFunction kernel;
  int64_t panel;
  int parts;

  int64_t nonzeros_before(int64_t row) const {
    int64_t total = 0;
    for (uint32_t b = 0; b < task.w.blocks; ++b) {
      const uint32_t* offsets = task.w.offsets + b * task.w.rows;
      total += static_cast<int64_t>(offsets[row]) - offsets[0];
    }
    return total;
  }

  // The first row of share `index`, a multiple of kRowGroup.
  int64_t row(int index) const {
    if (index == parts) return task.w.rows;
    const int64_t target = task.w.nnz / parts * index;
    int64_t low = 0, high = (task.w.rows + kRowGroup - 1) / kRowGroup;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (nonzeros_before(std::min(middle * kRowGroup, task.w.rows)) < target) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    return std::min(low * kRowGroup, task.w.rows);
  }
};

bool run_share(void* context, int index) {
  const Shares& shares = *static_cast<const Shares*>(context);
  Task task = shares.task;
  task.begin_row = shares.row(index);
  task.end_row = shares.row(index + 1);
  if (task.begin_row >= task.end_row) return true;
  const int64_t rows = task.end_row - task.begin_row;
  task.workspace = scratch.at_least(
      task.conv != nullptr ? grad_workspace_floats(task.w, *task.conv, shares.panel)
                           : (kLongestColumns + rows + 2 * kRowGroup) * kLongestPanel + rows);
  if (task.workspace == nullptr) return false;
  shares.kernel(task);
  return true;
}

}  // namespace

bool run_sampled(const SampledCall& call) {
  const Weight& w = call.pattern;
  if (w.nnz == 0) return true;
  if (call.n == 0) {
    if (!call.accumulate) std::fill(call.out, call.out + w.nnz, 0.0f);
    return true;
  }
  Shares shares{};
  shares.task.w = w;
  shares.task.x = call.x;
  shares.task.ldx = call.ldx;
  shares.task.g = call.g;
  shares.task.ldg = call.ldg;
  shares.task.conv = call.conv;
  shares.task.y = call.out;
  shares.task.n = call.n;
  shares.task.flags = call.accumulate ? kAccumulate : 0u;
  shares.kernel = call.conv != nullptr ? call.kernels->conv_grad_f32
                  : call.tokens        ? call.kernels->sddmm_tokens_f32
                                       : call.kernels->sddmm_planes_f32;
  shares.panel = call.kernels->panel;
  const double work = static_cast<double>(w.nnz) * static_cast<double>(call.n);
  const double useful = std::min(work / static_cast<double>(grain()), double{kMaxParts});
  shares.parts = std::max(1, std::min(call.threads, static_cast<int>(useful)));
  return run_parts(shares.parts, run_share, &shares);
}

}  // namespace prunus
