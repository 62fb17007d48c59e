// Declares the functions behind the operators that schemas.h registers.
#pragma once

#include <ATen/core/Tensor.h>

#include <string_view>
#include <tuple>
#include <vector>

#include "checks.h"

namespace engm {

namespace cpu {
#include "signatures.inl"
}  // namespace cpu

#if defined(ENGM_WITH_CUDA) || defined(ENGM_EMULATOR)
namespace cuda {
#include "signatures.inl"
}  // namespace cuda
#endif

// The same, composed of ATen's operators, for every device: what a kernel is held against before it is used, and what
// computes in place of a kernel that failed. It forms gradients chunk by chunk, and so takes longer.
namespace aten {
#include "signatures.inl"

// How many elements of gradients, and of what they are made of, are formed at once; a quarter of a gigabyte in float32.
void form_at_once(int64_t elements);
}  // namespace aten

// Calls `m(name)` for every operator of which each device has a function of its own.
#define ENGM_EACH_OPERATOR(m) \
  m(linear_norm_sq) m(conv_norm_sq) m(linear_grads) m(conv_grads) m(affine_norm_sq) m(clip_weights) \
  m(correction_factors) m(patch_mean) m(embedding_norm_sq) m(scale_examples) m(weighted_sums) m(weighted_gemm)

// One such set of functions.
struct Operators {
#define ENGM_MEMBER(name) decltype(&aten::name) name;
  ENGM_EACH_OPERATOR(ENGM_MEMBER)
#undef ENGM_MEMBER
};

// The steps of one layer of a recurrent network in one direction, forwards and back; engm/ops.py has the arguments. An
// operator serves the CPU, in float32 and float64. The functions composed of ATen's operators serve every device.
#define ENGM_RECURRENCE                                                                                                \
  std::vector<at::Tensor> recurrence(                                                                                  \
      std::string_view kind, const at::Tensor& inputs, const at::Tensor& ih, const at::Tensor& hh,                     \
      const OptionalTensor& bias_ih, const OptionalTensor& bias_hh, const OptionalTensor& hr, at::TensorList state,    \
      const OptionalTensor& present, bool reverse);                                                                    \
  std::vector<at::Tensor> recurrence_back(                                                                             \
      std::string_view kind, at::TensorList kept, const at::Tensor& hh, const OptionalTensor& hr, at::TensorList state, \
      const OptionalTensor& outputs, const OptionalTensor& hidden, const OptionalTensor& cell,                         \
      const OptionalTensor& present, bool reverse);
namespace cpu {
ENGM_RECURRENCE
}  // namespace cpu
namespace aten {
ENGM_RECURRENCE
}  // namespace aten
#undef ENGM_RECURRENCE

// The sums over a dimension of [n, ., .] and their squared norms [n], composed of ATen's operators, for every device. Those
// of the first may be a view, those of the second, which serves as an operator, are not. The CPU has an operator of its own.
std::tuple<at::Tensor, at::Tensor> position_sums(const at::Tensor& gradients, int64_t dim);
std::tuple<at::Tensor, at::Tensor> position_sums_apart(const at::Tensor& gradients, int64_t dim);
namespace cpu {
std::tuple<at::Tensor, at::Tensor> position_sums(const at::Tensor& gradients, int64_t dim);
}  // namespace cpu

// Whether the CPU's operator has loops for these.
bool is_summed_in_loops(const at::Tensor& gradients, int64_t dim);

// Serves every device: it is composed of ATen's operators. a [n, T, p] or nothing, b [n, T, d], weights [n] -> [d, p],
// or [d] without a.
at::Tensor scaled_accumulate(const OptionalTensor& a, const at::Tensor& b, const at::Tensor& weights);

}  // namespace engm
