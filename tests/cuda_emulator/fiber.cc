#include "fiber.h"

#include <sys/mman.h>

#include <cstdint>
#include <new>

// This file is compiled without instrumentation in every build, so the sanitizers' entry points are declared
// here rather than taken from their headers.
#ifdef CUDA_EMULATOR_TSAN
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned flags);
void __tsan_destroy_fiber(void* fiber);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_acquire(void* address);
void __tsan_release(void* address);
}
// Without this flag a switch would itself order the two fibers, and hide every race between them.
constexpr unsigned kTsanNoSync = 1;
#endif

#ifdef CUDA_EMULATOR_ASAN
extern "C" {
void __sanitizer_start_switch_fiber(void** fake_stack_save, const void* bottom, size_t size);
void __sanitizer_finish_switch_fiber(void* fake_stack_save, const void** bottom_old, size_t* size_old);
void __asan_unpoison_memory_region(const volatile void* address, size_t size);
}
// Instrumented frames are several times larger.
constexpr size_t kStackBytes = 256 * 1024;
#else
constexpr size_t kStackBytes = 128 * 1024;
#endif
constexpr size_t kGuardBytes = 4096;

#ifndef CUDA_EMULATOR_UCONTEXT
// void cuda_emulator_switch_stack(void** save_rsp /* rdi */, void* load_rsp /* rsi */)
extern "C" void cuda_emulator_switch_stack(void** save, void* load);
asm(R"(
.text
.hidden cuda_emulator_switch_stack
.globl cuda_emulator_switch_stack
.type cuda_emulator_switch_stack, @function
cuda_emulator_switch_stack:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size cuda_emulator_switch_stack, . - cuda_emulator_switch_stack
)");
#endif

namespace cuda_emulator {

Fiber::Fiber() {
  mapping_ = mmap(nullptr, kStackBytes + kGuardBytes, PROT_READ | PROT_WRITE,
                  MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_STACK, -1, 0);
  if (mapping_ == MAP_FAILED) throw std::bad_alloc();
  mprotect(mapping_, kGuardBytes, PROT_NONE);  // stacks grow down: an overflow faults instead of spreading
  context.stack_bottom = static_cast<char*>(mapping_) + kGuardBytes;
  context.stack_size = kStackBytes;
#ifdef CUDA_EMULATOR_TSAN
  context.tsan_fiber = __tsan_create_fiber(0);
#endif
}

Fiber::~Fiber() {
#ifdef CUDA_EMULATOR_TSAN
  __tsan_destroy_fiber(context.tsan_fiber);
#endif
#ifdef CUDA_EMULATOR_ASAN
  __asan_unpoison_memory_region(context.stack_bottom, context.stack_size);  // whoever maps it next
#endif
  munmap(mapping_, kStackBytes + kGuardBytes);
}

void Fiber::reset(void (*entry)()) {
#ifdef CUDA_EMULATOR_ASAN
  // An abandoned fiber leaves the poison of its frames behind.
  __asan_unpoison_memory_region(context.stack_bottom, context.stack_size);
  context.fake_stack = nullptr;
#endif
#ifdef CUDA_EMULATOR_UCONTEXT
  getcontext(&context.state);
  context.state.uc_stack.ss_sp = const_cast<void*>(context.stack_bottom);
  context.state.uc_stack.ss_size = context.stack_size;
  context.state.uc_link = nullptr;
  makecontext(&context.state, entry, 0);
#else
  auto top = reinterpret_cast<uintptr_t>(context.stack_bottom) + context.stack_size;
  auto* frame = reinterpret_cast<void**>((top & ~uintptr_t{15}) - 64);
  for (int i = 0; i < 8; ++i) frame[i] = nullptr;  // six registers, the entry, and a null return address
  frame[6] = reinterpret_cast<void*>(entry);       // 16-byte aligned, as the calling convention has it
  context.stack_pointer = frame;
#endif
}

void adopt_current_stack(Context& context) {
#ifdef CUDA_EMULATOR_TSAN
  context.tsan_fiber = __tsan_get_current_fiber();
#else
  (void)context;
#endif
}

void switch_context(Context& from, Context& to) {
#ifdef CUDA_EMULATOR_TSAN
  __tsan_switch_to_fiber(to.tsan_fiber, kTsanNoSync);
#endif
#ifdef CUDA_EMULATOR_ASAN
  __sanitizer_start_switch_fiber(&from.fake_stack, to.stack_bottom, to.stack_size);
#endif
#ifdef CUDA_EMULATOR_UCONTEXT
  swapcontext(&from.state, &to.state);
#else
  cuda_emulator_switch_stack(&from.stack_pointer, to.stack_pointer);
#endif
#ifdef CUDA_EMULATOR_ASAN
  __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
#endif
}

void finish_first_switch(Context& self, Context& caller) {
#ifdef CUDA_EMULATOR_ASAN
  // The caller's stack is the host thread's; only AddressSanitizer knows its bounds.
  __sanitizer_finish_switch_fiber(self.fake_stack, &caller.stack_bottom, &caller.stack_size);
#else
  (void)self;
  (void)caller;
#endif
}

#ifdef CUDA_EMULATOR_TSAN
void tsan_acquire(void* token) { __tsan_acquire(token); }
void tsan_release(void* token) { __tsan_release(token); }
#else
void tsan_acquire(void*) {}
void tsan_release(void*) {}
#endif

}  // namespace cuda_emulator
