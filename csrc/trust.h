// Answers whether a kernel may be used on a device: not before it has agreed with ATen's operators there.
//
// A kernel that nobody has tried on a card, or a compiler that nobody has tried, then costs speed and never a number. On
// first use in a precision the kernel's trials (self_test.cpp) are run; if one fails, a warning says so and the binding
// computes by ATen's operators (through_aten.cpp) for as long as the process lives.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string>
#include <vector>

#include "cuda/problem.h"

namespace engm {

using cuda::Precision;

// What is trusted or not: a family of kernels, in one precision, on one device.
enum class Kernel : uint8_t {
  kGemmNorm,
  kConvNorm,
  kDepthwiseNorm,
  kGramNorm,
  kGramContraction,
  kRankOne,
  kAffineNorm,
  kCorrection,
  kEmbeddingNorm,
  kClipWeights,
  kWeighting,
  kWeightedGemm,
  kCount
};

const char* name_of(Kernel kernel);
const char* name_of(Precision precision);

// One comparison of a kernel with ATen's operators in float64.
struct Trial {
  Kernel kernel;
  Precision precision;
  std::string what;     // operator and shapes
  double error = 0;     // the largest difference, as a part of the largest number that was expected
  double limit = 0;     // what rounding explains
  std::string failure;  // why nothing was computed, or empty
  bool passed() const { return failure.empty() && error <= limit; }
};

struct Verdict {
  Kernel kernel;
  Precision precision;
  at::Device device;
  bool trusted;
  std::string reason;  // the first trial that failed, in words
};

// Runs the trials of a kernel on a device. Draws from generators of its own, and waits for the device.
std::vector<Trial> trials_of(Kernel kernel, Precision precision, at::Device device);

// Whether trials run in this thread: kernels are then used as they are.
bool on_trial();

// How a trial wants things in this thread: the precision that float32 is computed in, and the Gram form alone, without
// the direct form in its place where terms cancel, which would hide what is wrong with it.
std::optional<Precision> precision_on_trial();
bool gram_on_its_own();

// Whether the kernel may be used. On first use that runs its trials, for which the device must not be `capturing`.
bool trusted(Kernel kernel, Precision precision, at::Device device, bool capturing);

// Runs all trials of all kernels, takes their outcome for the verdict, and returns them.
std::vector<Trial> self_test(at::Device device);

// All verdicts so far.
std::vector<Verdict> verdicts();

// For tests: kernels that are used as they are, or are on probation again.
void trust_everything(bool everything);
void forget_verdicts();

}  // namespace engm
