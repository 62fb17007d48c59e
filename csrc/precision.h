// Answers how the CUDA kernels form products of a type. The dispatch asks here, and so does what `explain` shows.
#pragma once

#include <ATen/Context.h>

#include "trust.h"

namespace engm {

// Of kernels that form no matrix products, and so never round to TF32.
inline cuda::Precision precision_of(at::ScalarType type) {
  if (type == at::kDouble) return cuda::Precision::kFloat64;
  if (type == at::kBFloat16) return cuda::Precision::kBFloat16;
  if (type == at::kHalf) return cuda::Precision::kFloat16;
  return cuda::Precision::kFloat32;
}

// float32 follows torch.backends.cuda.matmul.fp32_precision and torch.backends.cudnn.conv.fp32_precision.
inline cuda::Precision precision_of(at::ScalarType type, bool convolution) {
  if (type != at::kFloat) return precision_of(type);
  if (const auto wanted = precision_on_trial()) return *wanted;
  const at::Float32Op op = convolution ? at::Float32Op::CONV : at::Float32Op::MATMUL;
  const bool tf32 = at::globalContext().float32Precision(at::Float32Backend::CUDA, op) == at::Float32Precision::TF32;
  return tf32 ? cuda::Precision::kTf32 : cuda::Precision::kFloat32;
}

}  // namespace engm
