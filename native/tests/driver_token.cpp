// Attention of one token and SiLU against double precision, on exactly sized memory.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "dispatch.h"
#include "kernel.h"
#include "token.h"

namespace {

using namespace prunus;

std::mt19937 rng(11);

int64_t pick(std::initializer_list<int64_t> list) { return list.begin()[rng() % list.size()]; }

std::vector<float> normal(int64_t count) {
  std::normal_distribution<float> distribution;
  std::vector<float> values(static_cast<size_t>(count));
  for (float& value : values) value = distribution(rng);
  return values;
}

// Cuts the values to bfloat16, in place too.
std::vector<uint16_t> halves(std::vector<float>& values) {
  std::vector<uint16_t> found;
  for (float& value : values) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    found.push_back(static_cast<uint16_t>(bits >> 16));
    bits &= 0xFFFF0000u;
    std::memcpy(&value, &bits, sizeof bits);
  }
  return found;
}

double head_error(const TokenAttention& a, const float* k, const float* v, int64_t head) {
  const int64_t group = head / a.sharing;
  std::vector<double> scores;
  double most = -INFINITY, total = 0, error = 0;
  for (int64_t t = 0; t < a.keys; ++t) {
    double score = 0;
    for (int64_t d = 0; d < a.dim; ++d)
      score += static_cast<double>(a.q[head * a.dim + d]) * k[group * a.k_head + t * a.k_row + d];
    scores.push_back(score * a.scale);
    most = std::max(most, scores.back());
  }
  for (double& score : scores) total += score = std::exp(score - most);
  for (int64_t d = 0; d < a.dim; ++d) {
    double wanted = 0;
    for (int64_t t = 0; t < a.keys; ++t)
      wanted += scores[static_cast<size_t>(t)] * v[group * a.v_head + t * a.v_row + d];
    error = std::max(error, std::fabs(a.out[head * a.dim + d] - wanted / total));
  }
  return error;
}

bool attention_case(int isa) {
  TokenAttention a{};
  a.sharing = pick({1, 2, 3});
  const int64_t groups = pick({1, 2, 3});
  a.heads = a.sharing * groups;
  a.keys = pick({1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 33, 100});
  a.dim = pick({2, 4, 6, 14, 16, 18, 48, 64, 66, 80, 128});
  a.half = rng() % 2 == 0;
  a.scale = 0.3f;
  const bool apart = rng() % 2 == 0;  // heads behind each other, or side by side
  a.k_head = a.v_head = apart ? a.keys * a.dim : a.dim;
  a.k_row = a.v_row = apart ? a.dim : groups * a.dim;
  const auto q = normal(a.heads * a.dim);
  auto k = normal(groups * a.keys * a.dim), v = normal(groups * a.keys * a.dim);
  const auto short_k = a.half ? halves(k) : std::vector<uint16_t>();
  const auto short_v = a.half ? halves(v) : std::vector<uint16_t>();
  std::vector<float> out(static_cast<size_t>(a.heads * a.dim));
  std::vector<float> scores(static_cast<size_t>(token_workspace_floats(a.keys)));
  a.q = q.data();
  a.k = a.half ? static_cast<const void*>(short_k.data()) : k.data();
  a.v = a.half ? static_cast<const void*>(short_v.data()) : v.data();
  a.out = out.data();
  Task task{};
  task.token = &a;
  task.end_row = a.heads;
  task.workspace = scores.data();
  kernels_at(isa).attend_token(task);
  double error = 0;
  for (int64_t head = 0; head < a.heads; ++head)
    error = std::max(error, head_error(a, k.data(), v.data(), head));
  if (error < 2e-5) return true;
  std::printf("token attention %ld keys, dim %ld, isa %s: %g\n", static_cast<long>(a.keys),
              static_cast<long>(a.dim), kernels_at(isa).isa, error);
  return false;
}

bool silu_case(int isa) {
  const int64_t count = pick({1, 3, 4, 7, 8, 15, 16, 17, 100});
  const auto x = normal(count);
  std::vector<float> y(static_cast<size_t>(count));
  Task task{};
  task.x = x.data();
  task.y = y.data();
  task.n = count;
  kernels_at(isa).silu_f32(task);
  for (size_t i = 0; i < y.size(); ++i) {
    const double wanted = x[i] / (1 + std::exp(-static_cast<double>(x[i])));
    if (!(std::fabs(y[i] - wanted) < 1e-6 * (1 + std::fabs(wanted)))) {
      std::printf("silu of %g, isa %s: %g\n", static_cast<double>(x[i]), kernels_at(isa).isa,
                  static_cast<double>(y[i]));
      return false;
    }
  }
  return true;
}

}  // namespace

int token_cases(int* done) {
  int failed = 0;
  for (int isa = 0; isa < all_count(); ++isa)
    for (int i = 0; i < 120; ++i, *done += 2) {
      failed += !attention_case(isa);
      failed += !silu_case(isa);
    }
  return failed;
}
