#include "bitmap.h"

#include <algorithm>
#include <new>

#include "dispatch.h"
#include "pool.h"
#include "run.h"

namespace prunus {
namespace {

constexpr int kMostThreads = 256;
constexpr std::align_val_t kAlignment{64};
constexpr int64_t kColumnCost = 8;  // of a column of 16 rows without non-zeros, in non-zeros

// One per thread, kept and grown.
class Memory {
 public:
  ~Memory() { ::operator delete(data_, kAlignment); }

  float* at_least(int64_t floats) {
    if (floats > size_) {
      ::operator delete(data_, kAlignment);
      data_ = static_cast<float*>(::operator new(sizeof(float) * floats, kAlignment, std::nothrow));
      size_ = data_ == nullptr ? 0 : floats;
    }
    return data_;
  }

 private:
  float* data_ = nullptr;
  int64_t size_ = 0;
};

thread_local Memory memory;

int64_t work_before(const BitmapWeight& w, int64_t group) {
  return group * w.quads * kQuad * kColumnCost + group + w.offsets[group];
}

struct Split {
  Task task;
  KernelFunction kernel;
  int64_t panels, work;
  int parts;

  // Where share `index` begins: panels * work is cut into equal pieces.
  void position(int index, int64_t* at_panel, int64_t* at_row) const {
    const BitmapWeight& w = *task.bitmap;
    const double exact = static_cast<double>(panels) * static_cast<double>(work) * index / parts;
    const int64_t target = static_cast<int64_t>(exact);
    *at_panel = index == parts ? panels : std::min(target / work, panels);
    *at_row = 0;
    if (index == 0 || *at_panel == panels) return;
    int64_t low = 0, high = w.groups;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (work_before(w, middle) < target - *at_panel * work) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    *at_row = low * kRowGroup;
  }
};

bool run_share(void* context, int index) {
  const Split& split = *static_cast<const Split*>(context);
  Task task = split.task;
  split.position(index, &task.begin_panel, &task.begin_row);
  split.position(index + 1, &task.end_panel, &task.end_row);
  task.workspace = memory.at_least(bitmap_workspace_floats(*task.bitmap));
  if (task.workspace == nullptr) return false;
  split.kernel(task);
  return true;
}

}  // namespace

bool run_bitmap(const BitmapCall& call) {
  const BitmapWeight& w = call.w;
  if (call.n == 0 || w.rows == 0) return true;
  Split split{};
  Task& task = split.task;
  task.bitmap = &w;
  task.x = call.x;
  task.ldx = w.cols;
  task.y = call.y;
  task.ldy = w.rows;
  task.n = call.n;
  task.bias = call.bias;
  task.residual = call.residual;
  task.flags = call.flags;
  split.kernel = w.kind == kBitmapI8     ? call.kernels->bitmap_i8
                 : w.kind == kBitmapBf16 ? call.kernels->bitmap_bf16
                                         : call.kernels->bitmap_f32;
  // Panels of nearly equal size.
  split.panels = (call.n + kBitmapPanel - 1) / kBitmapPanel;
  task.panel = (call.n + split.panels - 1) / split.panels;
  split.panels = (call.n + task.panel - 1) / task.panel;
  split.work = work_before(w, w.groups);
  const double work = static_cast<double>(split.work) * static_cast<double>(call.n);
  const double useful = std::min(work / static_cast<double>(grain()), double{kMostThreads});
  split.parts = std::max(1, std::min(call.threads, static_cast<int>(useful)));
  return run_parts(split.parts, run_share, &split);
}

}  // namespace prunus
