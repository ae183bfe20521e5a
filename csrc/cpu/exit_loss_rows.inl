// Rows [begin, end) of exit_loss and of its gradient. Notation as in exit_loss.cpp.

#include "exit_gate_rows.inl"

// x [C] = s z + b - s delta_y e_y.
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

// m: the row's maximum. log_sum: log sum exp(x - m). nll: -log q_y = (m - x_y) + log_sum. Sums are
// relative to m, because log sum exp(x) - x_y would lose the digits of a small -log q_y.
template <class A>
struct LogSum {
  A m, log_sum, nll;
};

template <class A, class T>
ELF_INLINE LogSum<A> log_sum_exp(const T* x, int64_t C, int64_t y) {
  const A m = row_top<false>(x, C).max;
  const A sum = exp_sums<false>(x, C, kLog2e<A>, m).sum;
  if (std::isfinite(sum) && std::isfinite(m)) {
    const A log_sum = std::log(sum);
    return {m, log_sum, (m - static_cast<A>(x[y])) + log_sum};
  }
  return {m, static_cast<A>(NAN), static_cast<A>(NAN)};  // as in log_softmax
}

// Terms of both the loss and the gradient of a row. With p = exp(-nll), F = (1 - p)^gamma (member
// `modulation`), t the smoothed target and the smoothed cross-entropy
// CE = (1 - eps) nll + eps mean_c(-log q_c):
//   loss = w F CE
//   dloss/dx_c = w (F (q_c - t_c) - G (1[c = y] - q_c)),  G = gamma (1 - p)^(gamma - 1) p CE
template <class A>
struct RowTerms {
  A weight, modulation, G;
  A ce;
};

template <class A, class T>
ELF_INLINE RowTerms<A> row_terms(const T* x, int64_t C, int64_t y, const LogSum<A>& sums,
                                 const LossFamily<A>& f) {
  RowTerms<A> r{f.weight ? f.weight[y] : A(1), A(1), A(0), sums.nll};
  if (f.smoothing > 0) {
    const A mean = (sums.m - row_sum(x, C) / static_cast<A>(C)) + sums.log_sum;
    r.ce = (1 - f.smoothing) * sums.nll + f.smoothing * mean;
  }
  if (f.gamma > 0) {
    const A rest = -std::expm1(-sums.nll);  // 1 - p
    r.modulation = std::pow(rest, f.gamma);
    r.G = rest > 0 ? f.gamma * std::pow(rest, f.gamma - 1) * (1 - rest) * r.ce : A(0);
  }
  return r;
}

template <class T, class A>
void loss_rows(const T* z, int64_t stride, int64_t begin, int64_t end, int64_t C,
               const int64_t* target, const LossFamily<A>& f, A* loss, A* log_sum) {
  A* x = f.plain() ? nullptr : scratch_row<A, 1>(C);
  const auto write = [&](const auto* row, int64_t n) {
    const LogSum<A> sums = log_sum_exp<A>(row, C, target[n]);
    const RowTerms<A> terms = row_terms(row, C, target[n], sums, f);
    loss[n] = terms.weight * terms.modulation * terms.ce;
    log_sum[n] = sums.log_sum;
  };
  for (int64_t n = begin; n < end; ++n) {
    if (x == nullptr) {
      write(z + n * stride, n);
    } else {
      adjust_row(z + n * stride, C, target[n], f, x);
      write(x, n);
    }
  }
}

// out[c] = P q_c + Q with q = exp(x - m - log_sum).
template <class T>
ELF_INLINE void write_gradient(const float* x, int64_t C, const LogSum<float>& sums, float P,
                               float Q, T* out) {
  const float a = kLog2e<float>;
  const float share = std::exp(-sums.log_sum) * P;
  int64_t c = 0;
  for (; c + kLanes <= C; c += kLanes)
    store(out + c, exp2_vector((load(x + c) - sums.m) * a) * share + Q);
  for (; c < C; ++c) out[c] = static_cast<T>(std::exp2((x[c] - sums.m) * a) * share + Q);
}

inline void write_gradient(const double* x, int64_t C, const LogSum<double>& sums, double P,
                           double Q, double* out) {
  for (int64_t c = 0; c < C; ++c) out[c] = P * std::exp((x[c] - sums.m) - sums.log_sum) + Q;
}

template <class T, class A>
void loss_backward_rows(const T* z, int64_t stride, int64_t begin, int64_t end, int64_t C,
                        const int64_t* target, const LossFamily<A>& f, const A* log_sum,
                        const A* grad_loss, int64_t grad_stride, T* grad) {
  A* x = scratch_row<A, 1>(C);
  for (int64_t n = begin; n < end; ++n) {
    const int64_t y = target[n];
    adjust_row(z + n * stride, C, y, f, x);
    const A m = row_top<false>(x, C).max;
    const LogSum<A> sums{m, log_sum[n], (m - x[y]) + log_sum[n]};
    const RowTerms<A> r = row_terms(x, C, y, sums, f);
    const A g = grad_loss[n * grad_stride] * f.scale * r.weight;
    const A P = g * (r.modulation + r.G);
    const A Q = -g * r.modulation * f.smoothing / static_cast<A>(C);
    T* out = grad + n * C;
    write_gradient(x, C, sums, P, Q, out);
    // The target's term is computed from q_y - 1 = expm1(-nll), which keeps its digits near q_y
    // = 1.
    const A q_less_1 = std::expm1(-sums.nll);
    out[y] = static_cast<T>(g * (r.modulation * (q_less_1 + f.smoothing) + r.G * q_less_1) + Q);
  }
}
