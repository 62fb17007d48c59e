// Declares what the direct and the Gram form of the CPU share: operands, corrections, scratch and packing.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <new>
#include <vector>

#include "../conv_shape.h"
#include "kernels.h"

namespace engm::cpu {

using engm::ConvShape;
using engm::Space;

// A tensor of activations or backprops, with any strides, in elements.
template <typename T>
struct Operand {
  const T* data;
  int64_t example, channel;
  Space space;
};

// Largest Σ|terms| / result that leaves fp32 norms good to about 1e-5 and fp64 to 1e-12.
template <typename T>
constexpr double kMaxCancellation = sizeof(T) == 4 ? 64.0 : 4096.0;

// A batch-norm correction, all contiguous. It is taken off the gradient of example i:
//   shift[i, o]·patch_mean[c, tap] + scale[i, o]·correlation[o, c, tap]
template <typename T>
struct Correction {
  const T* shift;        // [n, out_channels]
  const T* scale;        // [n, out_channels]
  const T* patch_mean;   // [channels, taps]
  const T* correlation;  // [out_channels, channels / groups, taps]
};

// Scratch of one thread, aligned for vectors and zero at first.
template <typename T>
class Buffer {
 public:
  explicit Buffer(int64_t size)
      : data_(static_cast<T*>(::operator new(sizeof(T) * (size > 0 ? size : 1), std::align_val_t(kAlignment)))),
        size_(size) {
    clear();
  }
  void clear() { std::fill(data_.get(), data_.get() + size_, T(0)); }
  T* data() { return data_.get(); }
  const T* data() const { return data_.get(); }
  int64_t size() const { return size_; }

 private:
  struct Delete {
    void operator()(T* p) const { ::operator delete(p, std::align_val_t(kAlignment)); }
  };
  std::unique_ptr<T, Delete> data_;
  int64_t size_;
};

inline int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }
inline int64_t ceil_div(int64_t value, int64_t by) { return (value + by - 1) / by; }

// The grain of at::parallel_for: how many items are worth another thread. One thread does that much work in some five
// to twenty microseconds; for less it is not worth waking another.
constexpr double kGrainElements = 16384;    // of loops that read every element once
constexpr double kGrainFlops = 512 * 1024;  // of loops that multiply
inline int64_t grain(double work_of_item, double least) {
  return std::max<int64_t>(1, static_cast<int64_t>(least / std::max(1.0, work_of_item)));
}

// Writes the squared norms of the listed examples to out [n], by forming tiles of the gradient in registers. The
// gradients themselves are written to grads [n, out_channels, channels / groups, taps] unless it is null.
template <typename T>
void direct_norms(const ConvShape& shape, const Operand<T>& x, const Operand<T>& gy, const Correction<T>* correction,
                  const std::vector<int64_t>& examples, double* out, T* grads);

// Writes the squared norms of all examples to out [n], through the Gram matrices of pixels and positions. reliable[i]
// is 0 where the terms cancel so far that the direct form has to be taken.
template <typename T>
void gram_norms(const ConvShape& shape, const Operand<T>& x, const Operand<T>& gy, double* out, uint8_t* reliable);

// Packs `valid` channels from src on, with zero lanes up to `width`, into dst[index[pixel]][width]; a null index stands
// for the pixel's own number. `size` is the extent of the tensor's space.
template <typename T>
void pack_lanes(const Kernels<T>& k, const Operand<T>& from, const T* src, const Space& size, int64_t valid,
                int64_t width, const int64_t* index, T* dst);

// Packs the channels [0, count) of src, padded to a multiple of kRowQuantum, as panels of k.rows rows; what is left
// over becomes panels of kRowQuantum rows.
template <typename T>
void pack_rows(const Kernels<T>& k, const Operand<T>& from, const T* src, const Space& size, int64_t count, T* dst);

}  // namespace engm::cpu
