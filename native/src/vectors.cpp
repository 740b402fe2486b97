// Products with weights in groups: shares of equal work, in groups and panels.
#include "vectors.h"

#include <algorithm>

#include "pool.h"
#include "run.h"
#include "workspace.h"

namespace prunus {
namespace {

thread_local Workspace workspace;

constexpr int64_t kGroupCost = 8;  // of a group without columns, in columns

struct Plan {
  Task task;
  KernelFunction kernel;
  int64_t panels, panel, work;  // work of one panel
  int parts;

  int64_t work_before(int64_t group) const {
    return group * kGroupCost + task.vectors->offsets[group];
  }

  // The panel and group where share `index` begins. Rows in any order leave in whole panels.
  void position(int index, int64_t* at_panel, int64_t* at_group) const {
    const double exact = static_cast<double>(panels) * static_cast<double>(work) * index / parts;
    const int64_t target = std::min<int64_t>(static_cast<int64_t>(exact), panels * work);
    *at_panel = index == parts ? panels : std::min(target / work, panels);
    *at_group = 0;
    if (index == 0 || *at_panel == panels || task.vectors->order != nullptr) return;
    const int64_t rest = target - *at_panel * work;
    int64_t low = 0, high = task.vectors->groups;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (work_before(middle) < rest) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    *at_group = low;
  }
};

bool run_share(void* context, int index) {
  const Plan& plan = *static_cast<const Plan*>(context);
  Task task = plan.task;
  plan.position(index, &task.begin_panel, &task.begin_row);
  plan.position(index + 1, &task.end_panel, &task.end_row);
  task.workspace = workspace.at_least(vector_workspace_floats(*task.vectors, plan.panel));
  if (task.workspace == nullptr) return false;
  plan.kernel(task);
  return true;
}

}  // namespace

bool run_vectors(const Call& call) {
  const Vectors& w = call.vectors;
  if (call.n == 0 || w.rows == 0) return true;
  Plan plan{};
  plan.task.w.rows = w.rows;
  plan.task.w.cols = w.cols;
  plan.task.x = call.x;
  plan.task.ldx = call.ldx;
  plan.task.y = call.y;
  plan.task.ldy = call.ldy;
  plan.task.n = call.n;
  plan.task.bias = call.bias;
  plan.task.residual = call.residual;
  plan.task.flags = call.flags;
  plan.task.vectors = &w;
  const Kernels& k = *call.kernels;
  const bool tokens = call.layout == Layout::tokens;
  if (w.bytes) {
    plan.kernel = tokens ? k.vectors_tokens_i8 : k.vectors_planes_i8;
    plan.panel = k.byte_panel;
  } else if (w.pairs) {
    plan.kernel = tokens ? k.vectors_tokens_bf16 : k.vectors_planes_bf16;
    plan.panel = k.pair_panel;
  } else {
    plan.kernel = tokens ? k.vectors_tokens_f32 : k.vectors_planes_f32;
    plan.panel = k.vector_panel;
  }
  plan.panels = (call.n + plan.panel - 1) / plan.panel;
  plan.work = std::max<int64_t>(1, plan.work_before(w.groups));
  const double work =
      static_cast<double>(plan.work) * static_cast<double>(w.height) * static_cast<double>(call.n);
  const double useful = std::min(work / static_cast<double>(grain()), 256.0);
  plan.parts = std::max(1, std::min(call.threads, static_cast<int>(useful)));
  if (w.order != nullptr)
    plan.parts = static_cast<int>(std::min<int64_t>(plan.parts, plan.panels));
  return run_parts(plan.parts, run_share, &plan);
}

}  // namespace prunus
