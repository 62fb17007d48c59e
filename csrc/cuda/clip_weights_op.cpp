// clip_weights on CUDA: checks, outputs, device and stream.
#include "clip_weights.h"

#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "../ops.h"

namespace engm::cuda {

std::tuple<at::Tensor, at::Tensor> clip_weights(const at::Tensor& squared_norms, double alpha,
                                                const OptionalTensor& factors) {
  const OptionalTensor wide = check_clip(squared_norms, alpha, factors);
  const bool is_double = squared_norms.scalar_type() == at::kDouble;
  const c10::cuda::CUDAGuard guard(squared_norms.device());
  const at::Tensor s = squared_norms.to(is_double ? at::kDouble : at::kFloat).contiguous();
  at::Tensor norms = at::empty({s.size(1)}, s.options()), weights = at::empty({s.size(1)}, s.options());
  const ClipWeights problem{s.const_data_ptr(),
                            wide ? wide->const_data_ptr<double>() : nullptr,
                            norms.mutable_data_ptr(),
                            weights.mutable_data_ptr(),
                            s.size(0),
                            s.size(1),
                            alpha,
                            is_double};
  const int error = launch_clip_weights(problem, c10::cuda::getCurrentCUDAStream().stream());
  TORCH_CHECK(error == 0, "clip_weights: the CUDA launch failed: ",
              cudaGetErrorString(static_cast<cudaError_t>(error)), ".");
  return {norms, weights};
}

}  // namespace engm::cuda
