// norm_sq[i] = Σ_v ‖Σ_{t: idx[i, t] = v} gy[i, t]‖²        idx [n, T], gy [n, T, d]
//
// The squared norm of an embedding's weight gradient. A thread owns an example. It sorts the positions by index,
// stably, so that the rows of one index are added in their order, in double, and reads gy once. The workspace of a
// thread is T positions and d doubles.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <numeric>
#include <vector>

#include "../elementwise_checks.h"
#include "../ops.h"
#include "shape.h"

namespace engm::cpu {
namespace {

template <typename T>
double one_example(const int64_t* indices, const T* gy, int64_t positions, int64_t d, int64_t padding_idx,
                   std::vector<int64_t>& order, std::vector<double>& sum) {
  order.resize(positions);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t s, int64_t t) { return indices[s] < indices[t]; });
  double total = 0;
  for (int64_t k = 0; k < positions;) {
    const int64_t index = indices[order[k]];
    std::fill(sum.begin(), sum.end(), 0.0);
    for (; k < positions && indices[order[k]] == index; ++k)
      for (int64_t c = 0; c < d; ++c) sum[c] += gy[order[k] * d + c];
    if (index == padding_idx && padding_idx >= 0) continue;
    for (double value : sum) total += value * value;
  }
  return total;
}

template <typename T>
void run(const at::Tensor& indices, const at::Tensor& gy, int64_t padding_idx, T* norm_sq) {
  const int64_t positions = gy.size(1), d = gy.size(2);
  const int64_t* const index = indices.const_data_ptr<int64_t>();
  const T* const rows = gy.const_data_ptr<T>();
  at::parallel_for(0, gy.size(0), grain(positions * d, kGrainElements), [&](int64_t begin, int64_t end) {
    std::vector<int64_t> order;
    std::vector<double> sum(d);
    for (int64_t i = begin; i < end; ++i)
      norm_sq[i] = static_cast<T>(one_example(index + i * positions, rows + i * positions * d, positions, d,
                                              padding_idx, order, sum));
  });
}

}  // namespace

at::Tensor embedding_norm_sq(const at::Tensor& indices_in, const at::Tensor& gy_in, int64_t padding_idx) {
  const at::ScalarType type = check_embedding(indices_in, gy_in);
  const at::Tensor indices = indices_in.to(at::kLong).contiguous(), gy = gy_in.to(type).contiguous();
  at::Tensor norm_sq = at::empty({gy.size(0)}, gy.options());
  if (type == at::kDouble)
    run(indices, gy, padding_idx, norm_sq.mutable_data_ptr<double>());
  else
    run(indices, gy, padding_idx, norm_sq.mutable_data_ptr<float>());
  return norm_sq;
}

}  // namespace engm::cpu
