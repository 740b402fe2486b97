#include "token.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "bitmap.h"
#include "kernel.h"
#include "nm.h"
#include "pool.h"
#include "run.h"
#include "workspace.h"

namespace prunus {
namespace {

constexpr int kMaxParts = 256;

thread_local Workspace vectors_of_token, scores_of_token;

float widened(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, sizeof value);
  return value;
}

uint16_t narrowed(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  if ((bits & 0x7FFFFFFFu) > 0x7F800000u) return static_cast<uint16_t>(bits >> 16 | 0x40u);
  return static_cast<uint16_t>((bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16);
}

// Numbers as the model holds them; each operation of the model rounds its result to them.
struct Full {
  using Stored = float;
  static float read(float value) { return value; }
  static float write(float value) { return value; }
  static float round(float value) { return value; }
};
struct Half {
  using Stored = uint16_t;
  static float read(uint16_t value) { return widened(value); }
  static uint16_t write(float value) { return narrowed(value); }
  static float round(float value) { return widened(narrowed(value)); }
};

// y = one packed layer of the token, for any kind of blob.
bool multiply(const TokenCall& c, int which, const float* x, float* y) {
  const void* blob = c.layer.blobs[which];
  const float* bias = c.layer.biases[which];
  if (is_bitmap(*static_cast<const BlobHeader*>(blob)))
    return run_bitmap({open_bitmap(blob), x, y, 1, bias, nullptr, 0, c.threads, c.kernels});
  if (is_nm(*static_cast<const BlobHeader*>(blob)))
    return run_nm({open_nm(blob), x, y, 1, bias, nullptr, 0, c.threads, c.kernels});
  Call call{};
  call.layout = Layout::tokens;
  call.x = x;
  call.y = y;
  call.n = 1;
  call.bias = bias;
  call.threads = c.threads;
  call.kernels = c.kernels;
  const auto* groups = static_cast<const VectorHeader*>(blob);
  if (is_vectors(*groups)) {
    call.vectors = open_vectors(groups);
    call.w.rows = call.vectors.rows;
    call.w.cols = call.vectors.cols;
  } else {
    call.w = open_blob(blob);
  }
  call.ldx = call.w.cols;
  call.ldy = call.w.rows;
  return call.vectors.height > 0 ? run_vectors(call) : run(call);
}

template <class F>
void normalise(const float* x, const void* gamma, int64_t count, float eps, float* y) {
  double sums[4] = {};
  for (int64_t i = 0; i < count; ++i) sums[i % 4] += static_cast<double>(x[i]) * x[i];
  const double sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  const float mean = static_cast<float>(sum / static_cast<double>(count));
  const float factor = 1.0f / std::sqrt(mean + eps);
  const auto* scale = static_cast<const typename F::Stored*>(gamma);
  for (int64_t i = 0; i < count; ++i)
    y[i] = F::round(F::round(x[i] * factor) * F::read(scale[i]));
}

template <class F>
void rotate(float* x, int64_t heads, int64_t dim, const void* cos, const void* sin) {
  const auto* c = static_cast<const typename F::Stored*>(cos);
  const auto* s = static_cast<const typename F::Stored*>(sin);
  const int64_t half = dim / 2;
  for (int64_t head = 0; head < heads; ++head, x += dim)
    for (int64_t i = 0; i < half; ++i) {
      const float low = x[i], high = x[half + i];
      x[i] = F::round(F::round(low * F::read(c[i])) + F::round(-high * F::read(s[i])));
      x[half + i] =
          F::round(F::round(high * F::read(c[half + i])) + F::round(low * F::read(s[half + i])));
    }
}

template <class F>
void copy_out(const float* from, int64_t count, void* to) {
  auto* out = static_cast<typename F::Stored*>(to);
  for (int64_t i = 0; i < count; ++i) out[i] = F::write(from[i]);
}

template <class F>
void copy_in(const void* from, int64_t count, float* to) {
  const auto* in = static_cast<const typename F::Stored*>(from);
  for (int64_t i = 0; i < count; ++i) to[i] = F::read(in[i]);
}

template <class F>
void round_all(float* x, int64_t count) {
  for (int64_t i = 0; i < count; ++i) x[i] = F::round(x[i]);
}

// x += y, both rounded.
template <class F>
void add_to(float* x, const float* y, int64_t count) {
  for (int64_t i = 0; i < count; ++i) x[i] = F::round(x[i] + F::round(y[i]));
}

struct Shares {
  const TokenAttention* attention;
  KernelFunction kernel;
  int parts;
};

bool run_share(void* context, int index) {
  const Shares& shares = *static_cast<const Shares*>(context);
  Task task{};
  task.token = shares.attention;
  task.begin_row = shares.attention->heads * index / shares.parts;
  task.end_row = shares.attention->heads * (index + 1) / shares.parts;
  task.workspace = scores_of_token.at_least(token_workspace_floats(shares.attention->keys));
  if (task.workspace == nullptr) return false;
  shares.kernel(task);
  return true;
}

bool attend(const TokenAttention& a, int threads, const Kernels& kernels) {
  const int64_t work = 2 * a.heads * a.keys * a.dim;
  const int64_t parts = std::min<int64_t>({threads, work / grain(), a.heads, kMaxParts});
  Shares shares{&a, kernels.attend_token, static_cast<int>(std::max<int64_t>(1, parts))};
  return run_parts(shares.parts, run_share, &shares);
}

// Room for a vector, whole lines.
int64_t room(int64_t count) { return (count + 15) / 16 * 16 + 16; }

template <class F>
bool in(const TokenCall& call, const void* cos, const void* sin, float* q, void* k, void* v) {
  const TokenLayer& l = call.layer;
  const int64_t queries = l.heads * l.dim, keys = l.groups * l.dim;
  float* x = vectors_of_token.at_least(2 * room(l.hidden) + room(queries + 2 * keys));
  if (x == nullptr) return false;
  float *normed = x + room(l.hidden), *rows = normed + room(l.hidden);
  copy_in<F>(call.x, l.hidden, x);
  normalise<F>(x, l.gammas[0], l.hidden, call.eps, normed);
  if (!multiply(call, kQuery, normed, rows)) return false;
  if (l.blobs[kKey] != nullptr &&
      (!multiply(call, kKey, normed, rows + queries) ||
       !multiply(call, kValue, normed, rows + queries + keys)))
    return false;
  round_all<F>(rows, queries + 2 * keys);
  rotate<F>(rows, l.heads + l.groups, l.dim, cos, sin);
  std::copy(rows, rows + queries, q);
  copy_out<F>(rows + queries, keys, k);
  copy_out<F>(rows + queries + keys, keys, v);
  return true;
}

template <class F>
bool out(const TokenCall& call, TokenAttention a, void* y) {
  const TokenLayer& l = call.layer;
  const int64_t queries = l.heads * l.dim;
  float* x = vectors_of_token.at_least(3 * room(l.hidden) + room(queries) + 2 * room(2 * l.inner));
  if (x == nullptr) return false;
  float *normed = x + room(l.hidden), *more = normed + room(l.hidden);
  float *heads = more + room(l.hidden), *gate = heads + room(queries);
  float *up = gate + l.inner, *silu = gate + room(2 * l.inner);
  a.heads = l.heads;
  a.sharing = l.heads / l.groups;
  a.dim = l.dim;
  a.half = l.half != 0;
  a.out = heads;
  if (!attend(a, call.threads, *call.kernels)) return false;
  round_all<F>(heads, queries);
  if (!multiply(call, kOutput, heads, more)) return false;
  copy_in<F>(call.x, l.hidden, x);
  add_to<F>(x, more, l.hidden);
  normalise<F>(x, l.gammas[1], l.hidden, call.eps, normed);
  if (!multiply(call, kGate, normed, gate)) return false;
  if (l.blobs[kUp] != nullptr && !multiply(call, kUp, normed, up)) return false;
  round_all<F>(gate, 2 * l.inner);
  Task task{};
  task.x = gate;
  task.y = silu;
  task.n = l.inner;
  call.kernels->silu_f32(task);
  for (int64_t i = 0; i < l.inner; ++i) silu[i] = F::round(F::round(silu[i]) * up[i]);
  if (!multiply(call, kDown, silu, more)) return false;
  add_to<F>(x, more, l.hidden);
  copy_out<F>(x, l.hidden, y);
  return true;
}

}  // namespace

bool run_token_in(const TokenCall& call, const void* cos, const void* sin, float* q, void* k,
                  void* v) {
  return call.layer.half ? in<Half>(call, cos, sin, q, k, v) : in<Full>(call, cos, sin, q, k, v);
}

bool run_token_out(const TokenCall& call, TokenAttention attention, void* y) {
  return call.layer.half ? out<Half>(call, attention, y) : out<Full>(call, attention, y);
}

}  // namespace prunus
