// Binds clip_weights on CUDA: checks operands and allocates outputs.
#include "clip_weights.h"

#include <ATen/ops/empty.h>

#include "../ops.h"
#include "stream.h"

namespace engm::cuda {

std::tuple<at::Tensor, at::Tensor> clip_weights(const at::Tensor& squared_norms, double alpha,
                                                const OptionalTensor& factors) {
  const OnDevice on(squared_norms);
  const OptionalTensor wide = check_clip(squared_norms, alpha, factors);
  const bool is_double = squared_norms.scalar_type() == at::kDouble;
  if (!on.trusts(Kernel::kClipWeights, is_double ? Precision::kFloat64 : Precision::kFloat32))
    return aten::clip_weights(squared_norms, alpha, factors);
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
  check_launch(launch_clip_weights(problem, on.stream()), "clip_weights");
  return {norms, weights};
}

}  // namespace engm::cuda
