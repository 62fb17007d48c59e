// Which of the mutations that mutations.py wrote into the kernels is switched on; 0 is none.
#pragma once

namespace emulator {
extern int mutant;
}  // namespace emulator
