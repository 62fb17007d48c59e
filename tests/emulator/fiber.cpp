#include "fiber.h"

#include <sys/mman.h>

#include <cstdint>
#include <new>

namespace emulator {

#if ENGM_EMULATOR_ASSEMBLY

// Saves the registers that a called function must keep and the stack pointer, then restores the other fiber's.
extern "C" void engm_emulator_switch(void** save, void* load);
asm(R"(
.text
.hidden engm_emulator_switch
.globl engm_emulator_switch
.type engm_emulator_switch, @function
engm_emulator_switch:
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
.size engm_emulator_switch, .-engm_emulator_switch
)");

void Fiber::start(void (*entry)(), unsigned char* top, size_t) {
  uint64_t* at = reinterpret_cast<uint64_t*>(reinterpret_cast<uintptr_t>(top) & ~uintptr_t(15));
  *--at = 0;  // where a return address would lie: keeps the alignment of a call and ends backtraces
  *--at = reinterpret_cast<uint64_t>(entry);
  for (int i = 0; i < 6; ++i) *--at = 0;
  stack_pointer_ = at;
}

void Fiber::switch_to(Fiber& other) { engm_emulator_switch(&stack_pointer_, other.stack_pointer_); }

#else

void Fiber::start(void (*entry)(), unsigned char* top, size_t bytes) {
  getcontext(&context_);
  context_.uc_stack.ss_sp = top - bytes;
  context_.uc_stack.ss_size = bytes;
  context_.uc_link = nullptr;
  makecontext(&context_, entry, 0);
}

void Fiber::switch_to(Fiber& other) { swapcontext(&context_, &other.context_); }

#endif

namespace {

constexpr size_t kGuard = 4096;
constexpr size_t kPitch = Stacks::kBytes + kGuard;

}  // namespace

void Stacks::reserve(int count) {
  if (count <= count_) return;
  if (memory_ != nullptr) munmap(memory_, kPitch * count_);
  void* memory = mmap(nullptr, kPitch * count, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  memory_ = static_cast<unsigned char*>(memory);
  count_ = count;
  for (int i = 0; i < count; ++i) mprotect(memory_ + kPitch * i, kGuard, PROT_NONE);
}

unsigned char* Stacks::top(int i) const { return memory_ + kPitch * (i + 1) - (i % 31) * 128; }

}  // namespace emulator
