// Declares the table of inner loops that every instruction set has. Only what must be vectorised lives behind its
// pointers; what is around the loops (packing plans, threads, the choice of form) is ordinary C++ and compiled once.
#pragma once

#include <cstdint>
#include <string>
#include <type_traits>
#include <vector>

namespace engm::cpu {

// A sum over `steps` of outer products of packed factors:
//   G[o, v·lanes + l] = Σ_t rows[o, t] · x[vector_offset[v] + step_offset[t] + l]
// The x side is a list of vectors, not a matrix: for a convolution vector v is (channel block, kernel tap), and a tap
// is nothing but another offset into the same zero-padded image.
template <typename T>
struct PanelProduct {
  const T* x = nullptr;
  const int64_t* vector_offset = nullptr;  // [vectors], elements, multiples of `lanes`
  const int64_t* step_offset = nullptr;    // [steps], elements, multiples of `lanes`
  int64_t vectors = 0;
  const T* rows = nullptr;  // panels of `Kernels::rows` (the last may be kRowQuantum): [row_count / r][steps][r]
  int64_t row_count = 0;    // a multiple of kRowQuantum
  int64_t steps = 0;
  // Subtracted from G before squaring when shift is given: shift[o]·mean[v, l] + scale[o]·correlation[o, v, l].
  const T* shift = nullptr;        // [row_count]
  const T* scale = nullptr;        // [row_count]
  const T* mean = nullptr;         // [vectors, lanes]
  const T* correlation = nullptr;  // [row_count, correlation_pitch], first vectors·lanes of each row are read
  int64_t correlation_pitch = 0;
  // If `out` is given, sum_of_squares writes G there: out[o·out_pitch + out_offset[v] + l] = G[o, v, l].
  T* out = nullptr;
  int64_t out_pitch = 0;
  const int64_t* out_offset = nullptr;  // [vectors], elements
  int64_t out_rows = 0;                 // rows that are written; the rest of row_count is padding
  int64_t out_lanes = 0;                // lanes of the last vector that are written
};

constexpr int64_t kRowQuantum = 4;   // rows are padded to this
constexpr int64_t kAlignment = 64;   // bytes, of every packed buffer

// Lines of a tensor that `interleave` copies side by side: dst[index[t]·pitch + l] = lane[l][t·step], and 0 for a null
// lane.
template <typename T>
struct Lines {
  const T* lane[64 / sizeof(float)] = {};
  int64_t width = 0;  // 1 or a power of two up to the lanes of a vector
  int64_t pitch = 0;  // at least the width
  int64_t step = 1;   // elements between consecutive steps of one lane
  int64_t steps = 0;
  const int64_t* index = nullptr;  // [steps], null for t itself
  T* dst = nullptr;
};

// One row of a normalisation layer, along its positions or along its channels; affine_norm.cpp has the formula.
template <typename T>
struct AffineRow {
  const T* x;
  const T* gy;
  const T* mean;  // null where the mean is 0
  const T* rstd;
  int64_t mean_step;  // 0 or 1, elements between consecutive positions
  int64_t rstd_step;
  int64_t length;
};

// One step of a recurrent layer for one example, H elements wide: cells.inl fills in what it returns.
template <typename T>
struct CellStep {
  T* gates;          // [gates, H], in: W_ih x and biases; out: the gates. An RNN's is read alone.
  const T* product;  // [gates, H], W_hh h
  const T* bias;     // [gates, H], GRU: b_hh, which is not in `gates`
  const T* before;   // [H], LSTM: the cell before; GRU: the hidden state before
  T* inner;          // [H], out, LSTM: the cell; GRU: W_hn h + b_hn
  T* squashed;       // [H], out, LSTM: tanh of the cell
  T* hidden;         // [H], out: the hidden state, of an LSTM before its projection
  int64_t size;      // H
};

// The same step back.
template <typename T>
struct CellBack {
  const T* gates;   // [gates, H]
  const T* inner;   // [H], LSTM: tanh of the cell; GRU: W_hn h + b_hn; RNN: the hidden state
  const T* before;  // [H], LSTM: the cell before; GRU: the hidden state before
  const T* hidden;  // [H], gradient of the hidden state, of an LSTM before its projection
  T* state;         // [H], LSTM: gradient of the cell, in: after, out: before the step; GRU: out, what passes it by
  T* found;         // [gates, H], out: gradient of W_hh h + b_hh
  T* inputs;        // [gates, H], out, GRU: gradient of W_ih x + b_ih
  int64_t size;     // H
};

// The kinds of recurrent layers; torch's names of them are in recurrence.cpp.
enum class Recurrent { kLstm, kGru, kRnnTanh, kRnnRelu };
constexpr int kRecurrentKinds = 4;

template <typename T>
struct Kernels {
  const char* isa;
  int64_t lanes;  // elements of one vector
  int64_t rows;   // rows of a full panel

  // Returns ‖G - correction‖², its squares added in double, and writes G - correction where product.out says.
  double (*sum_of_squares)(const PanelProduct<T>& product);
  // Sets out[o · pitch + v·lanes + l] = G[o, v, l]; a panel starts at vector first_lane[its first row] / lanes.
  void (*store)(const PanelProduct<T>& product, T* out, int64_t pitch, const int64_t* first_lane);
  // Sets, for depthwise convolutions, out[v, l] = Σ_t x[vector_offset[v] + step_offset[t] + l] · gy[t, l].
  void (*lanewise)(const PanelProduct<T>& product, T* out);
  void (*interleave)(const Lines<T>& lines);
  // Adds factor · src[i] to sum[i].
  void (*axpy)(T factor, const T* src, int64_t length, T* sum);
  // Adds Σ q[i] s[i] to *sum and Σ |q[i] s[i]| to *magnitude, in double.
  void (*dot)(const T* q, const T* s, int64_t length, double* sum, double* magnitude);
  // Sets *scale_sum = Σ gy (x - mean) rstd and *shift_sum = Σ gy, over the positions of one row.
  void (*affine_sums)(const AffineRow<T>& row, double* scale_sum, double* shift_sum);
  // Adds the products of one row of channels: gy (x - mean) rstd to scale_sum[c], gy to shift_sum[c].
  void (*affine_add)(const AffineRow<T>& row, T* scale_sum, T* shift_sum);
  // One step of each kind of recurrent layer, forwards and back, by its number.
  void (*step[kRecurrentKinds])(const CellStep<T>& step);
  void (*back[kRecurrentKinds])(const CellBack<T>& step);
};

// The table in use is the best that this processor runs, or the one that set_isa asked for.
template <typename T>
const Kernels<T>& kernels();

// Takes the instruction set "avx512", "avx2" or "baseline", or the best for "auto"; returns false if this build or this
// processor lacks it.
bool set_isa(const std::string& name);
std::string isa_in_use();
std::vector<std::string> available_isas();

// What at::parallel_for was compiled to: "OpenMP", "native" (torch's own thread pool) or "none (serial)".
const char* parallel_backend();

}  // namespace engm::cpu
