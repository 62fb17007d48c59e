// norms[i] = sqrt(max(Σ_l c_l s[l, i], 0)), weights[i] = min(α / norms[i], 1); layers added in order, in double.
#include <ATen/ops/empty.h>

#include <cmath>
#include <limits>
#include <vector>

#include "../ops.h"

namespace engm::cpu {

template <typename T>
static void run(const at::Tensor& squared_norms, const double* factors, double alpha, T* norms, T* weights) {
  const int64_t layers = squared_norms.size(0), n = squared_norms.size(1);
  std::vector<double> total(n, 0.0);
  for (int64_t l = 0; l < layers; ++l) {
    const T* row = squared_norms.const_data_ptr<T>() + l * n;
    const double factor = factors ? factors[l] : 1.0;
    for (int64_t i = 0; i < n; ++i) total[i] += factor * double(row[i]);
  }
  for (int64_t i = 0; i < n; ++i) {
    const bool finite = std::isfinite(total[i]);
    const double norm = total[i] < 0 ? (finite ? 0.0 : std::nan("")) : std::sqrt(total[i]);
    norms[i] = static_cast<T>(norm);
    weights[i] = !finite ? std::numeric_limits<T>::quiet_NaN() : norm <= alpha ? T(1) : static_cast<T>(alpha / norm);
  }
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
