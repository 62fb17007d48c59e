// launch() as in launch.cuh: runs at once, returns 0, and throws emulator::Error for what a kernel does wrong.
#pragma once

#include <cstdint>
#include <utility>

#include "emulator.h"

namespace engm::cuda {

template <typename Argument>
int launch(void (*kernel)(Argument), int64_t blocks, int threads, int64_t shared, void* /*stream*/,
           const Argument& argument) {
  if (blocks == 0) return 0;
  if (blocks < 0 || blocks > INT32_MAX || threads < 1 || threads > 1024) return 9;  // cudaErrorInvalidConfiguration
  if (shared < 0 || shared > emulator::shared_limit()) return 1;                    // cudaErrorInvalidValue
  const std::pair<void (*)(Argument), const Argument&> call(kernel, argument);
  emulator::run_blocks(
      [](const void* context) {
        const auto& c = *static_cast<const std::pair<void (*)(Argument), const Argument&>*>(context);
        c.first(c.second);
      },
      &call, blocks, threads, shared);
  return 0;
}

}  // namespace engm::cuda
