// Gives a binding the device, the stream and the limits of the machine that it launches on. The emulator stands in for
// all of it.
#pragma once

#include <ATen/core/Tensor.h>

#include "../trust.h"

#ifdef ENGM_EMULATOR

#include "emulated_launch.h"

namespace engm::cuda {

struct OnDevice {
  explicit OnDevice(const at::Tensor& t) : device_(t.device()) {}
  void* stream() const { return nullptr; }
  int64_t shared_limit() const { return emulator::shared_limit(); }
  int multiprocessors() const { return 1; }
  bool trusts(Kernel kernel, Precision precision) const { return trusted(kernel, precision, device_, false); }

 private:
  at::Device device_;
};

inline void check_launch(int error, const char* op) { TORCH_CHECK(error == 0, op, ": the emulated launch failed."); }

}  // namespace engm::cuda

#else

#include <c10/cuda/CUDAGraphsC10Utils.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <cuda_runtime_api.h>

namespace engm::cuda {

// Makes the tensor's device current for the scope of one operator.
class OnDevice {
 public:
  explicit OnDevice(const at::Tensor& t) : guard_(t.device()) {}
  void* stream() const { return c10::cuda::getCurrentCUDAStream().stream(); }
  // The bytes of shared memory that one block may use: 163 KB on sm_80, 99 KB on sm_86, 227 KB on sm_90.
  int64_t shared_limit() const { return attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin); }
  int multiprocessors() const { return attribute(cudaDevAttrMultiProcessorCount); }
  // Whether the kernel has shown here that it is right; on first use that is tried.
  bool trusts(Kernel kernel, Precision precision) const {
    return trusted(kernel, precision, guard_.current_device(),
                   c10::cuda::currentStreamCaptureStatusMayInitCtx() != c10::cuda::CaptureStatus::None);
  }

 private:
  int attribute(cudaDeviceAttr which) const {
    int value = 0;
    const cudaError_t error = cudaDeviceGetAttribute(&value, which, guard_.current_device().index());
    TORCH_CHECK(error == cudaSuccess, "engm: ", cudaGetErrorString(error), ".");
    return value;
  }

  c10::cuda::CUDAGuard guard_;
};

inline void check_launch(int error, const char* op) {
  TORCH_CHECK(error == 0, op, ": the CUDA launch failed: ", cudaGetErrorString(static_cast<cudaError_t>(error)), ".");
}

}  // namespace engm::cuda

#endif
