// norms[i] = sqrt(max(Σ_l c_l s[l, i], 0))      weights[i] = min(α / norms[i], 1)      s [layers, n], c [layers]
//
// A thread owns a run of examples and adds their layers in order, in double. Reads layers·n elements once. A sum that
// is not finite gives a NaN weight, a norm of 0 gives weight 1.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <cmath>
#include <limits>
#include <vector>

#include "../ops.h"
#include "shape.h"

namespace engm::cpu {

template <typename T>
static void run(const at::Tensor& squared_norms, const double* factors, double alpha, T* norms, T* weights) {
  const int64_t layers = squared_norms.size(0), n = squared_norms.size(1);
  const T* const squares = squared_norms.const_data_ptr<T>();
  at::parallel_for(0, n, grain(layers, kGrainElements), [&](int64_t begin, int64_t end) {
    std::vector<double> totals(end - begin, 0.0);
    for (int64_t l = 0; l < layers; ++l) {
      const double factor = factors ? factors[l] : 1.0;
      for (int64_t i = begin; i < end; ++i) totals[i - begin] += factor * double(squares[l * n + i]);
    }
    for (int64_t i = begin; i < end; ++i) {
      const double total = totals[i - begin];
      const bool finite = std::isfinite(total);
      const double norm = total < 0 ? (finite ? 0.0 : std::nan("")) : std::sqrt(total);
      norms[i] = static_cast<T>(norm);
      weights[i] = !finite ? std::numeric_limits<T>::quiet_NaN() : norm <= alpha ? T(1) : static_cast<T>(alpha / norm);
    }
  });
}

std::tuple<at::Tensor, at::Tensor> clip_weights(const at::Tensor& squared_norms, double alpha,
                                                const OptionalTensor& factors) {
  const OptionalTensor wide = check_clip(squared_norms, alpha, factors);
  const bool is_double = squared_norms.scalar_type() == at::kDouble;
  const at::Tensor s = squared_norms.to(is_double ? at::kDouble : at::kFloat).contiguous();
  at::Tensor norms = at::empty({s.size(1)}, s.options()), weights = at::empty({s.size(1)}, s.options());
  const double* c = wide ? wide->const_data_ptr<double>() : nullptr;
  if (is_double)
    run(s, c, alpha, norms.mutable_data_ptr<double>(), weights.mutable_data_ptr<double>());
  else
    run(s, c, alpha, norms.mutable_data_ptr<float>(), weights.mutable_data_ptr<float>());
  return {norms, weights};
}

}  // namespace engm::cpu
