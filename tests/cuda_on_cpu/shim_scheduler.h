// Runs one block at a time. Each of its threads is a fiber, and all fibers run on one OS thread.
//
// A fiber runs until it has to wait: at a barrier, or at a warp primitive that other lanes have not
// reached. The next fiber is drawn at random, mostly from the same warp. So warps run far ahead of
// other warps, and lanes far ahead of their warp, and a missing barrier has an effect. The last
// lane to reach a warp primitive computes the results of all lanes, so a primitive costs one switch
// per lane.
//
// These are errors: a warp primitive that can never complete, threads that wait for one barrier in
// different source lines, a lane outside its mask, and a launch that does not end. The launch
// stops, its fibers are abandoned (locals of kernels have trivial destructors) and the launch
// function returns the reason. No exception leaves a fiber.
#pragma once

#include <link.h>
#include <signal.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <source_location>
#include <sstream>
#include <string>
#include <vector>

#include "shim_fiber.h"
#include "shim_types.h"

#pragma GCC visibility push(hidden)
namespace elf_shim {

using Where = std::source_location;

enum class Op : uint8_t {
  kSyncwarp,
  kShfl,
  kShflXor,
  kShflUp,
  kShflDown,
  kBallot,
  kAny,
  kAll,
  kReduceMinInt,
  kReduceMinUnsigned,
  kReduceMaxInt,
  kReduceMaxUnsigned,
  kReduceAdd,
};

inline const char* name_of(Op op) {
  static constexpr const char* kNames[] = {
      "__syncwarp",        "__shfl_sync",       "__shfl_xor_sync",   "__shfl_up_sync",
      "__shfl_down_sync",  "__ballot_sync",     "__any_sync",        "__all_sync",
      "__reduce_min_sync", "__reduce_min_sync", "__reduce_max_sync", "__reduce_max_sync",
      "__reduce_add_sync"};
  return kNames[static_cast<int>(op)];
}

struct Thread {
  Context context;
  Stacks::Stack* stack;  // null before the thread starts and after it ends
  uint3 index;
};

// Sets of lanes are bit masks: bit l is lane l.
struct Warp {
  uint32_t exists, live, ready, waiting, at_barrier;
  uint32_t mask[32];
  Op op[32];
  uint8_t source[32];
  uint64_t value[32], result[32];
  Where where[32];
};

struct Scheduler {
  std::mutex one_launch;
  std::string reason;  // why the last launch failed
  uint64_t launches = 0, random = 0;

  Thread threads[1024];
  Warp warps[32];
  Stacks stacks;
  Context main;

  void (*kernel)(const void*) = nullptr;
  const void* arguments = nullptr;
  int running = 0;
  uint32_t ready_warps = 0;
  int live = 0, arrived = 0, votes = 0, last_votes = 0, last_arrived = 0;
  Where barrier;
  unsigned polls = 0;
  bool failed = false;
  volatile sig_atomic_t on_fiber = 0, timed_out = 0;

  uint32_t draw() {
    random = random * 6364136223846793005u + 1442695040888963407u;
    return static_cast<uint32_t>(random >> 32);
  }

  // A random member of a nonempty set.
  int any_of(uint32_t set) {
    const int turn = static_cast<int>(draw() >> 27);
    return (std::countr_zero(std::rotr(set, turn)) + turn) & 31;
  }

  void make_ready(int warp, uint32_t lanes) {
    warps[warp].ready |= lanes;
    if (lanes) ready_warps |= 1u << warp;
  }
};

inline Scheduler scheduler;

inline constinit thread_local char thread_local_marker = 0;

// The address of the marker. The asm hides from the compiler that only one byte is there.
inline char* marker_address() {
  char* address = &thread_local_marker;
  asm volatile("" : "+r"(address));
  return address;
}

// The thread-local segment of this library. It holds all __shared__ variables and the marker.
struct SharedMemory {
  size_t before_marker = 0, bytes = 0;

  SharedMemory() {
    dl_iterate_phdr(
        [](dl_phdr_info* info, size_t, void* self) {
          const auto marker = reinterpret_cast<uintptr_t>(marker_address());
          const auto begin = reinterpret_cast<uintptr_t>(info->dlpi_tls_data);
          for (int i = 0; begin != 0 && i < info->dlpi_phnum; ++i) {
            const size_t bytes = info->dlpi_phdr[i].p_memsz;
            if (info->dlpi_phdr[i].p_type != PT_TLS || marker < begin || marker - begin >= bytes)
              continue;
            static_cast<SharedMemory*>(self)->before_marker = marker - begin;
            static_cast<SharedMemory*>(self)->bytes = bytes;
          }
          return 0;
        },
        this);
  }

  void poison() const { std::memset(marker_address() - before_marker, 0xFF, bytes); }
};

// Failures

template <class... Parts>
void set_reason(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  scheduler.reason = text.str();
  scheduler.failed = true;
}

// Switches from the running fiber to the launch function. The fiber never runs again.
[[noreturn]] inline void abandon() {
  Context dead;
  switch_context(&dead, &scheduler.main);
  std::abort();
}

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  if (!scheduler.on_fiber) {
    std::fputs("cuda_on_cpu: device function called outside a kernel\n", stderr);
    std::abort();
  }
  set_reason(parts...);
  abandon();
}

inline std::string line_of(const Where& where) {
  const std::string file = where.file_name();
  return file.substr(file.rfind('/') + 1) + ":" + std::to_string(where.line());
}

struct LaneName {
  int thread;
};

inline std::ostream& operator<<(std::ostream& out, LaneName l) {
  return out << "lane " << l.thread % 32 << " of warp " << l.thread / 32;
}

// Reports the first wait that cannot end.
[[noreturn]] inline void fail_stuck() {
  for (int pass = 0; pass < 2; ++pass)
    for (int w = 0; w < 32; ++w) {
      const Warp& warp = scheduler.warps[w];
      for (int l = 0; l < 32; ++l) {
        if (!(warp.waiting >> l & 1)) continue;
        for (int k = 0; k < 32; ++k) {
          if (!(warp.mask[l] >> k & 1) || k == l) continue;
          const char* here = name_of(warp.op[l]);
          const std::string line = line_of(warp.where[l]);
          if (pass == 0 && !(warp.live >> k & 1))
            fail(LaneName{w * 32 + k}, " exited, but lane ", l, " waits for it in ", here, " (",
                 line, ")");
          if (pass == 1 && (warp.at_barrier >> k & 1))
            fail(LaneName{w * 32 + k}, " waits at __syncthreads (", line_of(warp.where[k]),
                 "), but lane ", l, " waits for it in ", here, " (", line, ")");
          if (pass == 1 && (warp.waiting >> k & 1) &&
              (warp.op[k] != warp.op[l] || warp.mask[k] != warp.mask[l]))
            fail(LaneName{w * 32 + k}, " waits in ", name_of(warp.op[k]), " with mask ", std::hex,
                 warp.mask[k], " (", line_of(warp.where[k]), "), but lane ", std::dec, l,
                 " waits for it in ", here, " with mask ", std::hex, warp.mask[l], " (", line, ")");
        }
      }
    }
  fail("no thread can go on");
}

// Switches

// Chooses the next thread to run and removes it from the ready ones. -1 if there is none.
inline int take_next(bool from_any_warp = false) {
  Scheduler& s = scheduler;
  int w = s.running / 32;
  if (from_any_warp || !s.warps[w].ready || s.draw() < 1u << 28) {
    if (!s.ready_warps) return -1;
    w = s.any_of(s.ready_warps);
  }
  Warp& warp = s.warps[w];
  const int lane = s.any_of(warp.ready);
  warp.ready &= ~(1u << lane);
  if (!warp.ready) s.ready_warps &= ~(1u << w);
  return w * 32 + lane;
}

inline void fiber_main();

inline void become(int t) {
  scheduler.running = t;
  Thread& thread = scheduler.threads[t];
  threadIdx = thread.index;
  if (thread.stack) return;
  thread.stack = scheduler.stacks.take();
  start_context(&thread.context, thread.stack->begin, thread.stack->end, fiber_main);
}

// Runs other threads until this one is ready and chosen again.
inline void suspend(bool to_any_warp = false) {
  const int from = scheduler.running, to = take_next(to_any_warp);
  if (to < 0) fail_stuck();
  if (to == from) return;
  become(to);
  switch_context(&scheduler.threads[from].context, &scheduler.threads[to].context);
}

inline void yield() {
  scheduler.make_ready(scheduler.running / 32, 1u << scheduler.running % 32);
  suspend(true);
}

// Called at each load and atomic. Yields from time to time, because a thread that polls memory
// waits for another thread.
inline void polled() {
  if (++scheduler.polls % (1 << 14) == 0) yield();
}

// Barrier

inline void release_barrier() {
  Scheduler& s = scheduler;
  s.last_votes = s.votes;
  s.last_arrived = s.arrived;
  s.votes = s.arrived = 0;
  for (int w = 0; w < 32; ++w) {
    s.make_ready(w, s.warps[w].at_barrier);
    s.warps[w].at_barrier = 0;
  }
}

inline ELF_SHIM_OPAQUE void barrier_wait(bool vote, const Where& where) {
  Scheduler& s = scheduler;
  const int w = s.running / 32, l = s.running % 32;
  s.warps[w].where[l] = where;
  if (s.arrived == 0) s.barrier = where;
  if (where.line() != s.barrier.line() ||
      (where.file_name() != s.barrier.file_name() &&
       std::strcmp(where.file_name(), s.barrier.file_name()) != 0))
    fail("barrier divergence: ", LaneName{s.running}, " waits at ", line_of(where),
         ", others wait at ", line_of(s.barrier));
  s.warps[w].at_barrier |= 1u << l;
  s.votes += vote;
  if (++s.arrived == s.live) release_barrier();
  suspend();
}

// Warp primitives

// Computes the results of all lanes in mask. False if they wait in different primitives or with
// different masks.
template <Op op>
bool complete(Warp& warp, uint32_t mask) {
  bool same = true;
  for (int l = 0; l < 32; ++l)
    if (mask >> l & 1) same &= warp.op[l] == op && warp.mask[l] == mask;
  if (!same || op == Op::kSyncwarp) return same;
  if constexpr (op <= Op::kShflDown) {
    for (int l = 0; l < 32; ++l) {
      if (!(mask >> l & 1)) continue;
      const int from = warp.source[l];
      if (!(mask >> from & 1))
        fail("lane ", l, " of warp ", &warp - scheduler.warps, " reads lane ", from, " in ",
             name_of(op), " (", line_of(warp.where[l]), "), which takes no part: mask ", std::hex,
             mask);
      warp.result[l] = warp.value[from];
    }
    return true;
  }
  uint32_t votes = 0;
  uint64_t total = warp.value[std::countr_zero(mask)];
  for (int l = std::countr_zero(mask), first = l; l < 32; ++l) {
    if (!(mask >> l & 1)) continue;
    const uint64_t v = warp.value[l];
    votes |= (v != 0 ? 1u : 0u) << l;
    if (l == first) continue;
    if (op == Op::kReduceAdd) total += v;
    if (op == Op::kReduceMinUnsigned) total = std::min(total, v);
    if (op == Op::kReduceMaxUnsigned) total = std::max(total, v);
    const auto a = static_cast<int64_t>(total), b = static_cast<int64_t>(v);
    if (op == Op::kReduceMinInt) total = static_cast<uint64_t>(std::min(a, b));
    if (op == Op::kReduceMaxInt) total = static_cast<uint64_t>(std::max(a, b));
  }
  if (op == Op::kBallot) total = votes;
  if (op == Op::kAny) total = votes != 0;
  if (op == Op::kAll) total = votes == mask;
  for (int l = 0; l < 32; ++l)
    if (mask >> l & 1) warp.result[l] = total;
  return true;
}

// Waits for the lanes in mask. Lanes past the end of the block do not exist and are ignored.
template <Op op>
ELF_SHIM_OPAQUE uint64_t warp_wait(uint32_t mask, uint64_t value, int source, const Where& where) {
  Scheduler& s = scheduler;
  const int w = s.running / 32, l = s.running % 32;
  const uint32_t bit = 1u << l;
  Warp& warp = s.warps[w];
  if (!(mask & bit))
    fail(LaneName{s.running}, " is not in the mask ", std::hex, mask, " of its ", name_of(op), " (",
         line_of(where), ")");
  mask &= warp.exists;
  warp.mask[l] = mask;
  warp.op[l] = op;
  warp.source[l] = static_cast<uint8_t>(source);
  warp.value[l] = value;
  warp.where[l] = where;
  warp.waiting |= bit;
  if ((warp.waiting & mask) == mask && complete<op>(warp, mask)) {
    warp.waiting &= ~mask;
    s.make_ready(w, mask);
  }
  suspend();
  return warp.result[l];
}

// Threads and blocks

// The body of a fiber. After its thread has ended, it runs the next thread on the same stack if
// that one has not started yet.
inline void fiber_main() {
  Scheduler& s = scheduler;
  s.on_fiber = 1;
  for (;;) {
    bool threw = false;
    try {
      s.kernel(s.arguments);
    } catch (...) {
      threw = true;
    }
    if (threw) fail("the kernel threw an exception");
    Thread& done = s.threads[s.running];
    s.warps[s.running / 32].live &= ~(1u << s.running % 32);
    if (--s.live == s.arrived && s.arrived > 0) release_barrier();
    const int to = take_next();
    if (to < 0 && s.live > 0) fail_stuck();
    if (to >= 0 && !s.threads[to].stack) {
      s.threads[to].stack = done.stack;
      done.stack = nullptr;
      become(to);
      continue;
    }
    s.stacks.give(done.stack);
    done.stack = nullptr;
    if (to < 0) abandon();
    become(to);
    switch_context(&done.context, &s.threads[to].context);
  }
}

inline void run_block(int threads, const SharedMemory& shared) {
  Scheduler& s = scheduler;
  shared.poison();
  s.ready_warps = 0;
  for (int w = 0; w < 32; ++w) {
    Warp& warp = s.warps[w];
    const int lanes = std::clamp(threads - w * 32, 0, 32);
    warp.exists = warp.live = lanes == 32 ? ~0u : (1u << lanes) - 1;
    warp.ready = warp.waiting = warp.at_barrier = 0;
    s.make_ready(w, warp.live);
  }
  s.live = threads;
  s.arrived = s.votes = 0;
  s.running = 0;
  become(take_next());
  switch_context(&s.main, &s.threads[s.running].context);
  s.on_fiber = 0;
  for (int t = 0; t < threads; ++t)
    if (s.threads[t].stack) {
      s.stacks.give(s.threads[t].stack);
      s.threads[t].stack = nullptr;
    }
}

// Ends a launch that uses more processor time than ELF_FAST_LAUNCH_SECONDS (default: 20). A thread
// that polls a plain variable cannot be stopped otherwise.
class Watchdog {
 public:
  Watchdog() {
    scheduler.timed_out = 0;
    const char* text = std::getenv("ELF_FAST_LAUNCH_SECONDS");
    const double seconds = text ? std::atof(text) : 20.0;
    struct sigaction action = {};
    action.sa_handler = [](int) {
      scheduler.timed_out = 1;
      if (scheduler.on_fiber) abandon();
    };
    action.sa_flags = SA_NODEFER;  // the handler does not return, so the signal must not be blocked
    sigaction(SIGVTALRM, &action, &before_);
    sigevent event = {};
    event.sigev_notify = SIGEV_THREAD_ID;
    event.sigev_signo = SIGVTALRM;
    event._sigev_un._tid = static_cast<pid_t>(syscall(SYS_gettid));
    armed_ = timer_create(CLOCK_THREAD_CPUTIME_ID, &event, &timer_) == 0;
    itimerspec when = {};
    when.it_value.tv_sec = static_cast<time_t>(seconds);
    when.it_value.tv_nsec =
        static_cast<long>((seconds - static_cast<double>(when.it_value.tv_sec)) * 1e9);
    if (armed_) timer_settime(timer_, 0, &when, nullptr);
  }
  ~Watchdog() {
    if (armed_) timer_delete(timer_);
    sigaction(SIGVTALRM, &before_, nullptr);
  }

 private:
  struct sigaction before_ = {};
  timer_t timer_ = {};
  bool armed_ = false;
};

// Runs the grid. False if the emulation found an error; scheduler.reason then says which.
inline bool run_grid(dim3 grid, dim3 block, void (*kernel)(const void*), const void* arguments) {
  static const SharedMemory shared;
  Scheduler& s = scheduler;
  const std::lock_guard lock(s.one_launch);
  const char* seed = std::getenv("ELF_FAST_SCHEDULE_SEED");
  s.random = (seed ? std::strtoull(seed, nullptr, 10) : 0) * 0x9E3779B97F4A7C15u +
             ++s.launches * 0xD1B54A32D192ED03u;
  s.failed = false;
  s.kernel = kernel;
  s.arguments = arguments;
  gridDim = grid;
  blockDim = block;
  const int threads = static_cast<int>(block.x * block.y * block.z);
  for (unsigned t = 0; t < static_cast<unsigned>(threads); ++t)
    s.threads[t].index = {t % block.x, t / block.x % block.y, t / block.x / block.y};

  std::vector<uint64_t> order(static_cast<size_t>(grid.x) * grid.y * grid.z);
  for (size_t i = 0; i < order.size(); ++i) {
    const size_t j = s.draw() % (i + 1);
    order[i] = order[j];
    order[j] = i;
  }
  const Watchdog watchdog;
  for (const uint64_t b : order) {
    blockIdx = {static_cast<unsigned>(b % grid.x), static_cast<unsigned>(b / grid.x % grid.y),
                static_cast<unsigned>(b / grid.x / grid.y)};
    run_block(threads, shared);
    if (s.timed_out)
      set_reason(LaneName{s.running}, " runs without end: the launch is out of processor time");
    if (!s.failed) continue;
    std::ostringstream block_name;
    block_name << "block (" << blockIdx.x << ", " << blockIdx.y << ", " << blockIdx.z << "): ";
    s.reason = block_name.str() + s.reason;
    return false;
  }
  return true;
}

}  // namespace elf_shim
#pragma GCC visibility pop
