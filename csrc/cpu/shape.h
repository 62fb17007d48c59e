// A convolution, a linear layer (one tap, T "pixels") or a patch correction, in plain numbers. 1-d and 2-d problems
// are 3-d ones with leading sizes of 1.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <new>
#include <vector>

#include "kernels.h"

namespace engm::cpu {

using Space = std::array<int64_t, 3>;

struct ConvShape {
  int64_t n = 0, channels = 0, out_channels = 0, groups = 1;
  Space in{1, 1, 1}, out{1, 1, 1}, kernel{1, 1, 1}, stride{1, 1, 1}, padding{0, 0, 0}, dilation{1, 1, 1};

  static int64_t volume(const Space& s) { return s[0] * s[1] * s[2]; }
  int64_t positions() const { return volume(out); }  // T
  int64_t pixels() const { return volume(in); }
  int64_t taps() const { return volume(kernel); }
  Space padded() const {
    return {in[0] + 2 * padding[0], in[1] + 2 * padding[1], in[2] + 2 * padding[2]};
  }
  int64_t group_channels() const { return channels / groups; }
  int64_t group_rows() const { return out_channels / groups; }
  // Element (z, y, x) of the zero-padded image, as one index.
  int64_t padded_index(int64_t z, int64_t y, int64_t x) const {
    const Space p = padded();
    return (z * p[1] + y) * p[2] + x;
  }
  // Padded index of every pixel [pixels].
  std::vector<int64_t> pixel_index() const;
  // Padded index of the first tap of every output position [T], and of every tap relative to the first [taps].
  std::vector<int64_t> position_index() const;
  std::vector<int64_t> tap_index() const;
};

// An activation or backprop tensor with any strides (in elements).
template <typename T>
struct Operand {
  const T* data;
  int64_t example, channel;
  Space space;
};

// Local batch-norm correction: shift[i, o]·patch_mean[c, tap] + scale[i, o]·correlation[o, c, tap], all contiguous.
template <typename T>
struct Correction {
  const T* shift;        // [n, out_channels]
  const T* scale;        // [n, out_channels]
  const T* patch_mean;   // [channels, taps]
  const T* correlation;  // [out_channels, channels / groups, taps]
};

// Aligned scratch, zeroed.
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

// Squared norms of the listed examples, added over groups, by forming tiles of the gradient in registers. The gradients
// themselves are written to grads [n, out_channels, channels / groups, taps] unless it is null.
template <typename T>
void direct_norms(const ConvShape& shape, const Operand<T>& x, const Operand<T>& gy, const Correction<T>* correction,
                  const std::vector<int64_t>& examples, double* out, T* grads);

// The same of all examples through the pixel Gram matrices. reliable[i] is 0 where the terms cancel so far that the
// direct form has to be taken.
template <typename T>
void gram_norms(const ConvShape& shape, const Operand<T>& x, const Operand<T>& gy, double* out, uint8_t* reliable);

// Copies `valid` channels from src on, zero lanes up to `width`, into dst[index[pixel]][width]; index null for the pixel
// itself. `size` is the extent of the tensor's space.
template <typename T>
void pack_lanes(const Kernels<T>& k, const Operand<T>& from, const T* src, const Space& size, int64_t valid,
                int64_t width, const int64_t* index, T* dst);

// Row panels: channels [0, count) of src, padded to kRowQuantum; panels of k.rows, the rest of kRowQuantum rows.
template <typename T>
void pack_rows(const Kernels<T>& k, const Operand<T>& from, const T* src, const Space& size, int64_t count, T* dst);

}  // namespace engm::cpu
