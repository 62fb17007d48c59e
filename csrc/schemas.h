// Says which operators there are, and which functions serve them on the CPU and on CUDA. The extension registers them
// by these functions, and so does whatever else runs the same bindings: tests/emulator registers those of CUDA for CPU
// tensors, in a namespace of its own.
#pragma once

#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/library.h>

#include <string>
#include <utility>
#include <vector>

#include "ops.h"

namespace engm {

// A function, within which ATen's operators do not ask for gradients: none of ours is differentiable.
template <auto function>
struct BelowAutograd;

template <class Result, class... Arguments, Result (*function)(Arguments...)>
struct BelowAutograd<function> {
  static Result call(Arguments... arguments) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    return function(std::forward<Arguments>(arguments)...);
  }
};

inline void define_operators(torch::Library& m) {
  m.def(
      "linear_norm_sq(Tensor a, Tensor b, str form='auto', Tensor? shift=None, Tensor? patch_mean=None, "
      "Tensor? scale=None, Tensor? correlation=None) -> Tensor");
  m.def(
      "conv_norm_sq(Tensor x, Tensor gy, int[] kernel_size, int[] stride, int[] padding, int[] dilation, "
      "int groups=1, str form='auto', Tensor? shift=None, Tensor? patch_mean=None, Tensor? scale=None, "
      "Tensor? correlation=None) -> Tensor");
  m.def("linear_grads(Tensor a, Tensor b) -> (Tensor norm_sq, Tensor grads)");
  m.def(
      "conv_grads(Tensor x, Tensor gy, int[] kernel_size, int[] stride, int[] padding, int[] dilation, "
      "int groups=1) -> (Tensor norm_sq, Tensor grads)");
  m.def(
      "affine_norm_sq(Tensor x, Tensor gy, Tensor? mean, Tensor rstd, int channel_dim) -> "
      "(Tensor norm_sq, Tensor scale_grads, Tensor shift_grads)");
  m.def("clip_weights(Tensor squared_norms, float alpha, Tensor? factors=None) -> (Tensor norms, Tensor weights)");
  m.def(
      "correction_factors(Tensor outputs, Tensor mean, Tensor rstd, Tensor gain, Tensor shift, Tensor scale) -> "
      "(Tensor normalised, Tensor shift, Tensor scale)");
  m.def("patch_mean(Tensor x, int[] kernel_size, int[] stride, int[] padding, int[] dilation) -> Tensor");
  m.def("embedding_norm_sq(Tensor indices, Tensor gy, int padding_idx=-1) -> Tensor");
  m.def("scale_examples(Tensor[] tensors, Tensor weights) -> Tensor[]");
  m.def("weighted_sums(Tensor[] tensors, Tensor weights) -> Tensor[]");
  m.def("weighted_gemm(Tensor a, Tensor b, Tensor weights) -> Tensor");
  m.def(
      "recurrence(str kind, Tensor inputs, Tensor ih, Tensor hh, Tensor? bias_ih, Tensor? bias_hh, Tensor? hr, "
      "Tensor[] state, Tensor? present=None, bool reverse=False) -> Tensor[]");
  m.def(
      "recurrence_back(str kind, Tensor[] kept, Tensor hh, Tensor? hr, Tensor[] state, Tensor? outputs, Tensor? hidden, "
      "Tensor? cell, Tensor? present=None, bool reverse=False) -> Tensor[]");
  m.def("position_sums(Tensor gradients, int dim) -> (Tensor norm_sq, Tensor sums)");
  m.impl("position_sums", c10::DispatchKey::CompositeExplicitAutograd, BelowAutograd<position_sums_apart>::call);
  m.def("scaled_accumulate(Tensor? a, Tensor b, Tensor weights) -> Tensor", scaled_accumulate);
}

inline void implement_cpu(torch::Library& m) {
#define ENGM_IMPLEMENT(name) m.impl(#name, BelowAutograd<cpu::name>::call);
  ENGM_EACH_OPERATOR(ENGM_IMPLEMENT)
  ENGM_IMPLEMENT(position_sums)
  ENGM_IMPLEMENT(recurrence)
  ENGM_IMPLEMENT(recurrence_back)
#undef ENGM_IMPLEMENT
}

#if defined(ENGM_WITH_CUDA) || defined(ENGM_EMULATOR)
inline std::vector<std::string> cuda_kernels() {
#define ENGM_NAME(name) #name,
  return {ENGM_EACH_OPERATOR(ENGM_NAME)};
#undef ENGM_NAME
}

inline void implement_cuda(torch::Library& m) {
#define ENGM_IMPLEMENT(name) m.impl(#name, BelowAutograd<cuda::name>::call);
  ENGM_EACH_OPERATOR(ENGM_IMPLEMENT)
#undef ENGM_IMPLEMENT
}
#endif

}  // namespace engm
