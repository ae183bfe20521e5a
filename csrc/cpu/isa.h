// The instruction set of the row kernels: the widest that this processor has, chosen once.
// ELF_FAST_ISA=portable|avx2|avx512 selects a narrower one, so that tests can run every path on one
// machine.
#pragma once

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define ELF_X86 1
#include <immintrin.h>
#else
#define ELF_X86 0
#endif

namespace elf_fast {

enum class Isa { portable, avx2, avx512 };

inline Isa widest_isa() {
#if ELF_X86
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    return Isa::avx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::avx2;
#endif
  return Isa::portable;
}

inline Isa choose_isa() {
  const Isa widest = widest_isa();
  const char* wanted = std::getenv("ELF_FAST_ISA");
  if (wanted == nullptr || *wanted == '\0') return widest;
  Isa isa;
  if (std::strcmp(wanted, "portable") == 0)
    isa = Isa::portable;
  else if (std::strcmp(wanted, "avx2") == 0)
    isa = Isa::avx2;
  else if (std::strcmp(wanted, "avx512") == 0)
    isa = Isa::avx512;
  else
    throw std::runtime_error(std::string("ELF_FAST_ISA: expected portable, avx2 or avx512, got ") +
                             wanted);
  if (isa > widest)
    throw std::runtime_error(std::string("ELF_FAST_ISA=") + wanted +
                             ": this processor does not have it");
  return isa;
}

inline Isa isa() {
  static const Isa chosen = choose_isa();
  return chosen;
}

}  // namespace elf_fast

// Calls the version of a kernel that is compiled for the chosen instruction set; see
// for_each_isa.inl.
#if ELF_X86
#define ELF_ON_ISA(CALL)                     \
  do {                                       \
    switch (isa()) {                         \
      case Isa::avx512: avx512::CALL; break; \
      case Isa::avx2: avx2::CALL; break;     \
      default: portable::CALL; break;        \
    }                                        \
  } while (0)
#else
#define ELF_ON_ISA(CALL) portable::CALL
#endif
