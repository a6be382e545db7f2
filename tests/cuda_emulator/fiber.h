// Stacks that the scheduler switches between: one fiber per CUDA thread.
//
// x86-64 uses a hand-written switch (about 5 ns: it saves the six callee-saved registers and swaps the stack
// pointer); elsewhere, or with CUDA_EMULATOR_UCONTEXT, swapcontext (one system call per switch) does the
// same. The sanitizers are told of every switch, because each keeps per-stack state of its own.
#pragma once

#include <cstddef>

#if !defined(__x86_64__)
#define CUDA_EMULATOR_UCONTEXT 1
#endif
#ifdef CUDA_EMULATOR_UCONTEXT
#include <ucontext.h>
#endif

namespace cuda_emulator {

// A place to continue from: the scheduler itself, or a fiber that has been switched away from.
struct Context {
#ifdef CUDA_EMULATOR_UCONTEXT
  ucontext_t state{};
#else
  void* stack_pointer = nullptr;
#endif
  void* tsan_fiber = nullptr;  // ThreadSanitizer's own view of this stack
  void* fake_stack = nullptr;  // AddressSanitizer's saved fake stack
  const void* stack_bottom = nullptr;
  size_t stack_size = 0;
};

// One stack and the function that runs on it. `entry` must never return: it hands over with switch_context.
class Fiber {
 public:
  Fiber();
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // Forgets whatever the stack held; the next switch to `context` calls entry() on an empty stack.
  void reset(void (*entry)());

  Context context;

 private:
  void* mapping_ = nullptr;
};

// Makes `context` describe the stack that is running now.
void adopt_current_stack(Context& context);

// Leaves `from`, continues at `to`; returns when something switches back to `from`. It orders no memory.
void switch_context(Context& from, Context& to);

// To be called first by an entry function: completes the switch that started it.
void finish_first_switch(Context& self, Context& caller);

// Memory ordering as ThreadSanitizer sees it; nothing in other builds.
void tsan_acquire(void* token);
void tsan_release(void* token);

}  // namespace cuda_emulator
