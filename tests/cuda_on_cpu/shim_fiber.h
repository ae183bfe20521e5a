// Execution contexts of fibers, switches between them without a system call, and their stacks.
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

// Prevents the compiler from using the body of a function that switches contexts: callers must
// assume that it clobbers all registers.
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
using Context = void*;  // the stack pointer; on the stack: the address to resume at, then rbp

ELF_SHIM_OPAQUE inline void switch_context(Context* from, Context* to) {
  void* load = *to;
  // 128: the red zone. A jump instead of a return, because the processor would mispredict the
  // return.
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
  *--top = nullptr;  // return address of entry, never used; aligns the stack as a call does
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(entry);
  *context = top;
}
#endif

// Stacks of 64 KB with a guard page below. They are never unmapped. The stack that was given back
// last is taken first, so threads that never wait use the same one.
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
    // Abandoned frames leave red zones of AddressSanitizer on the stack.
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
    // The ends of the stacks are shifted by 7 cache lines each. With equal offsets in a page, all
    // stacks would use the same cache set.
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
