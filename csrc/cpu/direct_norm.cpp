// Direct form:  ‖G_i‖²,  G_i[o, c, tap] = Σ_t gy[i, o, t] x[i, c, t·stride + tap·dilation - padding]
//
// x [n, C, in] and gy [n, d, out] have any strides; a linear layer is one tap over a line of T pixels. An item of work,
// which one thread owns, is (example, group, block of x vectors, block of output rows). Its factors are packed into
// scratch of the running thread and go through the register tiles of outer_product.inl; G is written only where it is
// asked for. There are three layouts of x:
//   kChannels  x lies as [channel block, padded pixel, lanes]; a vector is (channel block, tap), a tap is an offset.
//   kPatches   Few channels are in a group (RGB stems, ResNeXt): a vector is `lanes` columns of the patch matrix of
//              this one example, [column block, T, lanes].
//   kLanes     The convolution is depthwise: a vector of channels meets a vector of backprops, tap by tap.
// Items of one block of x follow each other, so that a thread reads x once, and gy once for each block of x. The
// scratch of a thread is about kBlockBytes for either factor, or one block of vectors where that is larger
// (4·lanes·(pixels + T) bytes), and with gradients also one panel of them.
#include <ATen/Parallel.h>

#include <algorithm>
#include <optional>

#include "shape.h"

namespace engm::cpu {
namespace {

constexpr int64_t kBlockBytes = 384 << 10;  // x and gy blocks together stay in a 1 MB L2
constexpr double kFlopsOfACopy = 32;        // packing one element takes as long as about this many FLOPs of the product

enum class Layout { kChannels, kPatches, kLanes };

template <typename T>
struct Plan {
  Layout layout;
  int64_t columns;         // of the gradient in one group
  int64_t lane_blocks;     // of one group
  int64_t block_vectors;   // vectors in one lane block
  int64_t plane;           // elements of one packed lane block
  int64_t x_block;         // lane blocks of one item
  int64_t x_blocks;
  int64_t row_block;       // rows of one item, a multiple of the panel
  int64_t row_blocks;
  std::vector<int64_t> step_offset;    // [T]
  std::vector<int64_t> vector_offset;  // [x_block * block_vectors]
  std::vector<int64_t> lane_offset;    // kPatches: [columns] into the padded planar image
  std::vector<int64_t> pixel_index;    // [pixels], padded
};

template <typename T>
Layout choose_layout(const ConvShape& s, int64_t lanes) {
  const int64_t c = s.group_channels();
  if (s.groups > 1 && c == 1) return Layout::kLanes;
  return s.taps() > 1 && c < lanes && 2 * c <= lanes ? Layout::kPatches : Layout::kChannels;
}

template <typename T>
Plan<T> make_plan(const ConvShape& s, const Kernels<T>& k, int64_t examples) {
  Plan<T> p;
  p.layout = choose_layout<T>(s, k.lanes);
  const bool patches = p.layout == Layout::kPatches;
  const std::vector<int64_t> taps = s.tap_index();
  const int64_t steps = s.positions(), volume = ConvShape::volume(s.padded());
  p.columns = patches ? s.group_channels() * s.taps() : s.group_channels();
  p.lane_blocks = ceil_div(p.layout == Layout::kLanes ? s.channels : p.columns, k.lanes);
  p.block_vectors = patches ? 1 : s.taps();
  p.plane = (patches ? steps : volume) * k.lanes;
  const auto fitting = [](int64_t bytes, int64_t most) { return std::clamp<int64_t>(kBlockBytes / bytes, 1, most); };
  p.x_block = p.layout == Layout::kLanes ? 1 : fitting(p.plane * sizeof(T), p.lane_blocks);
  const int64_t panels = ceil_div(s.group_rows(), k.rows);
  int64_t row_panels = fitting(k.rows * steps * sizeof(T), panels);
  // Few examples are split further, until every thread has something to do.
  const int64_t groups = p.layout == Layout::kLanes ? 1 : s.groups, wanted = 2 * at::get_num_threads();
  const auto items = [&] {
    return examples * groups * ceil_div(p.lane_blocks, p.x_block) * ceil_div(panels, row_panels);
  };
  while (items() < wanted && p.x_block > 1) p.x_block = ceil_div(p.x_block, 2);
  while (items() < wanted && row_panels > 1) row_panels = ceil_div(row_panels, 2);
  p.x_blocks = ceil_div(p.lane_blocks, p.x_block);
  p.row_block = row_panels * k.rows;
  p.row_blocks = ceil_div(s.group_rows(), p.row_block);
  p.pixel_index = s.pixel_index();
  p.step_offset = s.position_index();
  for (int64_t t = 0; t < steps; ++t) p.step_offset[t] = (patches ? t : p.step_offset[t]) * k.lanes;
  for (int64_t b = 0; b < p.x_block; ++b)
    for (int64_t v = 0; v < p.block_vectors; ++v)
      p.vector_offset.push_back(b * p.plane + (patches ? 0 : taps[v] * k.lanes));
  if (patches)
    for (int64_t c = 0; c < s.group_channels(); ++c)
      for (int64_t tap : taps) p.lane_offset.push_back(c * volume + tap);
  return p;
}

// Holds patch_mean and correlation in the order of the vectors, [groups, vectors, lanes] and
// [out_channels, vectors, lanes].
template <typename T>
struct PackedCorrection {
  int64_t pitch;  // vectors * lanes
  Buffer<T> mean, correlation;

  PackedCorrection(const ConvShape& s, const Plan<T>& p, const Kernels<T>& k, const Correction<T>& from)
      : pitch(p.lane_blocks * p.block_vectors * k.lanes), mean(s.groups * pitch),
        correlation((s.out_channels + kRowQuantum) * pitch) {  // padded rows are read, times a scale of 0
    const int64_t gradient = s.group_channels() * s.taps();
    for (int64_t g = 0; g < s.groups; ++g) place(s, p, k, from.patch_mean + g * gradient, mean.data() + g * pitch);
    at::parallel_for(0, s.out_channels, grain(gradient, kGrainElements), [&](int64_t begin, int64_t end) {
      for (int64_t o = begin; o < end; ++o)
        place(s, p, k, from.correlation + o * gradient, correlation.data() + o * pitch);
    });
  }

  static void place(const ConvShape& s, const Plan<T>& p, const Kernels<T>& k, const T* from, T* to) {
    const int64_t taps = s.taps();
    for (int64_t c = 0; c < s.group_channels(); ++c)
      for (int64_t tap = 0; tap < taps; ++tap) {
        const int64_t column = c * taps + tap;
        const int64_t at = p.layout == Layout::kPatches
                               ? column
                               : (c / k.lanes * taps + tap) * k.lanes + c % k.lanes;
        to[at] = from[column];
      }
  }
};

// Holds the factors of one item in the scratch of one thread, and packs only what the item before did not leave there.
template <typename T>
class Packer {
 public:
  Packer(const ConvShape& s, const Plan<T>& p, const Kernels<T>& k, const Operand<T>& x, const Operand<T>& gy)
      : s_(s), p_(p), k_(k), x_(x), gy_(gy), lanes_(p.x_block * p.plane), rows_(p.row_block * s.positions()),
        planar_(p.layout == Layout::kPatches ? s.group_channels() * ConvShape::volume(s.padded()) : 0) {}

  const T* lanes(int64_t example, int64_t group, int64_t block) {
    const std::array<int64_t, 3> key{example, group, block};
    if (key == lanes_key_) return lanes_.data();
    const T* src = x_.data + example * x_.example + group * s_.group_channels() * x_.channel;
    if (p_.layout == Layout::kPatches) {
      if (lanes_key_[0] != example || lanes_key_[1] != group) pack_planar(src);
      pack_patches(block);
    } else {
      pack_channels(src, block);
    }
    lanes_key_ = key;
    return lanes_.data();
  }

  const T* rows(int64_t example, int64_t group, int64_t block) {
    const std::array<int64_t, 3> key{example, group, block};
    if (key == rows_key_) return rows_.data();
    const int64_t first = block * p_.row_block, count = std::min(p_.row_block, s_.group_rows() - first);
    pack_rows<T>(k_, gy_, gy_.data + example * gy_.example + (group * s_.group_rows() + first) * gy_.channel, s_.out,
                 count, rows_.data());
    rows_key_ = key;
    return rows_.data();
  }

  int64_t lane_blocks(int64_t block) const { return std::min(p_.x_block, p_.lane_blocks - block * p_.x_block); }

 private:
  void pack_channels(const T* src, int64_t block) {
    for (int64_t b = 0; b < lane_blocks(block); ++b) {
      const int64_t first = (block * p_.x_block + b) * k_.lanes;
      pack_lanes<T>(k_, x_, src + first * x_.channel, s_.in, std::min(k_.lanes, p_.columns - first), k_.lanes,
                    p_.pixel_index.data(), lanes_.data() + b * p_.plane);
    }
  }
  void pack_planar(const T* src) {
    const int64_t volume = ConvShape::volume(s_.padded());
    for (int64_t c = 0; c < s_.group_channels(); ++c)
      pack_lanes<T>(k_, x_, src + c * x_.channel, s_.in, 1, 1, p_.pixel_index.data(), planar_.data() + c * volume);
  }
  // Goes through the output line by line; lane l reads its tap's line of the planar image.
  void pack_patches(int64_t block) {
    Lines<T> lines;
    lines.width = lines.pitch = k_.lanes, lines.step = s_.stride[2], lines.steps = s_.out[2];
    for (int64_t b = 0; b < lane_blocks(block); ++b) {
      const int64_t first = (block * p_.x_block + b) * k_.lanes, valid = std::min(k_.lanes, p_.columns - first);
      lines.dst = lanes_.data() + b * p_.plane;
      for (int64_t l = 0; l < k_.lanes; ++l) lines.lane[l] = nullptr;
      for (int64_t z = 0; z < s_.out[0]; ++z)
        for (int64_t y = 0; y < s_.out[1]; ++y, lines.dst += lines.steps * k_.lanes) {
          const T* from = planar_.data() + s_.padded_index(z * s_.stride[0], y * s_.stride[1], 0);
          for (int64_t l = 0; l < valid; ++l) lines.lane[l] = from + p_.lane_offset[first + l];
          k_.interleave(lines);
        }
    }
  }

  const ConvShape& s_;
  const Plan<T>& p_;
  const Kernels<T>& k_;
  const Operand<T>&x_, &gy_;
  Buffer<T> lanes_, rows_, planar_;
  std::array<int64_t, 3> lanes_key_{-1, -1, -1}, rows_key_{-1, -1, -1};
};

// Writes the gradient of an item where it belongs, a panel of rows at a time. Where a lane block has one vector (one
// tap, patches), tiles have the order of the gradient and go straight there; otherwise they go through a panel [rows,
// taps, channels] in L1.
template <typename T>
class GradientWriter {
 public:
  GradientWriter(const ConvShape& s, const Plan<T>& p, const Kernels<T>& k)
      : k_(k), gradient_(s.group_channels() * s.taps()), taps_(p.block_vectors), channels_(p.x_block * k.lanes),
        panel_(taps_ > 1 ? k.rows * taps_ * channels_ : 0) {
    for (int64_t b = 0; b < p.x_block; ++b)
      for (int64_t tap = 0; tap < taps_; ++tap) offset_.push_back(tap * channels_ + b * k.lanes);
  }

  // Returns the squared norm of the product, of which `rows` rows and `columns` columns (channels, or columns of the
  // patch matrix) are not padding.
  double operator()(PanelProduct<T> product, int64_t rows, int64_t columns, T* grads) {
    const T* const packed = product.rows;
    const bool in_place = taps_ == 1;
    product.out_pitch = in_place ? gradient_ : taps_ * channels_;
    product.out_offset = offset_.data();
    product.out_lanes = in_place ? (columns - 1) % k_.lanes + 1 : k_.lanes;
    if (in_place) {
      product.out = grads, product.out_rows = rows;
      return k_.sum_of_squares(product);
    }
    double sum = 0;
    for (int64_t row = 0; row < rows; row += k_.rows, grads += k_.rows * gradient_) {
      product.out = panel_.data();
      product.out_rows = std::min(k_.rows, rows - row);
      product.row_count = round_up(product.out_rows, kRowQuantum);
      product.rows = packed + row * product.steps;
      sum += k_.sum_of_squares(product);
      for (int64_t o = 0; o < product.out_rows; ++o)
        taps_last(panel_.data() + o * product.out_pitch, columns, grads + o * gradient_);
    }
    return sum;
  }

 private:
  // Turns [taps, channels] into [channels, taps], as many taps at a time as a power of two allows.
  void taps_last(const T* from, int64_t columns, T* to) {
    Lines<T> lines;
    lines.pitch = taps_, lines.steps = columns;
    for (int64_t tap = 0, width = k_.lanes; tap < taps_; tap += width) {
      while (width > taps_ - tap) width /= 2;
      for (int64_t l = 0; l < width; ++l) lines.lane[l] = from + (tap + l) * channels_;
      lines.width = width, lines.dst = to + tap;
      k_.interleave(lines);
    }
  }

  const Kernels<T>& k_;
  int64_t gradient_, taps_, channels_;
  std::vector<int64_t> offset_;  // [vectors] of an item
  Buffer<T> panel_;
};

template <typename T>
void tiled_norms(const ConvShape& s, const Plan<T>& p, const Kernels<T>& k, const Operand<T>& x, const Operand<T>& gy,
                 const Correction<T>* correction, const std::vector<int64_t>& examples, std::vector<double>& partial,
                 T* grads) {
  std::unique_ptr<PackedCorrection<T>> packed;
  if (correction) packed = std::make_unique<PackedCorrection<T>>(s, p, k, *correction);
  const int64_t items = static_cast<int64_t>(partial.size());
  const double lanes = p.x_block * p.block_vectors * k.lanes;
  const double work = s.positions() * (2 * lanes * p.row_block + kFlopsOfACopy * (lanes + p.row_block));
  at::parallel_for(0, items, grain(work, kGrainFlops), [&](int64_t begin, int64_t end) {
    Packer<T> packer(s, p, k, x, gy);
    Buffer<T> shift(p.row_block), scale(p.row_block);
    std::optional<GradientWriter<T>> writer;
    if (grads) writer.emplace(s, p, k);
    PanelProduct<T> product;
    product.vector_offset = p.vector_offset.data();
    product.step_offset = p.step_offset.data();
    product.steps = s.positions();
    for (int64_t item = begin; item < end; ++item) {
      const int64_t row_block = item % p.row_blocks, x_block = item / p.row_blocks % p.x_blocks;
      const int64_t group = item / (p.row_blocks * p.x_blocks) % s.groups;
      const int64_t example = examples[item / (p.row_blocks * p.x_blocks * s.groups)];
      const int64_t first = row_block * p.row_block, count = std::min(p.row_block, s.group_rows() - first);
      product.x = packer.lanes(example, group, x_block);
      product.rows = packer.rows(example, group, row_block);
      product.vectors = packer.lane_blocks(x_block) * p.block_vectors;
      product.row_count = round_up(count, kRowQuantum);
      if (correction) {
        const int64_t row = group * s.group_rows() + first, at = x_block * p.x_block * p.block_vectors * k.lanes;
        shift.clear(), scale.clear();
        std::copy_n(correction->shift + example * s.out_channels + row, count, shift.data());
        std::copy_n(correction->scale + example * s.out_channels + row, count, scale.data());
        product.shift = shift.data(), product.scale = scale.data();
        product.mean = packed->mean.data() + group * packed->pitch + at;
        product.correlation = packed->correlation.data() + row * packed->pitch + at;
        product.correlation_pitch = packed->pitch;
      }
      if (grads) {
        const int64_t column = x_block * p.x_block * k.lanes;
        const int64_t columns = std::min(p.x_block * k.lanes, p.columns - column);
        T* to = grads + (example * s.out_channels + group * s.group_rows() + first) * s.group_channels() * s.taps() +
                column * p.block_vectors;
        partial[item] = (*writer)(product, count, columns, to);
      } else {
        partial[item] = k.sum_of_squares(product);
      }
    }
  });
}

// Serves depthwise convolutions, where output channel o = c·m + j belongs to channel c.
template <typename T>
void depthwise_norms(const ConvShape& s, const Plan<T>& p, const Kernels<T>& k, const Operand<T>& x,
                     const Operand<T>& gy, const Correction<T>* correction, const std::vector<int64_t>& examples,
                     std::vector<double>& partial, T* grads) {
  const int64_t taps = s.taps(), multiplier = s.group_rows();
  const double work = k.lanes * (2.0 * taps * multiplier * s.positions() +
                                 kFlopsOfACopy * (s.pixels() + multiplier * s.positions()));
  at::parallel_for(0, static_cast<int64_t>(partial.size()), grain(work, kGrainFlops), [&](int64_t begin, int64_t end) {
    Buffer<T> image(p.plane), rows(s.positions() * k.lanes), gradient(taps * k.lanes);
    PanelProduct<T> product;
    product.x = image.data(), product.rows = rows.data();
    product.vector_offset = p.vector_offset.data(), product.step_offset = p.step_offset.data();
    product.vectors = taps, product.steps = s.positions();
    for (int64_t item = begin; item < end; ++item) {
      const int64_t example = examples[item / p.lane_blocks], first = item % p.lane_blocks * k.lanes;
      const int64_t valid = std::min(k.lanes, s.channels - first);
      pack_lanes<T>(k, x, x.data + example * x.example + first * x.channel, s.in, valid, k.lanes, p.pixel_index.data(),
                    image.data());
      for (int64_t j = 0; j < multiplier; ++j) {
        Operand<T> every = gy;  // takes every multiplier-th channel, from first · multiplier + j on
        every.channel = gy.channel * multiplier;
        pack_lanes<T>(k, every, gy.data + example * gy.example + (first * multiplier + j) * gy.channel, s.out, valid,
                      k.lanes, nullptr, rows.data());
        k.lanewise(product, gradient.data());
        for (int64_t l = 0; l < valid; ++l)
          for (int64_t tap = 0; tap < taps; ++tap) {
            const int64_t c = first + l, o = c * multiplier + j;
            double g = gradient.data()[tap * k.lanes + l];
            if (correction)
              g -= double(correction->shift[example * s.out_channels + o]) * correction->patch_mean[c * taps + tap] +
                   double(correction->scale[example * s.out_channels + o]) * correction->correlation[o * taps + tap];
            partial[item] += g * g;
            if (grads) grads[(example * s.out_channels + o) * taps + tap] = static_cast<T>(g);
          }
      }
    }
  });
}

}  // namespace

template <typename T>
void direct_norms(const ConvShape& s, const Operand<T>& x, const Operand<T>& gy, const Correction<T>* correction,
                  const std::vector<int64_t>& examples, double* out, T* grads) {
  const Kernels<T>& k = kernels<T>();
  const Plan<T> plan = make_plan<T>(s, k, static_cast<int64_t>(examples.size()));
  const bool depthwise = plan.layout == Layout::kLanes;
  const int64_t each = depthwise ? plan.lane_blocks : s.groups * plan.x_blocks * plan.row_blocks;
  std::vector<double> partial(examples.size() * each, 0.0);
  (depthwise ? depthwise_norms<T> : tiled_norms<T>)(s, plan, k, x, gy, correction, examples, partial, grads);
  for (size_t e = 0; e < examples.size(); ++e) {
    double sum = 0;
    for (int64_t j = 0; j < each; ++j) sum += partial[e * each + j];
    out[examples[e]] = sum;
  }
}

template void direct_norms(const ConvShape&, const Operand<float>&, const Operand<float>&, const Correction<float>*,
                           const std::vector<int64_t>&, double*, float*);
template void direct_norms(const ConvShape&, const Operand<double>&, const Operand<double>&, const Correction<double>*,
                           const std::vector<int64_t>&, double*, double*);

}  // namespace engm::cpu
