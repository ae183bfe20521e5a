// Contexts of execution that are switched without a system call, and the stacks they run on.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <deque>
#include <new>
#include <vector>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

#if !defined(__x86_64__) || defined(ELF_SHIM_UCONTEXT)
#define ELF_SHIM_PORTABLE 1
#include <ucontext.h>
#else
#define ELF_SHIM_PORTABLE 0
#endif

// Callers must believe that a switch clobbers every register, also when they see its body.
#if defined(__clang__)
#define ELF_SHIM_OPAQUE __attribute__((noinline))
#else
#define ELF_SHIM_OPAQUE __attribute__((noinline, noipa))
#endif

#pragma GCC visibility push(hidden)
namespace elf_shim {

#if ELF_SHIM_PORTABLE
using Context = ucontext_t;

ELF_SHIM_OPAQUE inline void switch_context(Context* from, Context* to) { swapcontext(from, to); }

inline void start_context(Context* context, char* stack, char* end, void (*entry)()) {
  getcontext(context);
  context->uc_stack.ss_sp = stack;
  context->uc_stack.ss_size = static_cast<size_t>(end - stack);
  context->uc_link = nullptr;
  makecontext(context, entry, 0);
}
#else
using Context = void*;  // the stack pointer; on the stack lie the address to go on from, then rbp

ELF_SHIM_OPAQUE inline void switch_context(Context* from, Context* to) {
  void* load = *to;
  // 128: the red zone. A jump and not a return: the processor predicts it.
  asm volatile(
      "leaq -128(%%rsp), %%rsp\n\t"
      "pushq %%rbp\n\t"
      "leaq 1f(%%rip), %%rax\n\t"
      "pushq %%rax\n\t"
      "movq %%rsp, (%0)\n\t"
      "movq %1, %%rsp\n\t"
      "popq %%rax\n\t"
      "popq %%rbp\n\t"
      "jmpq *%%rax\n"
      "1:\n\t"
      "leaq 128(%%rsp), %%rsp"
      : "+D"(from), "+S"(load)
      :
      : "rax", "rbx", "rcx", "rdx", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15", "memory",
        "cc");
}

inline void start_context(Context* context, char*, char* end, void (*entry)()) {
  void** top = reinterpret_cast<void**>(end);
  *--top = nullptr;  // where entry would return to; also aligns its stack as a call does
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(entry);
  *context = top;
}
#endif

// Stacks of 64 KB over a guard page, kept for the life of the process. The last one given back is
// the first one taken: threads that never wait share one.
class Stacks {
 public:
  struct Stack {
    char *begin, *end;
  };

  Stack* take() {
    if (free_.empty()) map_another();
    Stack* stack = free_.back();
    free_.pop_back();
#ifdef __SANITIZE_ADDRESS__
    // Abandoned frames leave their red zones behind.
    __asan_unpoison_memory_region(stack->begin, static_cast<size_t>(stack->end - stack->begin));
#endif
    return stack;
  }
  void give(Stack* stack) { free_.push_back(stack); }

 private:
  static constexpr size_t kBytes = 64 << 10, kGuard = 4096;

  void map_another() {
    void* p = mmap(nullptr, kGuard + kBytes, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) throw std::bad_alloc();
    mprotect(p, kGuard, PROT_NONE);
    char* begin = static_cast<char*>(p) + kGuard;
    // Ends 7 cache lines apart: at equal offsets in a page all stacks fight for one cache set.
    const size_t colour = mapped_++ * 448 % 4096;
    free_.reserve(mapped_);
    free_.push_back(&all_.emplace_back(Stack{begin, begin + kBytes - colour}));
  }

  std::deque<Stack> all_;
  std::vector<Stack*> free_;
  size_t mapped_ = 0;
};

}  // namespace elf_shim
#pragma GCC visibility pop
