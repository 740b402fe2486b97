#include "attention.h"

#include <algorithm>

#include "kernel.h"
#include "pool.h"
#include "run.h"
#include "workspace.h"

namespace prunus {
namespace {

constexpr int kMaxParts = 256;

thread_local Workspace scratch;

struct Shares {
  const Attention* attention;
  KernelFunction kernel;
  int64_t blocks;
  int parts;
};

bool run_share(void* context, int index) {
  const Shares& shares = *static_cast<const Shares*>(context);
  Task task{};
  task.attention = shares.attention;
  task.begin_row = shares.blocks * index / shares.parts;
  task.end_row = shares.blocks * (index + 1) / shares.parts;
  if (task.begin_row >= task.end_row) return true;
  task.workspace = scratch.at_least(attention_workspace_floats(*shares.attention));
  if (task.workspace == nullptr) return false;
  shares.kernel(task);
  return true;
}

}  // namespace

bool run_attention(const AttentionCall& call) {
  const Attention& a = call.attention;
  const int64_t block = call.kernels->query_block;
  const int64_t blocks = a.batch * a.heads * ((a.queries + block - 1) / block);
  if (blocks == 0 || a.value_dim == 0) return true;
  const double pairs = static_cast<double>(a.batch * a.heads) * static_cast<double>(a.queries) *
                       static_cast<double>(a.keys);
  const double work = pairs * static_cast<double>(a.dim + a.value_dim + 16);
  const double useful = std::min(work / static_cast<double>(grain()), double{kMaxParts});
  const int64_t parts = std::min<int64_t>(call.threads, static_cast<int64_t>(useful));
  Shares shares{&a, call.kernels->attention_f32, blocks,
                static_cast<int>(std::max<int64_t>(1, std::min(parts, blocks)))};
  return run_parts(shares.parts, run_share, &shares);
}

}  // namespace prunus
