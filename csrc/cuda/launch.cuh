// Starts a kernel. The emulator has its own launch() in its place.
#pragma once

#include "ptx.cuh"

namespace engm::cuda {

// How many blocks, parts or tiles of `b` cover `a`.
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace engm::cuda

#ifdef ENGM_EMULATOR
#include "emulated_launch.h"
#else

namespace engm::cuda {

// Enqueues kernel<<<blocks, threads, shared>>>(argument) on the current device and returns the cudaError_t.
template <typename Argument>
int launch(void (*kernel)(Argument), int64_t blocks, int threads, int64_t shared, void* stream,
           const Argument& argument) {
  if (blocks == 0) return cudaSuccess;
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  if (shared > 48 << 10) {
    // The limit is raised to the device's: another thread may be about to launch the same kernel with more.
    int device = 0, most = 0;
    cudaError_t raised = cudaGetDevice(&device);
    if (raised == cudaSuccess) raised = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    if (raised == cudaSuccess)
      raised = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    most);
    if (raised != cudaSuccess) return cudaGetLastError(), raised;  // clears the error, which is reported here
  }
  kernel<<<dim3(unsigned(blocks)), dim3(unsigned(threads)), size_t(shared), static_cast<cudaStream_t>(stream)>>>(
      argument);
  return cudaGetLastError();
}

}  // namespace engm::cuda

#endif
