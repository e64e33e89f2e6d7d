// fibre.hpp: stacks that take turns on one OS thread. Owns the switch; who runs next is
// execution.hpp's.
#pragma once
#include <cstddef>

#if !defined(__x86_64__) || defined(HOST_RUN_UCONTEXT)
#include <ucontext.h>
namespace host_run {
// Portable, and about four times slower: swapcontext makes a system call.
struct Context {
  ucontext_t state;
};
inline void context_swap(Context& from, Context& to) { swapcontext(&from.state, &to.state); }
inline void context_make(Context& context, char* stack, size_t bytes, void (*entry)()) {
  getcontext(&context.state);
  context.state.uc_stack.ss_sp = stack;
  context.state.uc_stack.ss_size = bytes;
  context.state.uc_link = nullptr;
  makecontext(&context.state, entry, 0);
}
}  // namespace host_run
#else
// Saves what the System V ABI asks a callee to keep, swaps stacks, restores. Weak: the header is in
// several units.
asm(R"(
.text
.weak host_run_swap
.type host_run_swap,@function
host_run_swap:
  pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
  movq %rsp, (%rdi)
  movq (%rsi), %rsp
  popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
  ret
.size host_run_swap,.-host_run_swap
)");
namespace host_run {
struct Context {
  void* stack_pointer;
};
extern "C" void host_run_swap(Context* from, Context* to);
inline void context_swap(Context& from, Context& to) { host_run_swap(&from, &to); }
inline void context_make(Context& context, char* stack, size_t bytes, void (*entry)()) {
  void** top = reinterpret_cast<void**>(stack + bytes);  // aligned to 16
  *--top = nullptr;                                      // the return address that entry never uses
  *--top = reinterpret_cast<void*>(entry);
  for (int saved = 0; saved < 6; ++saved) *--top = nullptr;
  context.stack_pointer = top;
}
}  // namespace host_run
#endif
