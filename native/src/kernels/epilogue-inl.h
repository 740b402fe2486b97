// What happens to a finished output: bias, residual, activation. Included before the kernels, after
//   Vec, kLanes, zero, broadcast, load_n, store, store_n, fma, add, relu,
//   sub, mul, divide, maximum and minimum (the second operand where one is NaN),
//   exponent (2^k for the vector 12582912 + k, -126 <= k <= 127).

// e^x with a relative error of about 1e-7, x held within -87.3 and 88.
inline Vec exponential(Vec x) {
  x = maximum(broadcast(-87.3f), minimum(broadcast(88.0f), x));
  const Vec magic = broadcast(12582912.0f);
  const Vec shifted = fma(x, broadcast(1.44269504f), magic);
  const Vec k = sub(shifted, magic);
  Vec r = fma(k, broadcast(-0.693359375f), x);
  r = fma(k, broadcast(2.12194440e-4f), r);
  Vec p = broadcast(1.0f / 5040);
  p = fma(p, r, broadcast(1.0f / 720));
  p = fma(p, r, broadcast(1.0f / 120));
  p = fma(p, r, broadcast(1.0f / 24));
  p = fma(p, r, broadcast(1.0f / 6));
  p = fma(p, r, broadcast(0.5f));
  p = fma(p, r, broadcast(1.0f));
  p = fma(p, r, broadcast(1.0f));
  return mul(p, exponent(shifted));
}

// x / (1 + e^-u): zero, not NaN, for minus infinity.
inline Vec gated(Vec x, Vec u) {
  const Vec one = broadcast(1.0f);
  return divide(maximum(broadcast(-100.0f), x), add(one, exponential(sub(zero(), u))));
}

// max(x, 0) - |x| P(-|x|) with the normal distribution P by Abramowitz and Stegun 7.1.26: no
// cancellation, an error below 2e-7 |x|.
inline Vec gelu(Vec x) {
  const Vec a = minimum(broadcast(40.0f), maximum(x, sub(zero(), x)));
  const Vec one = broadcast(1.0f);
  const Vec t = divide(one, fma(a, broadcast(0.3275911f * 0.70710678f), one));
  Vec p = broadcast(0.5f * 1.061405429f);
  p = fma(p, t, broadcast(0.5f * -1.453152027f));
  p = fma(p, t, broadcast(0.5f * 1.421413741f));
  p = fma(p, t, broadcast(0.5f * -0.284496736f));
  p = fma(p, t, broadcast(0.5f * 0.254829592f));
  const Vec tail = mul(mul(p, t), exponential(mul(mul(a, a), broadcast(-0.5f))));
  return sub(relu(x), mul(a, tail));
}

inline Vec gelu_tanh(Vec x) {
  const Vec inner = fma(mul(x, x), broadcast(0.044715f), broadcast(1.0f));
  return gated(x, mul(mul(x, broadcast(1.59576912f)), inner));
}

inline Vec activate(Vec value, uint32_t flags) {
  if (flags == 0) return value;
  if (flags & kRelu) return relu(value);
  if (flags & kRelu6) return minimum(broadcast(6.0f), relu(value));
  if (flags & kGelu) return gelu(value);
  if (flags & kGeluTanh) return gelu_tanh(value);
  return gated(value, value);
}

// y[place ...] = activation(value + bias + residual[place + skew ...]), `count` of them.
inline void write(const Task& task, int64_t place, Vec value, Vec bias, int64_t count,
                  int64_t skew = 0) {
  value = add(value, bias);
  if (task.residual) value = add(value, load_n(task.residual + place + skew, count));
  value = activate(value, task.flags);
  if (count >= kLanes) {
    store(task.y + place, value);
  } else {
    store_n(task.y + place, value, count);
  }
}
