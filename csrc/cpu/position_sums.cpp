// sums[i] = Σ_t g[i, t, :]   and   norm_sq[i] = ‖sums[i]‖²     g [n, T, d], few numbers and few positions
//
// Each number is read once, in one loop over examples, where ATen's operators would take longer to begin than to compute.
// The squares are added in double.
#include <ATen/ops/empty.h>

#include <algorithm>

#include "../ops.h"
#include "kernels.h"

namespace engm {

bool is_summed_in_loops(const at::Tensor& gradients, int64_t dim) {
  constexpr int64_t kFew = 1 << 16, kFewPositions = 256;  // in order: of more, the rounding errors would show
  const bool known = gradients.scalar_type() == at::kFloat || gradients.scalar_type() == at::kDouble;
  return gradients.is_cpu() && known && gradients.dim() == 3 && dim == 1 && gradients.layout() == at::kStrided &&
         gradients.numel() > 0 && gradients.numel() <= kFew && gradients.size(1) <= kFewPositions &&
         (gradients.size(2) == 1 || gradients.stride(2) == 1);
}

namespace cpu {

namespace {

template <typename T>
void sum_up(const at::Tensor& gradients, T* norm_sq, T* sums) {
  const Kernels<T>& k = kernels<T>();
  const int64_t n = gradients.size(0), positions = gradients.size(1), d = gradients.size(2);
  const T* from = gradients.const_data_ptr<T>();
  for (int64_t i = 0; i < n; ++i, from += gradients.stride(0), sums += d) {
    std::copy_n(from, d, sums);
    for (int64_t t = 1; t < positions; ++t) k.axpy(T(1), from + t * gradients.stride(1), d, sums);
    double square = 0, magnitude = 0;
    k.dot(sums, sums, d, &square, &magnitude);
    norm_sq[i] = static_cast<T>(square);
  }
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> position_sums(const at::Tensor& gradients, int64_t dim) {
  if (!is_summed_in_loops(gradients, dim)) return position_sums_apart(gradients, dim);
  const auto options = gradients.options();
  at::Tensor norm_sq = at::empty({gradients.size(0)}, options);
  at::Tensor sums = at::empty({gradients.size(0), gradients.size(2)}, options);
  if (gradients.scalar_type() == at::kFloat)
    sum_up(gradients, norm_sq.mutable_data_ptr<float>(), sums.mutable_data_ptr<float>());
  else
    sum_up(gradients, norm_sq.mutable_data_ptr<double>(), sums.mutable_data_ptr<double>());
  return {norm_sq, sums};
}

}  // namespace cpu

}  // namespace engm
