#include "mutant.h"

namespace emulator {
int mutant = 0;
}  // namespace emulator

extern "C" __attribute__((visibility("default"))) void set_mutant(int number) { emulator::mutant = number; }
