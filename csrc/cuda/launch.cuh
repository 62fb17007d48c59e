// How a kernel is started; the emulator has its own.
#pragma once

#include "ptx.cuh"

#ifdef ENGM_EMULATOR
#include "emulated_launch.h"
#else

namespace engm::cuda {

// Enqueues kernel<<<blocks, threads, shared>>>(argument) and returns the cudaError_t.
template <typename Argument>
int launch(void (*kernel)(Argument), int64_t blocks, int threads, int64_t shared, void* stream,
           const Argument& argument) {
  if (blocks == 0) return cudaSuccess;
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  if (shared > 48 << 10) {
    const cudaError_t raised = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                                    cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared));
    if (raised != cudaSuccess) return raised;
  }
  kernel<<<dim3(unsigned(blocks)), dim3(unsigned(threads)), size_t(shared), static_cast<cudaStream_t>(stream)>>>(
      argument);
  return cudaGetLastError();
}

}  // namespace engm::cuda

#endif
