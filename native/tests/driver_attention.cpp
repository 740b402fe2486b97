// Attention and layer normalisation against double precision, on exactly sized memory.
#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

#include "attention.h"
#include "dispatch.h"
#include "kernel.h"
#include "norm.h"

namespace {

using namespace prunus;

std::mt19937 rng(7);

int64_t pick(std::initializer_list<int64_t> list) { return list.begin()[rng() % list.size()]; }

std::vector<float> normal(int64_t count) {
  std::normal_distribution<float> distribution;
  std::vector<float> values(static_cast<size_t>(count));
  for (float& value : values) value = distribution(rng);
  return values;
}

// [batch, rows, heads, columns], as linear layers leave it.
HeadStrides between(int64_t rows, int64_t heads, int64_t columns) {
  return {rows * heads * columns, columns, heads * columns};
}

// The largest error of one row of the output; the score of a hidden key is minus infinity.
double row_error(const Attention& a, const std::vector<float>& out, int64_t text, int64_t head,
                 int64_t query) {
  const float* q = a.q + text * a.q_strides.batch + head * a.q_strides.head +
                   query * a.q_strides.row;
  const float* k = a.k + text * a.k_strides.batch + head / a.sharing * a.k_strides.head;
  const float* v = a.v + text * a.v_strides.batch + head / a.sharing * a.v_strides.head;
  std::vector<double> scores(static_cast<size_t>(a.keys));
  double most = -INFINITY, total = 0;
  for (int64_t j = 0; j < a.keys; ++j) {
    double score = 0;
    for (int64_t d = 0; d < a.dim; ++d)
      score += static_cast<double>(q[d]) * k[j * a.k_strides.row + d];
    score *= a.scale;
    const int64_t place = text * a.mask_strides.batch + head * a.mask_strides.head +
                          query * a.mask_strides.row + j * a.mask_column;
    if (a.bias != nullptr) score += a.bias[place];
    if ((a.allowed != nullptr && !a.allowed[place]) || (a.causal && j > query)) score = -INFINITY;
    scores[static_cast<size_t>(j)] = score;
    most = std::max(most, score);
  }
  for (double& score : scores) total += score = most == -INFINITY ? 0 : std::exp(score - most);
  double error = 0;
  for (int64_t d = 0; d < a.value_dim; ++d) {
    double wanted = 0;
    for (int64_t j = 0; j < a.keys; ++j)
      wanted += scores[static_cast<size_t>(j)] * v[j * a.v_strides.row + d];
    const int64_t place = text * a.out_strides.batch + head * a.out_strides.head +
                          query * a.out_strides.row + d;
    const double found = out[static_cast<size_t>(place)];
    error = std::max(error, std::fabs(found - (total == 0 ? 0 : wanted / total)));
    if (!std::isfinite(found)) return INFINITY;
  }
  return error;
}

bool attention_case(int isa) {
  Attention a{};
  a.batch = pick({1, 2});
  a.sharing = pick({1, 1, 2});
  a.heads = a.sharing * pick({1, 3});
  a.queries = pick({1, 2, 7, 15, 16, 17, 63, 64, 65, 130});
  a.keys = pick({1, 2, 5, 8, 17, 63, 64, 65, 131});
  a.dim = pick({1, 3, 8, 16, 31, 32, 64});
  a.value_dim = pick({1, 4, 7, 16, 33, 64});
  a.scale = 0.3f;
  a.causal = rng() % 3 == 0;
  const int64_t kept = a.heads / a.sharing;
  const auto q = normal(a.batch * a.queries * a.heads * a.dim);
  const auto k = normal(a.batch * a.keys * kept * a.dim);
  const auto v = normal(a.batch * a.keys * kept * a.value_dim);
  std::vector<float> out(static_cast<size_t>(a.batch * a.queries * a.heads * a.value_dim));
  a.q = q.data(), a.k = k.data(), a.v = v.data(), a.out = out.data();
  a.q_strides = between(a.queries, a.heads, a.dim);
  a.k_strides = between(a.keys, kept, a.dim);
  a.v_strides = between(a.keys, kept, a.value_dim);
  a.out_strides = between(a.queries, a.heads, a.value_dim);
  const bool per_query = rng() % 2 == 0;
  const int64_t rows = per_query ? a.queries : 1;
  const auto bias = normal(a.batch * rows * a.keys);
  std::vector<uint8_t> allowed(bias.size());
  for (size_t i = 0; i < bias.size(); ++i) allowed[i] = bias[i] > 0.5f;
  a.mask_strides = {rows * a.keys, 0, per_query ? a.keys : 0};
  a.mask_column = 1;
  const unsigned kind = rng() % 3;
  if (kind == 1) a.bias = bias.data();
  if (kind == 2) a.allowed = allowed.data();
  if (!run_attention({a, static_cast<int>(1 + rng() % 3), &kernels_at(isa)})) return false;
  double error = 0;
  for (int64_t text = 0; text < a.batch; ++text)
    for (int64_t head = 0; head < a.heads; ++head)
      for (int64_t query = 0; query < a.queries; ++query)
        error = std::max(error, row_error(a, out, text, head, query));
  if (error < 2e-5) return true;
  std::printf("attention %ld x %ld, %ld queries, %ld keys, dim %ld, %ld, mask %u, isa %s: %g\n",
              static_cast<long>(a.batch), static_cast<long>(a.heads), static_cast<long>(a.queries),
              static_cast<long>(a.keys), static_cast<long>(a.dim), static_cast<long>(a.value_dim),
              kind, kernels_at(isa).isa, error);
  return false;
}

bool norm_case(int isa) {
  const int64_t rows = pick({1, 2, 5, 33}), columns = pick({1, 3, 4, 15, 16, 17, 63, 64, 65, 129});
  const auto x = normal(rows * columns), gamma = normal(columns), beta = normal(columns);
  std::vector<float> y(x.size());
  const bool affine = rng() % 2 == 0;
  const LayerNorm norm{x.data(), y.data(), affine ? gamma.data() : nullptr,
                       affine ? beta.data() : nullptr, rows, columns, 1e-3f};
  run_layer_norm(norm, static_cast<int>(1 + rng() % 3), kernels_at(isa));
  double error = 0;
  for (int64_t r = 0; r < rows; ++r) {
    const float* row = x.data() + r * columns;
    double mean = 0, variance = 0;
    for (int64_t i = 0; i < columns; ++i) mean += row[i] / static_cast<double>(columns);
    for (int64_t i = 0; i < columns; ++i)
      variance += (row[i] - mean) * (row[i] - mean) / static_cast<double>(columns);
    for (int64_t i = 0; i < columns; ++i) {
      const size_t c = static_cast<size_t>(i);
      double wanted = (row[i] - mean) / std::sqrt(variance + static_cast<double>(norm.eps));
      if (affine) wanted = wanted * gamma[c] + beta[c];
      error = std::max(error, std::fabs(y[static_cast<size_t>(r * columns + i)] - wanted));
    }
  }
  if (error < 2e-5) return true;
  std::printf("layer norm %ld x %ld, isa %s: %g\n", static_cast<long>(rows),
              static_cast<long>(columns), kernels_at(isa).isa, error);
  return false;
}

}  // namespace

int attention_cases(int* done) {
  int failed = 0;
  for (int isa = 0; isa < available_count(); ++isa)
    for (int i = 0; i < 120; ++i, *done += 2) {
      failed += !attention_case(isa);
      failed += !norm_case(isa);
    }
  return failed;
}
