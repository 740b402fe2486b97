// Memory that a thread keeps between products, and grows.
#pragma once
#include <stdint.h>

#include <new>

namespace prunus {

class Workspace {
 public:
  ~Workspace() { release(); }

  // Null if memory cannot be had; 64-byte aligned.
  float* at_least(int64_t floats) {
    if (floats > size_) {
      release();
      data_ = static_cast<float*>(::operator new(sizeof(float) * floats, kAlignment, std::nothrow));
      size_ = data_ == nullptr ? 0 : floats;
    }
    return data_;
  }

 private:
  static constexpr std::align_val_t kAlignment{64};

  void release() {
    ::operator delete(data_, kAlignment);
    data_ = nullptr;
    size_ = 0;
  }

  float* data_ = nullptr;
  int64_t size_ = 0;
};

}  // namespace prunus
