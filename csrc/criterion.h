// The exit criteria. They must equal the table in elf_fast/criteria.py: a test compares names,
// codes and directions (tests/test_criteria.py).
#pragma once

#include <torch/headeronly/macros/Macros.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <string>
#include <type_traits>

namespace elf_fast {

// X(name, code, whether a larger statistic is surer) for each criterion. Everything below is
// generated from this list.
#define ELF_CRITERIA(X)  \
  X(confidence, 0, true) \
  X(margin, 1, true)     \
  X(entropy, 2, false)

// `criterion` in the operators' schemas is one of these codes.
#define ELF_ENUMERATOR(name, code, larger) name = code,
enum class Criterion : int64_t { ELF_CRITERIA(ELF_ENUMERATOR) };
#undef ELF_ENUMERATOR

constexpr bool larger_is_surer(Criterion criterion) {
#define ELF_CASE(name, code, larger) \
  if (criterion == Criterion::name) return larger;
  ELF_CRITERIA(ELF_CASE)
#undef ELF_CASE
  return true;
}

// Whether a statistic is sure enough to exit. NaN never is.
template <Criterion kCriterion, class A>
C10_HOST_DEVICE C10_ALWAYS_INLINE bool passes(A statistic, A threshold) {
  if constexpr (larger_is_surer(kCriterion))
    return statistic >= threshold;
  else
    return statistic <= threshold;
}

// Calls f(std::integral_constant<Criterion, ...>{}) with the criterion as a compile-time constant.
template <class F>
void for_criterion(Criterion criterion, const F& f) {
  switch (criterion) {
#define ELF_CASE(name, code, larger) \
  case Criterion::name: return f(std::integral_constant<Criterion, Criterion::name>{});
    ELF_CRITERIA(ELF_CASE)
#undef ELF_CASE
  }
}

inline Criterion checked_criterion(int64_t value) {
  std::string known;
#define ELF_CASE(name, code, larger)         \
  if (value == code) return Criterion::name; \
  known += (known.empty() ? "" : ", ") + std::to_string(code);
  ELF_CRITERIA(ELF_CASE)
#undef ELF_CASE
  STD_TORCH_CHECK(false, "criterion: expected one of the codes ", known, ", got ", value);
}

}  // namespace elf_fast
