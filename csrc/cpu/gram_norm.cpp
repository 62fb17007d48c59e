// Gram form:  ‖Σ_t gy_t ⊗ patch_t‖² = Σ_{t,s} Q[t,s] Σ_tap P[pos(t, tap), pos(s, tap)]
//
// x [n, C, in] and gy [n, d, out] have any strides. P = X Xᵀ is over the pixels and Q = gy gyᵀ over the positions of
// one example and group. The inner dimension of P is the channel count, not channels times taps.
//
// An item of work is one example and group, on one thread. P has a row for each pixel and a column for each element of
// the zero-padded image; at stride 1 the columns of Q have the padded row pitch too, so that the sum over taps is taps
// shifted additions of long contiguous rows (what lies between the rows of the image meets zeros of Q). Only the upper
// triangle (column >= row in padded order) is formed, which both sums respect since pos(·, tap) is monotone. Scratch of
// a thread is (pixels + channels)·padded volume + (T + out channels)·T elements, with T in padded pitch.
//
// An item reads its x and its gy once. A linear layer (one tap) is centred: with ā = mean a, b̄ = mean b, s = Σ b,
//   ‖G‖² = ‖B_cᵀ A_c‖² + 2 Σ_t (a_ct·ā)(b_ct·s) + ‖s‖²‖ā‖².
// Where the terms still cancel beyond what T carries, the example is handed back as unreliable.
#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <cstring>

#include "shape.h"

namespace engm::cpu {
namespace {

constexpr double kFlopsOfACopy = 128;  // an element is copied, centred and copied again, in about the time of these

// Copies a line without a call to memcpy, which costs more than the copy where a line is as short as 4 pixels.
template <typename T>
inline void copy_line(const T* src, int64_t length, T* dst) {
  int64_t i = 0;
  for (; i + 4 <= length; i += 4) std::memcpy(dst + i, src + i, 4 * sizeof(T));
  for (; i < length; ++i) dst[i] = src[i];
}

// One factor of a Gram matrix, twice: as lanes [channels, pitch], the vectors, and in panels, the rows.
template <typename T>
struct Factor {
  int64_t channels, count, length, pitch;
  std::vector<int64_t> lane;  // [round_up(count)], column of each row; padded with the last
  std::vector<int64_t> vector_offset, step_offset, vector_index;
  Buffer<T> lanes, rows, gram;

  Factor(const Kernels<T>& k, int64_t channels_, std::vector<int64_t> lane_, int64_t length_)
      : channels(channels_), count(static_cast<int64_t>(lane_.size())), length(length_),
        pitch(round_up(length_, k.lanes)), lane(std::move(lane_)), lanes(channels_ * pitch),
        rows(round_up(count, kRowQuantum) * channels_), gram(round_up(count, kRowQuantum) * pitch) {
    lane.resize(round_up(count, kRowQuantum), lane.back());
    for (int64_t v = 0; v < pitch; v += k.lanes) vector_offset.push_back(v);
    for (int64_t c = 0; c < channels; ++c) {
      step_offset.push_back(c * pitch);
      vector_index.push_back(c * pitch / k.lanes);
    }
  }

  // Copies the rows of one example into lanes, line (z, y) from lane line_start(z, y) on.
  template <typename LineStart>
  void load(const Operand<T>& from, const T* src, const Space& size, LineStart line_start) {
    for (int64_t c = 0; c < channels; ++c)
      for (int64_t z = 0; z < size[0]; ++z)
        for (int64_t y = 0; y < size[1]; ++y) {
          const T* line = src + c * from.channel + z * from.space[0] + y * from.space[1];
          T* to = lanes.data() + c * pitch + line_start(z, y);
          if (from.space[2] == 1)
            copy_line(line, size[2], to);
          else
            for (int64_t x = 0; x < size[2]; ++x) to[x] = line[x * from.space[2]];
        }
  }

  // Transposes one line with its channels side by side, [T, p] of a linear layer, in blocks of vectors.
  void load_transposed(const Kernels<T>& k, const T* src, int64_t step) {
    Lines<T> lines;
    lines.width = lines.pitch = k.lanes, lines.steps = channels, lines.index = vector_index.data();
    for (int64_t first = 0; first < count; first += k.lanes) {
      for (int64_t l = 0; l < k.lanes; ++l) lines.lane[l] = first + l < count ? src + (first + l) * step : nullptr;
      lines.dst = lanes.data() + first;
      k.interleave(lines);
    }
  }

  // Subtracts each channel's mean over the positions and returns ‖mean‖². Lane r must be position r.
  double centre(const Kernels<T>& k, const T* ones, std::vector<T>& mean) {
    double norm_sq = 0;
    for (int64_t c = 0; c < channels; ++c) {
      double sum = 0, magnitude = 0;
      k.dot(lanes.data() + c * pitch, ones, count, &sum, &magnitude);
      mean[c] = static_cast<T>(sum / count);
      norm_sq += double(mean[c]) * double(mean[c]);
      k.axpy(-mean[c], ones, count, lanes.data() + c * pitch);
    }
    return norm_sq;
  }

  // Adds the product of row r and `direction` to along[r].
  void project(const Kernels<T>& k, const std::vector<T>& direction, std::vector<T>& along) const {
    for (int64_t c = 0; c < channels; ++c) k.axpy(direction[c], lanes.data() + c * pitch, count, along.data());
  }

  void form_gram(const Kernels<T>& k) {
    const int64_t padded = round_up(count, kRowQuantum);
    for (int64_t first = 0; first < padded;) {
      const int64_t width = padded - first >= k.rows ? k.rows : kRowQuantum;
      for (int64_t part = 0; part < width; part += kRowQuantum) pack_quarter(first, part, width);
      first += width;
    }
    PanelProduct<T> product;
    product.x = lanes.data(), product.rows = rows.data();
    product.vector_offset = vector_offset.data(), product.step_offset = step_offset.data();
    product.vectors = static_cast<int64_t>(vector_offset.size());
    product.row_count = padded, product.steps = channels;
    k.store(product, gram.data(), pitch, lane.data());
  }

 private:
  // Packs kRowQuantum rows of the panel at `first`, which usually are neighbours in memory.
  void pack_quarter(int64_t first, int64_t part, int64_t width) {
    T* dst = rows.data() + first * channels + part;
    const int64_t* at = lane.data() + first + part;
    const int64_t valid = std::clamp<int64_t>(count - first - part, 0, kRowQuantum);
    const T* src = lanes.data();
    if (valid == kRowQuantum && at[kRowQuantum - 1] - at[0] == kRowQuantum - 1) {
      for (int64_t c = 0; c < channels; ++c, src += pitch, dst += width) std::copy_n(src + at[0], kRowQuantum, dst);
      return;
    }
    for (int64_t c = 0; c < channels; ++c, src += pitch, dst += width)
      for (int64_t j = 0; j < kRowQuantum; ++j) dst[j] = j < valid ? src[at[j]] : T(0);
  }
};

// Holds everything that one thread needs for one problem.
template <typename T>
class GramNorm {
 public:
  GramNorm(const ConvShape& s, const Kernels<T>& k)
      : s_(s), k_(k), dense_(s.stride == Space{1, 1, 1}),
        linear_(s.taps() == 1 && dense_ && s.padding == Space{0, 0, 0}),
        position_(s.position_index()), tap_(s.tap_index()),
        x_(k, s.group_channels(), pixel_lanes(), ConvShape::volume(s.padded())),
        gy_(k, s.group_rows(), position_lanes(), dense_ ? position_.back() + 1 : s.positions()), sum_(gy_.pitch),
        pixel_of_(ConvShape::volume(s.padded()), -1) {
    for (int64_t q = 0; q < x_.count; ++q) pixel_of_[x_.lane[q]] = q;
  }

  // Returns ‖G‖² of one example and group, and adds Σ|terms| to *magnitude.
  double operator()(const Operand<T>& x, const T* x_data, const Operand<T>& gy, const T* gy_data, double* magnitude) {
    const Space pad = s_.padding;
    if (linear_ && x.channel == 1 && gy.channel == 1 && s_.in[2] == s_.pixels()) {
      x_.load_transposed(k_, x_data, x.space[2]);
      gy_.load_transposed(k_, gy_data, gy.space[2]);
      return centre(magnitude) + products(magnitude);
    }
    x_.load(x, x_data, s_.in, [&](int64_t z, int64_t y) { return s_.padded_index(z + pad[0], y + pad[1], pad[2]); });
    gy_.load(gy, gy_data, s_.out, [&](int64_t z, int64_t y) {
      return dense_ ? s_.padded_index(z, y, 0) : (z * s_.out[1] + y) * s_.out[2];
    });
    const double rank_one = linear_ ? centre(magnitude) : 0.0;
    return rank_one + products(magnitude);
  }

 private:
  std::vector<int64_t> pixel_lanes() const {
    std::vector<int64_t> lanes;
    for (int64_t z = 0; z < s_.in[0]; ++z)
      for (int64_t y = 0; y < s_.in[1]; ++y)
        for (int64_t x = 0; x < s_.in[2]; ++x)
          lanes.push_back(s_.padded_index(z + s_.padding[0], y + s_.padding[1], x + s_.padding[2]));
    return lanes;
  }

  std::vector<int64_t> position_lanes() const {
    if (dense_) return position_;
    std::vector<int64_t> lanes(s_.positions());
    for (size_t t = 0; t < lanes.size(); ++t) lanes[t] = static_cast<int64_t>(t);
    return lanes;
  }

  // Centres both factors and returns what that takes out of the Gram product.
  double centre(double* magnitude) {
    const std::vector<T> ones(x_.count, T(1));
    std::vector<T> a_mean(x_.channels), b_mean(gy_.channels), along_a(x_.count), along_b(x_.count);
    const double a_sq = x_.centre(k_, ones.data(), a_mean), b_sq = gy_.centre(k_, ones.data(), b_mean);
    x_.project(k_, a_mean, along_a);
    gy_.project(k_, b_mean, along_b);
    double cross = 0, cross_magnitude = 0;
    k_.dot(along_a.data(), along_b.data(), x_.count, &cross, &cross_magnitude);
    const double count = static_cast<double>(x_.count), constant = count * count * b_sq * a_sq;  // s = T b̄
    *magnitude += constant + 2 * count * cross_magnitude;
    return constant + 2 * count * cross;
  }

  double products(double* magnitude) {
    x_.form_gram(k_);
    gy_.form_gram(k_);
    return contract(magnitude);
  }

  double contract(double* magnitude) {
    double total = 0;
    T* sum = sum_.data();
    for (int64_t t = 0; t < gy_.count; ++t) {
      const int64_t own = gy_.lane[t], length = gy_.length - own;
      std::fill(sum + own, sum + gy_.length, T(0));
      for (int64_t tap : tap_) {
        const int64_t q = pixel_of_[position_[t] + tap];
        if (q < 0) continue;
        const T* row = x_.gram.data() + q * x_.pitch;
        if (dense_)
          k_.axpy(T(1), row + own + tap, length, sum + own);
        else
          for (int64_t s = t; s < gy_.count; ++s) sum[s] += row[position_[s] + tap];
      }
      const T* q = gy_.gram.data() + t * gy_.pitch + own;
      const double diagonal = double(q[0]) * double(sum[own]);
      double off = 0, off_magnitude = 0;
      k_.dot(q + 1, sum + own + 1, length - 1, &off, &off_magnitude);
      total += diagonal + 2 * off;
      *magnitude += std::abs(diagonal) + 2 * off_magnitude;
    }
    return total;
  }

  const ConvShape& s_;
  const Kernels<T>& k_;
  const bool dense_, linear_;
  const std::vector<int64_t> position_, tap_;
  Factor<T> x_, gy_;
  Buffer<T> sum_;
  std::vector<int64_t> pixel_of_;
};

}  // namespace

template <typename T>
void gram_norms(const ConvShape& s, const Operand<T>& x, const Operand<T>& gy, double* out, uint8_t* reliable) {
  const Kernels<T>& k = kernels<T>();
  const int64_t items = s.n * s.groups;
  std::vector<double> totals(items), magnitudes(items);
  const double pixels = s.pixels(), positions = s.positions();
  const double of_pixels = pixels * pixels * s.group_channels();
  const double of_positions = positions * positions * (s.group_rows() + 4.0 * s.taps());
  const double copies = kFlopsOfACopy * (pixels * s.group_channels() + positions * s.group_rows());
  at::parallel_for(0, items, grain(of_pixels + of_positions + copies, kGrainFlops), [&](int64_t begin, int64_t end) {
    GramNorm<T> norm(s, k);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t i = item / s.groups, g = item % s.groups;
      double magnitude = 0;
      totals[item] = norm(x, x.data + i * x.example + g * s.group_channels() * x.channel, gy,
                          gy.data + i * gy.example + g * s.group_rows() * gy.channel, &magnitude);
      magnitudes[item] = magnitude;
    }
  });
  for (int64_t i = 0; i < s.n; ++i) {
    double total = 0, magnitude = 0;
    for (int64_t g = 0; g < s.groups; ++g) total += totals[i * s.groups + g], magnitude += magnitudes[i * s.groups + g];
    out[i] = total < 0 ? 0.0 : total;  // a NaN stays one
    reliable[i] = !(magnitude > kMaxCancellation<T> * total);
  }
}

template void gram_norms(const ConvShape&, const Operand<float>&, const Operand<float>&, double*, uint8_t*);
template void gram_norms(const ConvShape&, const Operand<double>&, const Operand<double>&, double*, uint8_t*);

}  // namespace engm::cpu
