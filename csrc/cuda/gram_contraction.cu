// Chooses the block of gram_contraction.cuh by the size of the Gram matrices, and the type of its sums.
#include "gram_contraction.cuh"

#include "gram_cancellation.h"
#include "launch.cuh"

namespace engm::cuda {
namespace {

constexpr int kFewPositions = 64;  // whose upper triangles are some 500 packs of 16 bytes

template <typename Sum, int kThreads>
int launch_threads(const GramContraction& c, void* stream) {
  return launch(gram_contraction_kernel<Sum, kThreads>, c.n, kThreads, 2 * (kThreads / 32) * sizeof(double), stream, c);
}

template <typename Sum>
int launch_typed(const GramContraction& c, void* stream) {
  return c.positions <= kFewPositions ? launch_threads<Sum, 128>(c, stream) : launch_threads<Sum, 1024>(c, stream);
}

}  // namespace

int launch_gram_contraction(const GramContraction& problem, Precision precision, void* stream) {
  GramContraction c = problem;
  c.cancellation = gram_cancellation(precision);
  return precision == Precision::kFloat64 ? launch_typed<double>(c, stream) : launch_typed<float>(c, stream);
}

}  // namespace engm::cuda
