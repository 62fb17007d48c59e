// Launches the kernels of expanded_correction.cuh.
#include "expanded_correction.cuh"

#include "launch.cuh"

namespace engm::cuda {
namespace {

template <typename T>
int launch_filters(const CorrectionFilters& p, void* stream) {
  return launch(correction_filters_kernel<T>, p.rows, kFilterThreads,
                2 * (kFilterThreads / 32) * sizeof(typename SumOf<T>::Type), stream, p);
}

template <typename T>
int launch_correction(const ExpandedCorrection& p, void* stream) {
  return launch(expanded_correction_kernel<T>, p.n, kExpandedThreads,
                2 * kExpandedWarps * sizeof(typename SumOf<T>::Type), stream, p);
}

}  // namespace

int launch_correction_filters(const CorrectionFilters& p, void* stream) {
  switch (p.element) {
    case Element::kFloat64:
      return launch_filters<double>(p, stream);
    case Element::kFloat16:
      return launch_filters<Half>(p, stream);
    case Element::kBFloat16:
      return launch_filters<Bf16>(p, stream);
    default:
      return launch_filters<float>(p, stream);
  }
}

int launch_expanded_correction(const ExpandedCorrection& p, void* stream) {
  switch (p.element) {
    case Element::kFloat64:
      return launch_correction<double>(p, stream);
    case Element::kFloat16:
      return launch_correction<Half>(p, stream);
    case Element::kBFloat16:
      return launch_correction<Bf16>(p, stream);
    default:
      return launch_correction<float>(p, stream);
  }
}

}  // namespace engm::cuda
