// Rows [begin, end) of exit_gate. Writes each row's statistic, prediction and flag: 1 if the sample
// survives, 0 if it exits.

template <Criterion kCriterion, class T, class A>
void gate_rows_as(const T* z, int64_t stride, int64_t begin, int64_t end, int64_t C,
                  const GateTest<A>& test, A* confidence, int64_t* prediction, int64_t* goes_on) {
  const auto write = [&](int64_t n, const GatedRow<A>& row) ELF_LAMBDA {
    const A t = test.threshold[row.prediction * test.threshold_stride];
    const bool sure = passes<kCriterion>(row.statistic, t);
    const bool right = test.target == nullptr || test.target[n] == row.prediction;
    confidence[n] = row.statistic;
    prediction[n] = row.prediction;
    goes_on[n] = !(sure && right);
  };
  if (kCriterion == Criterion::confidence && test.early_stop) {
    for (int64_t n = begin; n < end; ++n)
      write(n, gate_row_until(z + n * stride, C, test.a, test.threshold, test.threshold_stride));
    return;
  }
  if (begin == end) return;
  Top<A> top = row_top<kCriterion == Criterion::margin>(z + begin * stride, C);
  for (int64_t n = begin; n < end; ++n) {
    const T* row = z + n * stride;
    const T* next = n + 1 < end ? row + stride : row;
    const Swept<A> swept = sums_and_next_top<kCriterion>(row, next, C, test.a, top);
    write(n, gate_row<kCriterion>(row, C, test.a, top, swept));
    top = swept.next;
  }
}

template <class T, class A>
void gate_rows(const T* z, int64_t stride, int64_t begin, int64_t end, int64_t C,
               const GateTest<A>& test, A* confidence, int64_t* prediction, int64_t* goes_on) {
  for_criterion(test.criterion, [&](auto criterion) {
    gate_rows_as<criterion()>(z, stride, begin, end, C, test, confidence, prediction, goes_on);
  });
}
