#include "norm.h"

#include <algorithm>
#include <cmath>

#include "kernel.h"
#include "pool.h"
#include "run.h"

namespace prunus {
namespace {

constexpr int kMaxParts = 256;
constexpr int64_t kWorkPerElement = 8;  // in multiply-adds: it is read three times

struct Shares {
  const LayerNorm* norm;
  KernelFunction kernel;
  int parts;
};

bool run_share(void* context, int index) {
  const Shares& shares = *static_cast<const Shares*>(context);
  Task task{};
  task.norm = shares.norm;
  task.begin_row = shares.norm->rows * index / shares.parts;
  task.end_row = shares.norm->rows * (index + 1) / shares.parts;
  shares.kernel(task);
  return true;
}

}  // namespace

void run_layer_norm(const LayerNorm& norm, int threads, const Kernels& kernels) {
  if (norm.rows == 0 || norm.columns == 0) return;
  const int64_t useful = norm.rows * norm.columns / std::max<int64_t>(1, grain() / kWorkPerElement);
  const int64_t parts = std::min<int64_t>({threads, useful, norm.rows, kMaxParts});
  LayerNorm rooted = norm;
  rooted.root = [](float value) { return std::sqrt(value); };
  Shares shares{&rooted, kernels.layer_norm_f32, static_cast<int>(std::max<int64_t>(1, parts))};
  run_parts(shares.parts, run_share, &shares);
}

}  // namespace prunus
