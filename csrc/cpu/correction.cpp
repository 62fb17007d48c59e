// What a batch norm in training mode takes off the gradients of the layer in front of it, as far as one pass over the
// layer's output and one over its input give it.
//
// correction_factors:  normalised[i, c, t] = (y[i, c, t] - mean[c]) rstd[c] / N        N = sqrt(n T)
//                      shift'[i, c] = gain[c] shift[i, c]      scale'[i, c] = gain[c] scale[i, c] / N
// patch_mean:          m[c, tap] = mean over i and t of x[i, c, t·stride + tap·dilation - padding], 0 outside of the image
//
// A thread owns rows (i, c), or examples where channels are dense; and of patch_mean channels, whose images it adds up
// before it looks at taps, so that x is read once.
#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include <cmath>

#include "../elementwise_checks.h"
#include "../ops.h"
#include "shape.h"

namespace engm::cpu {
namespace {

// y [n, d, T] dense along T, or along d, as is `out`.
template <typename T, typename Sum = at::opmath_type<T>>
void normalise(const at::Tensor& y, const Sum* mean, const Sum* factor, const at::Tensor& out, bool channels_last) {
  const int64_t n = y.size(0), channels = y.size(1), positions = y.size(2);
  const T* const from = y.const_data_ptr<T>();
  T* const to = out.mutable_data_ptr<T>();
  if (channels_last) {
    at::parallel_for(0, n * positions, grain(channels, kGrainElements), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row)
        for (int64_t c = 0; c < channels; ++c)
          to[row * channels + c] = static_cast<T>((Sum(from[row * channels + c]) - mean[c]) * factor[c]);
    });
    return;
  }
  at::parallel_for(0, n * channels, grain(positions, kGrainElements), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const Sum middle = mean[row % channels], by = factor[row % channels];
      for (int64_t t = 0; t < positions; ++t)
        to[row * positions + t] = static_cast<T>((Sum(from[row * positions + t]) - middle) * by);
    }
  });
}

// The output positions [first, last) whose tap lies inside of the image, along one dimension.
struct Range {
  int64_t first, last;
};
Range inside(int64_t tap, int64_t out, int64_t in, int64_t stride, int64_t padding, int64_t dilation) {
  const int64_t at = tap * dilation - padding;  // of output position 0
  const int64_t first = at >= 0 ? 0 : ceil_div(-at, stride), last = at >= in ? 0 : (in - 1 - at) / stride + 1;
  return {first, std::min(last, out)};
}

// Adds a block of `width` channels of the summed image [pixels, width] under every tap: sums [width, taps].
template <typename Sum>
void add_taps(const ConvShape& s, const Sum* image, int64_t width, double* sums) {
  int64_t tap = 0;
  for (int64_t kz = 0; kz < s.kernel[0]; ++kz)
    for (int64_t ky = 0; ky < s.kernel[1]; ++ky)
      for (int64_t kx = 0; kx < s.kernel[2]; ++kx, ++tap) {
        const int64_t k[3] = {kz, ky, kx};
        Range r[3];
        for (int i = 0; i < 3; ++i)
          r[i] = inside(k[i], s.out[i], s.in[i], s.stride[i], s.padding[i], s.dilation[i]);
        const auto place = [&](int i, int64_t t) { return t * s.stride[i] + k[i] * s.dilation[i] - s.padding[i]; };
        for (int64_t z = r[0].first; z < r[0].last; ++z)
          for (int64_t y = r[1].first; y < r[1].last; ++y)
            for (int64_t x = r[2].first; x < r[2].last; ++x) {
              const Sum* const pixel = image + ((place(0, z) * s.in[1] + place(1, y)) * s.in[2] + place(2, x)) * width;
              for (int64_t c = 0; c < width; ++c) sums[c * s.taps() + tap] += pixel[c];
            }
      }
}

template <typename T, typename Sum = at::opmath_type<T>>
void mean_of_patches(const ConvShape& s, const at::Tensor& x, bool channels_last, Sum* out) {
  constexpr int64_t kChannels = 16;  // a line of memory in float32
  const int64_t pixels = s.pixels(), taps = s.taps(), width = channels_last ? kChannels : 1;
  const T* const data = x.const_data_ptr<T>();
  const double share = 1.0 / (double(s.n) * s.positions());
  at::parallel_for(0, ceil_div(s.channels, width), grain(double(s.n) * pixels * width, kGrainElements),
                   [&](int64_t begin, int64_t end) {
    Buffer<Sum> image(pixels * width);
    std::vector<double> sums(width * taps);
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = block * width, count = std::min(width, s.channels - first);
      image.clear(), std::fill(sums.begin(), sums.end(), 0.0);
      Sum* const total = image.data();
      for (int64_t i = 0; i < s.n; ++i) {
        if (channels_last) {
          const T* const from = data + i * pixels * s.channels + first;
          for (int64_t p = 0; p < pixels; ++p)
            for (int64_t c = 0; c < count; ++c) total[p * width + c] += Sum(from[p * s.channels + c]);
        } else {
          const T* const from = data + (i * s.channels + first) * pixels;
          for (int64_t p = 0; p < pixels; ++p) total[p] += Sum(from[p]);
        }
      }
      add_taps(s, total, width, sums.data());
      for (int64_t k = 0; k < count * taps; ++k) out[first * taps + k] = static_cast<Sum>(sums[k] * share);
    }
  });
}

// Whether an image lies channel by channel within every pixel; made so, or the other way round, if it lies in neither.
bool settle(at::Tensor& x) {
  if (x.is_contiguous()) return false;
  const at::MemoryFormat last = x.dim() == 5 ? at::MemoryFormat::ChannelsLast3d : at::MemoryFormat::ChannelsLast;
  if (x.dim() > 3 && x.is_contiguous(last)) return true;
  x = x.contiguous();
  return false;
}

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor> correction_factors(const at::Tensor& outputs, const at::Tensor& mean_in,
                                                                  const at::Tensor& rstd_in, const at::Tensor& gain_in,
                                                                  const at::Tensor& shift_in,
                                                                  const at::Tensor& scale_in) {
  const at::ScalarType type = check_correction(outputs, mean_in, rstd_in, gain_in, shift_in, scale_in);
  const int64_t n = outputs.size(0), channels = outputs.size(1);
  const at::Tensor y = is_dense_by_position(outputs) ? outputs : outputs.contiguous();
  const bool channels_last = !y.is_contiguous();
  const double root = std::sqrt(double(n) * outputs.size(2));
  const auto ready = [&](const at::Tensor& t) { return as_type(t, type).contiguous(); };
  const at::Tensor mean = ready(mean_in), rstd = ready(rstd_in), gain = ready(gain_in), shift = ready(shift_in),
                   scale = ready(scale_in);
  at::Tensor normalised = at::empty_like(y), shifted = at::empty_like(shift), scaled = at::empty_like(scale);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, y.scalar_type(), "correction_factors", [&] {
    using Sum = at::opmath_type<scalar_t>;
    std::vector<Sum> factor(channels);
    const Sum *const r = rstd.const_data_ptr<Sum>(), *const g = gain.const_data_ptr<Sum>();
    for (int64_t c = 0; c < channels; ++c) factor[c] = static_cast<Sum>(r[c] / root);
    normalise<scalar_t>(y, mean.const_data_ptr<Sum>(), factor.data(), normalised, channels_last);
    const Sum *const m = shift.const_data_ptr<Sum>(), *const v = scale.const_data_ptr<Sum>();
    Sum *const to_shift = shifted.mutable_data_ptr<Sum>(), *const to_scale = scaled.mutable_data_ptr<Sum>();
    for (int64_t k = 0; k < n * channels; ++k) {
      to_shift[k] = m[k] * g[k % channels];
      to_scale[k] = static_cast<Sum>(v[k] * (g[k % channels] / root));
    }
  });
  return {normalised, shifted, scaled};
}

at::Tensor patch_mean(const at::Tensor& x_in, at::IntArrayRef kernel_size, at::IntArrayRef stride,
                      at::IntArrayRef padding, at::IntArrayRef dilation) {
  const ConvShape s = patch_shape(x_in, kernel_size, stride, padding, dilation, "patch_mean");
  const at::ScalarType type = compute_type(x_in, x_in, "patch_mean");
  std::vector<int64_t> sizes{s.channels};
  sizes.insert(sizes.end(), kernel_size.begin(), kernel_size.end());
  at::Tensor out = at::empty(sizes, x_in.options().dtype(type).memory_format(std::nullopt));
  if (s.n == 0 || s.positions() == 0) return out.zero_();
  at::Tensor x = x_in;
  const bool channels_last = settle(x);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "patch_mean", [&] {
    mean_of_patches<scalar_t>(s, x, channels_last, out.mutable_data_ptr<at::opmath_type<scalar_t>>());
  });
  return out;
}

}  // namespace engm::cpu
