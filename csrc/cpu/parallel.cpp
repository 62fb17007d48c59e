// Answers which threads the loops of the other files in this folder run on. The body of at::parallel_for is inline, so
// that the flags of this extension decide, and not only those that torch was compiled with: one that was built without
// -fopenmp would run every loop on the calling thread.
#include <ATen/Parallel.h>

#include "kernels.h"

namespace engm::cpu {

const char* parallel_backend() {
#if !defined(INTRA_OP_PARALLEL)
  return "none (serial)";
#elif AT_PARALLEL_OPENMP
  return "OpenMP";
#else
  return "native";
#endif
}

}  // namespace engm::cpu
