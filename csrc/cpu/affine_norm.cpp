// scale[i, c] = Σ_s gy (x - mean) rstd      shift[i, c] = Σ_s gy      norm_sq = Σ_c scale², Σ_c shift²
//
// x and gy are [n, C, S] or [n, S, C] and are read once, 2·n·C·S elements; mean and rstd broadcast to them. x - mean is
// formed before the product, so that nothing cancels.
//   [n, C, S]  A thread owns a run of (i, c) and sums along the positions of each.
//   [n, S, C]  A thread owns an example, or a slab of its channels, and adds rows lane by lane, in double every
//              kRowsAtOnce rows.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <algorithm>

#include "../ops.h"
#include "shape.h"

namespace engm::cpu {
namespace {

constexpr int64_t kRowsAtOnce = 64;
constexpr int64_t kChannelQuantum = 64;  // whole vectors, so that a split of the channels changes no bit

// Pointer and steps of a 3-d tensor. They are taken once, because a row may be as short as 16 elements and there are
// n·C of them.
template <typename T>
struct View {
  const T* data = nullptr;
  int64_t step[3] = {0, 0, 0};  // 0 along broadcast dimensions

  explicit View(const at::Tensor& t) {
    if (!t.defined()) return;
    data = t.const_data_ptr<T>();
    for (int64_t i = 0; i < 3; ++i) step[i] = t.size(i) > 1 ? t.stride(i) : 0;
  }
  const T* at(int64_t i, int64_t j, int64_t k) const {
    return data ? data + i * step[0] + j * step[1] + k * step[2] : nullptr;
  }
};

template <typename T>
struct Affine {
  at::Tensor x, gy, mean, rstd;  // 3-d, last dimension of x and gy dense; mean may be undefined
  View<T> x_view{x}, gy_view{gy}, mean_view{mean}, rstd_view{rstd};

  // `length` elements of the row [i, j, :] from `first` on.
  AffineRow<T> row(int64_t i, int64_t j, int64_t first, int64_t length) const {
    return {x_view.at(i, j, first), gy_view.at(i, j, first), mean_view.at(i, j, first), rstd_view.at(i, j, first),
            mean_view.step[2], rstd_view.step[2], length};
  }
};

// Sums along the rows of [n, C, S].
template <typename T>
void rows(const Affine<T>& a, T* scale, T* shift) {
  const int64_t channels = a.x.size(1), length = a.x.size(2);
  const Kernels<T>& k = kernels<T>();
  at::parallel_for(0, a.x.size(0) * channels, grain(length, kGrainElements), [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      double scale_sum = 0, shift_sum = 0;
      k.affine_sums(a.row(item / channels, item % channels, 0, length), &scale_sum, &shift_sum);
      scale[item] = static_cast<T>(scale_sum);
      shift[item] = static_cast<T>(shift_sum);
    }
  });
}

// Sums along the columns of [n, S, C].
template <typename T>
void columns(const Affine<T>& a, T* scale, T* shift) {
  const int64_t n = a.x.size(0), positions = a.x.size(1), channels = a.x.size(2);
  const Kernels<T>& k = kernels<T>();
  // Where there are few examples, their channels are split until every thread has something to do.
  const int64_t threads = at::get_num_threads();
  const int64_t parts = threads > 1 ? ceil_div(2 * threads, std::max<int64_t>(1, n)) : 1;
  const int64_t block = std::max(kChannelQuantum, round_up(ceil_div(channels, parts), kChannelQuantum));
  const int64_t blocks = ceil_div(channels, block);
  at::parallel_for(0, n * blocks, grain(positions * block, kGrainElements), [&](int64_t begin, int64_t end) {
    std::vector<double> total(2 * block);
    std::vector<T> part(2 * block);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t i = item / blocks, first = item % blocks * block, count = std::min(block, channels - first);
      std::fill(total.begin(), total.end(), 0.0);
      for (int64_t start = 0; start < positions; start += kRowsAtOnce) {
        std::fill(part.begin(), part.end(), T(0));
        for (int64_t s = start; s < std::min(start + kRowsAtOnce, positions); ++s)
          k.affine_add(a.row(i, s, first, count), part.data(), part.data() + block);
        for (int64_t c = 0; c < 2 * block; ++c) total[c] += part[c];
      }
      std::copy_n(total.begin(), count, scale + i * channels + first);
      std::copy_n(total.begin() + block, count, shift + i * channels + first);
    }
  });
}

template <typename T>
std::tuple<at::Tensor, at::Tensor, at::Tensor> run(const Affine<T>& a, bool channels_last) {
  const int64_t n = a.x.size(0), channels = a.x.size(channels_last ? 2 : 1);
  at::Tensor scale = at::empty({n, channels}, a.x.options()), shift = at::empty({n, channels}, a.x.options());
  at::Tensor norm_sq = at::empty({2, n}, a.x.options());
  (channels_last ? columns<T> : rows<T>)(a, scale.mutable_data_ptr<T>(), shift.mutable_data_ptr<T>());
  const Kernels<T>& k = kernels<T>();
  const T* const grads[2] = {scale.const_data_ptr<T>(), shift.const_data_ptr<T>()};
  T* const norms = norm_sq.mutable_data_ptr<T>();
  at::parallel_for(0, 2 * n, grain(channels, kGrainElements), [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      double sum = 0, magnitude = 0;
      const T* const row = grads[item / n] + item % n * channels;
      k.dot(row, row, channels, &sum, &magnitude);
      norms[item] = static_cast<T>(sum);
    }
  });
  return {norm_sq, scale, shift};
}

at::Tensor dense_rows(const at::Tensor& t) { return t.stride(2) == 1 || t.size(2) <= 1 ? t : t.contiguous(); }

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor> affine_norm_sq(const at::Tensor& x_in, const at::Tensor& gy_in,
                                                              const OptionalTensor& mean_in, const at::Tensor& rstd_in,
                                                              int64_t channel_dim) {
  TORCH_CHECK(x_in.dim() == 3 && gy_in.sizes() == x_in.sizes() && (channel_dim == 1 || channel_dim == 2),
              "affine_norm_sq: expected x and gy of one shape [n, C, S] with channel_dim=1, or [n, S, C] with "
              "channel_dim=2, got x ", x_in.sizes(), ", gy ", gy_in.sizes(), " and channel_dim=", channel_dim, ".");
  const at::ScalarType type = compute_type(x_in, gy_in, "affine_norm_sq");
  const auto statistic = [&](const at::Tensor& t, const char* name) {
    bool fits = t.dim() == 3;
    for (int64_t i = 0; fits && i < 3; ++i) fits = t.size(i) == 1 || t.size(i) == x_in.size(i);
    TORCH_CHECK(fits, "affine_norm_sq: ", name, " must be 3-d and broadcast to x ", x_in.sizes(), ", got ", t.sizes(),
                ". Use sizes of 1 for the dimensions it does not vary over.");
    return as_type(t, type);
  };
  at::Tensor x = as_type(x_in, type), gy = as_type(gy_in, type), rstd = statistic(rstd_in, "rstd");
  at::Tensor mean = mean_in ? statistic(*mean_in, "mean") : at::Tensor();
  // A channels_last image that is flattened to [n, C, S] lies as [n, S, C] in memory.
  bool channels_last = channel_dim == 2;
  if (!channels_last && x.size(1) > 1 && x.size(2) > 1 && x.stride(1) == 1 && gy.stride(1) == 1) {
    channels_last = true;
    for (at::Tensor* t : {&x, &gy, &rstd, &mean})
      if (t->defined()) *t = t->transpose(1, 2);
  }
  x = dense_rows(x), gy = dense_rows(gy), rstd = dense_rows(rstd);
  if (mean.defined()) mean = dense_rows(mean);
  if (type == at::kDouble) return run(Affine<double>{x, gy, mean, rstd}, channels_last);
  return run(Affine<float>{x, gy, mean, rstd}, channels_last);
}

}  // namespace engm::cpu
