// Switching between stacks: a few instructions on x86-64, ucontext elsewhere.
#pragma once

#include <cstddef>

#if !defined(ENGM_EMULATOR_ASSEMBLY)
#if defined(__x86_64__)
#define ENGM_EMULATOR_ASSEMBLY 1
#else
#define ENGM_EMULATOR_ASSEMBLY 0
#endif
#endif

#if !ENGM_EMULATOR_ASSEMBLY
#include <ucontext.h>
#endif

namespace emulator {

class Fiber {
 public:
  // The thread that the program runs on; switch_to from another fiber comes back to it.
  Fiber() = default;
  // A new one that will run `entry`, which must never return, on the stack that ends at `top`.
  void start(void (*entry)(), unsigned char* top, size_t bytes);
  // Stops here and goes on there.
  void switch_to(Fiber& other);

 private:
#if ENGM_EMULATOR_ASSEMBLY
  void* stack_pointer_ = nullptr;
#else
  ucontext_t context_;
#endif
};

// Stacks of one size with an unmapped page below each, so that running over one is a crash instead of a wrong number.
class Stacks {
 public:
  static constexpr size_t kBytes = 64 << 10;
  // Makes at least `count`; those that are there stay.
  void reserve(int count);
  // One past the highest byte of stack i. Tops lie at different offsets, or all stacks would share few cache sets.
  unsigned char* top(int i) const;

 private:
  unsigned char* memory_ = nullptr;
  int count_ = 0;
};

}  // namespace emulator
