// Rows of exit_loss and of its backward. Notation as in exit_loss.cpp.

#include "exit_gate_rows.inl"

// x [C] = s z + b - s delta_y e_y in `scratch`, or z itself where that is the same.
template <class A>
ELF_INLINE void adjust_row(const double* z, int64_t C, int64_t y, const LossFamily<A>& f, A* x) {
  for (int64_t c = 0; c < C; ++c) x[c] = f.scale * z[c] + (f.bias ? f.bias[c] : A(0));
  if (f.margins) x[y] -= f.scale * f.margins[y];
}

template <class T>
ELF_INLINE void adjust_row(const T* z, int64_t C, int64_t y, const LossFamily<float>& f, float* x) {
  int64_t c = 0;
  if (f.bias) {
    for (; c + kLanes <= C; c += kLanes) store(x + c, load(z + c) * f.scale + load(f.bias + c));
    for (; c < C; ++c) x[c] = f.scale * static_cast<float>(z[c]) + f.bias[c];
  } else {
    for (; c + kLanes <= C; c += kLanes) store(x + c, load(z + c) * f.scale);
    for (; c < C; ++c) x[c] = f.scale * static_cast<float>(z[c]);
  }
  if (f.margins) x[y] -= f.scale * f.margins[y];
}

// log sum exp, and CE as nll = lse - x_y written so that a confident row keeps its precision.
template <class A>
struct LogSum {
  A lse, nll;
};

template <class A, class T>
ELF_INLINE LogSum<A> log_sum(const T* x, int64_t C, int64_t y) {
  const A m = row_max(x, C);
  const A sum = exp_sums<false>(x, C, kLog2e<A>, m).sum;
  if (std::isfinite(sum) && std::isfinite(m)) {
    const A log_sum = std::log(sum);
    return {m + log_sum, (m - static_cast<A>(x[y])) + log_sum};
  }
  // NaN or infinite logits: what log_softmax gives.
  double top = -INFINITY, total = 0;
  for (int64_t c = 0; c < C; ++c) {
    const double v = static_cast<double>(x[c]);
    top = v > top || std::isnan(v) ? v : top;
  }
  for (int64_t c = 0; c < C; ++c) total += std::exp(static_cast<double>(x[c]) - top);
  const double lse = top + std::log(total);
  return {static_cast<A>(lse), static_cast<A>(lse - static_cast<double>(x[y]))};
}

// What a row's loss and its gradient share. With p = exp(-nll), F = (1 - p)^gamma and the smoothed
// cross-entropy CE = (1 - eps) nll + eps mean_c(lse - x_c):
//   loss = w F CE
//   dloss/dx_c = w (F (q_c - t_c) - G (1[c = y] - q_c)),  G = gamma (1 - p)^(gamma - 1) p CE
template <class A>
struct RowTerms {
  A weight, modulation, G, ce;
};

template <class A, class T>
ELF_INLINE RowTerms<A> row_terms(const T* x, int64_t C, int64_t y, A lse, A nll,
                                 const LossFamily<A>& f) {
  RowTerms<A> r{f.weight ? f.weight[y] : A(1), A(1), A(0), nll};
  if (f.smoothing > 0) {
    const A mean = lse - row_sum(x, C) / static_cast<A>(C);
    r.ce = (1 - f.smoothing) * nll + f.smoothing * mean;
  }
  if (f.gamma > 0) {
    const A rest = -std::expm1(-nll);  // 1 - p
    r.modulation = std::pow(rest, f.gamma);
    r.G = rest > 0 ? f.gamma * std::pow(rest, f.gamma - 1) * (1 - rest) * r.ce : A(0);
  }
  return r;
}

template <class T, class A>
void loss_rows(const T* z, int64_t stride, int64_t begin, int64_t end, int64_t C,
               const int64_t* target, const LossFamily<A>& f, A* loss, A* lse_out) {
  A* scratch = f.plain() ? nullptr : scratch_row<A, 1>(C);
  for (int64_t n = begin; n < end; ++n) {
    const T* row = z + n * stride;
    const int64_t y = target[n];
    LogSum<A> sums;
    RowTerms<A> terms;
    if (f.plain()) {
      sums = log_sum<A>(row, C, y);
      terms = row_terms(row, C, y, sums.lse, sums.nll, f);
    } else {
      adjust_row(row, C, y, f, scratch);
      sums = log_sum<A>(scratch, C, y);
      terms = row_terms(scratch, C, y, sums.lse, sums.nll, f);
    }
    loss[n] = terms.weight * terms.modulation * terms.ce;
    lse_out[n] = sums.lse;
  }
}

// out[c] = P exp(x_c - lse) + Q, in one pass over the row.
template <class T>
ELF_INLINE void write_gradient(const float* x, int64_t C, float lse, float P, float Q, T* out) {
  const float a = kLog2e<float>, b = a * lse;
  int64_t c = 0;
  for (; c + kLanes <= C; c += kLanes) {
    const vf t = load(x + c) * a - b;
    const vf q = select((vi)(t >= splat(-126.0f)), exp2_vector(t), vf{});
    store(out + c, q * P + Q);
  }
  for (; c < C; ++c) out[c] = static_cast<T>(P * std::exp2(a * x[c] - b) + Q);
}

inline void write_gradient(const double* x, int64_t C, double lse, double P, double Q,
                           double* out) {
  for (int64_t c = 0; c < C; ++c) out[c] = P * std::exp(x[c] - lse) + Q;
}

template <class T, class A>
void loss_backward_rows(const T* z, int64_t stride, int64_t begin, int64_t end, int64_t C,
                        const int64_t* target, const LossFamily<A>& f, const A* lse,
                        const A* grad_loss, int64_t grad_stride, T* grad) {
  A* x = scratch_row<A, 1>(C);
  for (int64_t n = begin; n < end; ++n) {
    const int64_t y = target[n];
    adjust_row(z + n * stride, C, y, f, x);
    const A nll = lse[n] - x[y];
    const RowTerms<A> r = row_terms(x, C, y, lse[n], nll, f);
    const A g = grad_loss[n * grad_stride] * f.scale * r.weight;
    const A P = g * (r.modulation + r.G);
    const A Q = -g * r.modulation * f.smoothing / static_cast<A>(C);
    T* out = grad + n * C;
    write_gradient(x, C, lse[n], P, Q, out);
    // The target's own term, from its own probability: q_y - 1 loses nothing near q_y = 1.
    const A q = std::exp(-nll);
    out[y] = static_cast<T>(g * (r.modulation * (q - (1 - f.smoothing)) + r.G * (q - 1)) + Q);
  }
}
