// Rows [begin, end) of exit_gate: statistic, prediction and the goes-on flag of each.

template <Criterion kCriterion, class T, class A>
void gate_rows_as(const T* z, int64_t stride, int64_t begin, int64_t end, int64_t C,
                  const GateTest<A>& test, A* confidence, int64_t* prediction, int64_t* goes_on) {
  for (int64_t n = begin; n < end; ++n) {
    GatedRow<A> row;
    if constexpr (kCriterion == Criterion::confidence) {
      row = test.early_stop
                ? gate_row_until(z + n * stride, C, test.a, test.threshold, test.threshold_stride)
                : gate_row<kCriterion>(z + n * stride, C, test.a);
    } else {
      row = gate_row<kCriterion>(z + n * stride, C, test.a);
    }
    const A t = test.threshold[row.prediction * test.threshold_stride];
    const bool passes = kCriterion == Criterion::entropy ? row.statistic <= t : row.statistic >= t;
    const bool right = test.target == nullptr || test.target[n] == row.prediction;
    confidence[n] = row.statistic;
    prediction[n] = row.prediction;
    goes_on[n] = !(passes && right);
  }
}

template <class T, class A>
void gate_rows(const T* z, int64_t stride, int64_t begin, int64_t end, int64_t C,
               const GateTest<A>& test, A* confidence, int64_t* prediction, int64_t* goes_on) {
  switch (test.criterion) {
    case Criterion::confidence:
      return gate_rows_as<Criterion::confidence>(z, stride, begin, end, C, test, confidence,
                                                 prediction, goes_on);
    case Criterion::margin:
      return gate_rows_as<Criterion::margin>(z, stride, begin, end, C, test, confidence, prediction,
                                             goes_on);
    case Criterion::entropy:
      return gate_rows_as<Criterion::entropy>(z, stride, begin, end, C, test, confidence,
                                              prediction, goes_on);
  }
}
