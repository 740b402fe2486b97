// Products with n:m weights: shares of equal size, in groups of rows and panels of tokens.
#include "nm.h"

#include <algorithm>

#include "pool.h"
#include "run.h"
#include "workspace.h"

namespace prunus {
namespace {

constexpr double kMostThreads = 256;
constexpr int64_t kPieceGroups = kTileRows / kRowGroup;  // a share begins at such a group

thread_local Workspace workspace;

struct Plan {
  Task task;
  KernelFunction kernel;
  int64_t panels, pieces;  // pieces of one panel
  int parts;

  void position(int index, int64_t* at_panel, int64_t* at_row) const {
    const int64_t target = panels * pieces * index / parts;
    *at_panel = target / pieces;
    *at_row = target % pieces * kPieceGroups;
  }
};

bool run_share(void* context, int index) {
  const Plan& plan = *static_cast<const Plan*>(context);
  Task task = plan.task;
  plan.position(index, &task.begin_panel, &task.begin_row);
  plan.position(index + 1, &task.end_panel, &task.end_row);
  task.workspace = workspace.at_least(nm_workspace_floats(*task.nm, task.panel));
  if (task.workspace == nullptr) return false;
  plan.kernel(task);
  return true;
}

}  // namespace

bool run_nm(const NmCall& call) {
  const NmWeight& w = call.w;
  if (call.n == 0 || w.rows == 0) return true;
  Plan plan{};
  Task& task = plan.task;
  task.nm = &w;
  task.x = call.x;
  task.ldx = w.cols;
  task.y = call.y;
  task.ldy = w.rows;
  task.n = call.n;
  task.bias = call.bias;
  task.residual = call.residual;
  task.flags = call.flags;
  task.panel = nm_panel(w);
  plan.kernel = w.pairs ? call.kernels->nm_bf16 : call.kernels->nm_f32;
  plan.panels = (call.n + task.panel - 1) / task.panel;
  plan.pieces = (w.groups + kPieceGroups - 1) / kPieceGroups;
  const double work = static_cast<double>(w.groups * kRowGroup * (w.windows * w.slots + 1)) *
                      static_cast<double>(call.n);
  const double useful = std::min(work / static_cast<double>(grain()), kMostThreads);
  plan.parts = std::max(1, std::min(call.threads, static_cast<int>(useful)));
  return run_parts(plan.parts, run_share, &plan);
}

}  // namespace prunus
