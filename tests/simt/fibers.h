// Threads of control that one processor changes between by hand, and the stacks that they run on.
#pragma once
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <vector>
#ifdef SIMT_ADDRESS
#include <sanitizer/asan_interface.h>
#endif

namespace simt {
namespace {

#if defined(SIMT_ADDRESS) || defined(SIMT_THREAD)
constexpr size_t kStack = 256 << 10;
#else
constexpr size_t kStack = 64 << 10;
#endif

#if defined(__x86_64__) && !defined(SIMT_UCONTEXT)
extern "C" void simt_switch(void** save, void* to);
asm(R"(
.text
.type simt_switch, @function
simt_switch:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
.size simt_switch, . - simt_switch
)");
struct Context {
  void* top = nullptr;
  void begin(char* stack, void (*entry)()) {
    void** at = reinterpret_cast<void**>(stack + kStack);
    *--at = nullptr;  // nobody to return to
    *--at = reinterpret_cast<void*>(entry);
    top = at - 6;  // registers, whatever they hold
  }
  void go_to(Context& other) { simt_switch(&top, other.top); }
};
#else
struct Context {
  ucontext_t state;
  void begin(char* stack, void (*entry)()) {
    getcontext(&state);
    state.uc_stack.ss_sp = stack;
    state.uc_stack.ss_size = kStack;
    state.uc_link = nullptr;
    makecontext(&state, entry, 0);
  }
  void go_to(Context& other) { swapcontext(&state, &other.state); }
};
#endif

constexpr uint64_t kCanary = 0x5afe57acc0ffee00;

std::vector<char*> free_stacks;

char* take_stack() {
  if (free_stacks.empty()) {
    void* fresh = mmap(nullptr, kStack, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (fresh == MAP_FAILED) abort();
    free_stacks.push_back(static_cast<char*>(fresh));
  }
  char* stack = free_stacks.back();
  free_stacks.pop_back();
  memcpy(stack, &kCanary, sizeof(kCanary));
  return stack;
}

void give_stack(char* stack) {
  if (memcmp(stack, &kCanary, sizeof(kCanary)) != 0) {
    fprintf(stderr, "simt: a thread used more than %zu bytes of stack\n", kStack);
    abort();
  }
#ifdef SIMT_ADDRESS
  __asan_unpoison_memory_region(stack, kStack);  // of a thread that never ended
#endif
  free_stacks.push_back(stack);
}

}  // namespace
}  // namespace simt
