// The inner loops of the CPU's operators, compiled once an instruction set. The including file defines ENGM_ISA (a
// namespace), ENGM_ISA_NAME, ENGM_VECTOR_BYTES, ENGM_ROWS (rows of a panel) and ENGM_VECTORS (vectors of a tile), and
// sets the target after the standard headers.
//
//   tile   G[o, v, l] = Σ_t rows[t, o] · x[v, t, l]      ENGM_ROWS × ENGM_VECTORS vectors, all in registers over t
//
// AVX-512 holds 8 × 3 accumulators (11 loads for 24 FMAs), AVX2 4 × 3 (7 for 12), SSE2 4 × 2. A tile reads its three x
// vectors and one row panel once per step; the taps of one kernel row are neighbours in the vector list, so the three
// x vectors of a step are mostly the cache lines of the step before: about 64 + 32 new bytes for 24 AVX-512 FMAs.
// Every kStepChunk steps a tile is added to its buffer in L1, which keeps rounding errors of long sums down.

namespace engm::cpu::ENGM_ISA {
namespace {

template <typename T>
struct Vector {
  static constexpr int64_t kLanes = ENGM_VECTOR_BYTES / sizeof(T);
  typedef T Full __attribute__((vector_size(ENGM_VECTOR_BYTES)));
  typedef T Unaligned __attribute__((vector_size(ENGM_VECTOR_BYTES), aligned(sizeof(T)), may_alias));
  typedef double Doubles __attribute__((vector_size(kLanes * sizeof(double))));
};

constexpr int64_t kStepChunk = 1024;

template <typename T>
inline typename Vector<T>::Full load(const T* p) {
  return *reinterpret_cast<const typename Vector<T>::Unaligned*>(p);
}

template <typename T>
inline void put(T* p, typename Vector<T>::Full value) {
  *reinterpret_cast<typename Vector<T>::Unaligned*>(p) = value;
}

template <typename T>
inline double sum_lanes(typename Vector<T>::Full value) {
  double sum = 0;
  for (int64_t l = 0; l < Vector<T>::kLanes; ++l) sum += value[l];
  return sum;
}

// Adds Σ_{t < steps} rows[t, o] x[v][step_offset[t]] to sum[o, v], which stays in registers.
template <typename T, int O, int V>
inline __attribute__((always_inline)) void add_products(const T* rows, const T* const* x, const int64_t* step_offset,
                                                        int64_t steps, typename Vector<T>::Full (&sum)[O][V]) {
  const T* base[V];
  for (int v = 0; v < V; ++v) base[v] = x[v];
  for (int64_t t = 0; t < steps; ++t, rows += O) {
    const int64_t offset = step_offset[t];
    typename Vector<T>::Full xv[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) xv[v] = load(base[v] + offset);
#pragma GCC unroll 8
    for (int o = 0; o < O; ++o) {
      const typename Vector<T>::Full r = rows[o] - typename Vector<T>::Full{};
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) sum[o][v] += xv[v] * r;
    }
  }
}

// Sets, or with `add` adds to, tile[o, v] the sum Σ_{t < steps} rows[t, o] x[v][step_offset[t]].
template <typename T, int O, int V>
__attribute__((noinline)) void accumulate(const T* rows, const T* const* x, const int64_t* step_offset, int64_t steps,
                                          bool add, typename Vector<T>::Full* tile) {
  typename Vector<T>::Full sum[O][V] = {};
  add_products<T, O, V>(rows, x, step_offset, steps, sum);
  for (int o = 0; o < O; ++o)
    for (int v = 0; v < V; ++v) tile[o * V + v] = add ? tile[o * V + v] + sum[o][v] : sum[o][v];
}

// Writes a whole tile to out[v] + o·pitch unless `out` is null, and returns the squares, added over the tile.
template <typename T, int O, int V>
__attribute__((noinline)) typename Vector<T>::Full squares_of_short(const T* rows, const T* const* x,
                                                                    const int64_t* step_offset, int64_t steps,
                                                                    T* const* out, int64_t pitch) {
  typename Vector<T>::Full sum[O][V] = {}, squares[V] = {};
  add_products<T, O, V>(rows, x, step_offset, steps, sum);
  if (out) {
    T* to[V];
    for (int v = 0; v < V; ++v) to[v] = out[v];
#pragma GCC unroll 8
    for (int o = 0; o < O; ++o)
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) put(to[v] + o * pitch, sum[o][v]);
  }
#pragma GCC unroll 8
  for (int o = 0; o < O; ++o)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) squares[v] += sum[o][v] * sum[o][v];
  for (int v = 1; v < V; ++v) squares[0] += squares[v];
  return squares[0];
}

template <typename T, int O, int V>
inline void whole_tile(const PanelProduct<T>& p, int64_t row, int64_t vector, typename Vector<T>::Full* tile) {
  const T* x[V];
  for (int v = 0; v < V; ++v) x[v] = p.x + p.vector_offset[vector + v];
  const T* rows = p.rows + row * p.steps;
  for (int64_t t = 0; t < p.steps; t += kStepChunk) {
    const int64_t steps = p.steps - t < kStepChunk ? p.steps - t : kStepChunk;
    accumulate<T, O, V>(rows + t * O, x, p.step_offset + t, steps, t > 0, tile);
  }
}

template <typename T, int O, int V>
struct SquareTile {
  typename Vector<T>::Doubles* total;
  void operator()(const PanelProduct<T>& p, int64_t row, int64_t vector) const {
    const bool whole = p.out == nullptr || (row + O <= p.out_rows && (vector + V < p.vectors ||
                                                                      p.out_lanes == Vector<T>::kLanes));
    if (whole && p.shift == nullptr && p.steps <= kStepChunk) {  // nothing leaves the registers but what is asked for
      const T* x[V];
      T* out[V];
      for (int v = 0; v < V; ++v) {
        x[v] = p.x + p.vector_offset[vector + v];
        out[v] = p.out ? p.out + row * p.out_pitch + p.out_offset[vector + v] : nullptr;
      }
      const auto squares = squares_of_short<T, O, V>(p.rows + row * p.steps, x, p.step_offset, p.steps,
                                                     p.out ? out : nullptr, p.out_pitch);
      *total += __builtin_convertvector(squares, typename Vector<T>::Doubles);
      return;
    }
    typename Vector<T>::Full tile[O * V];
    whole_tile<T, O, V>(p, row, vector, tile);
    if (p.shift) subtract(p, row, vector, tile);
    if (p.out) write(p, row, vector, tile);
    // Within a tile each lane adds at most O·V squares in T, all of one sign; across tiles it adds in double.
    typename Vector<T>::Full squares = {};
    for (int k = 0; k < O * V; ++k) squares += tile[k] * tile[k];
    *total += __builtin_convertvector(squares, typename Vector<T>::Doubles);
  }
  static void subtract(const PanelProduct<T>& p, int64_t row, int64_t vector, typename Vector<T>::Full* tile) {
    constexpr int64_t kLanes = Vector<T>::kLanes;
    for (int o = 0; o < O; ++o) {
      const T* correlation = p.correlation + (row + o) * p.correlation_pitch + vector * kLanes;
      for (int v = 0; v < V; ++v)
        tile[o * V + v] -= p.shift[row + o] * load(p.mean + (vector + v) * kLanes) +
                           p.scale[row + o] * load(correlation + v * kLanes);
    }
  }
  // What the loop reads is copied first: the stores might change whatever else it read.
  static void write(const PanelProduct<T>& p, int64_t row, int64_t vector, const typename Vector<T>::Full* tile) {
    constexpr int64_t kLanes = Vector<T>::kLanes;
    const int64_t rows = p.out_rows - row < O ? p.out_rows - row : O, pitch = p.out_pitch;
    const int64_t last = vector + V < p.vectors ? kLanes : p.out_lanes;  // lanes of the last vector
    T* out[V];
    for (int v = 0; v < V; ++v) out[v] = p.out + row * pitch + p.out_offset[vector + v];
    for (int o = 0; o < rows; ++o)
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v, ++tile) {
        T* const to = out[v] + o * pitch;
        if (v + 1 < V || last == kLanes)
          put(to, *tile);
        else
          for (int64_t l = 0; l < last; ++l) to[l] = (*tile)[l];
      }
  }
};

template <typename T, int O, int V>
struct StoreTile {
  T* out;
  int64_t pitch;
  void operator()(const PanelProduct<T>& p, int64_t row, int64_t vector) const {
    typename Vector<T>::Full tile[O * V];
    whole_tile<T, O, V>(p, row, vector, tile);
    for (int o = 0; o < O; ++o)
      for (int v = 0; v < V; ++v) put(out + (row + o) * pitch + (vector + v) * Vector<T>::kLanes, tile[o * V + v]);
  }
};

// Goes through all tiles of one panel of O rows, from vector `first` on; Tile<T, O, V> is built from the given fields.
template <template <typename, int, int> class Tile, typename T, int O, typename... Fields>
inline void panel(const PanelProduct<T>& p, int64_t row, int64_t first, Fields... fields) {
  int64_t v = first;
  for (; v + ENGM_VECTORS <= p.vectors; v += ENGM_VECTORS) Tile<T, O, ENGM_VECTORS>{fields...}(p, row, v);
  if (ENGM_VECTORS > 2 && p.vectors - v == 2) return Tile<T, O, 2>{fields...}(p, row, v);
  if (p.vectors > v) Tile<T, O, 1>{fields...}(p, row, v);
}

template <typename T>
double sum_of_squares(const PanelProduct<T>& p) {
  typename Vector<T>::Doubles total = {};
  int64_t row = 0;
  for (; row + ENGM_ROWS <= p.row_count; row += ENGM_ROWS) panel<SquareTile, T, ENGM_ROWS>(p, row, 0, &total);
  for (; row < p.row_count; row += kRowQuantum) panel<SquareTile, T, kRowQuantum>(p, row, 0, &total);
  double sum = 0;
  for (int64_t l = 0; l < Vector<T>::kLanes; ++l) sum += total[l];
  return sum;
}

template <typename T>
void store(const PanelProduct<T>& p, T* out, int64_t pitch, const int64_t* first_lane) {
  const auto first = [&](int64_t row) { return first_lane[row] / Vector<T>::kLanes; };
  int64_t row = 0;
  for (; row + ENGM_ROWS <= p.row_count; row += ENGM_ROWS)
    panel<StoreTile, T, ENGM_ROWS>(p, row, first(row), out, pitch);
  for (; row < p.row_count; row += kRowQuantum) panel<StoreTile, T, kRowQuantum>(p, row, first(row), out, pitch);
}

template <typename T, int V>
inline void lanewise_taps(const PanelProduct<T>& p, int64_t vector, T* out) {
  typename Vector<T>::Full total[V] = {};
  for (int64_t t0 = 0; t0 < p.steps; t0 += kStepChunk) {
    typename Vector<T>::Full sum[V] = {};
    const int64_t end = t0 + kStepChunk < p.steps ? t0 + kStepChunk : p.steps;
    for (int64_t t = t0; t < end; ++t) {
      const typename Vector<T>::Full g = load(p.rows + t * Vector<T>::kLanes);
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) sum[v] += load(p.x + p.vector_offset[vector + v] + p.step_offset[t]) * g;
    }
    for (int v = 0; v < V; ++v) total[v] += sum[v];
  }
  for (int v = 0; v < V; ++v) put(out + (vector + v) * Vector<T>::kLanes, total[v]);
}

template <typename T>
void lanewise(const PanelProduct<T>& p, T* out) {
  int64_t v = 0;
  for (; v + 3 <= p.vectors; v += 3) lanewise_taps<T, 3>(p, v, out);
  for (; v < p.vectors; ++v) lanewise_taps<T, 1>(p, v, out);
}

// Transposes square blocks of N lanes by N steps in registers. That reads and writes whole cache lines, where a scalar
// loop over lanes that lie a power of two apart would evict every line before its second element is read.
template <typename T, int N>
struct Block {
  typedef T Row __attribute__((vector_size(N * sizeof(T))));
  typedef T UnalignedRow __attribute__((vector_size(N * sizeof(T)), aligned(sizeof(T)), may_alias));
  typedef std::conditional_t<sizeof(T) == 4, int32_t, int64_t> Index __attribute__((vector_size(N * sizeof(T))));

  // Swaps the off-diagonal H × H blocks of every 2H × 2H block.
  template <int H>
  static inline __attribute__((always_inline)) void swap_blocks(Row (&r)[N]) {
    Index low, high;
    for (int j = 0; j < N; ++j) {
      low[j] = j & H ? N + j - H : j;
      high[j] = j & H ? N + j : j + H;
    }
#pragma GCC unroll 16
    for (int i = 0; i < N; ++i) {
      if (i & H) continue;
      const Row a = r[i], b = r[i + H];
      r[i] = __builtin_shuffle(a, b, low);
      r[i + H] = __builtin_shuffle(a, b, high);
    }
    if constexpr (H > 1) swap_blocks<H / 2>(r);
  }

  static inline void transpose(const Lines<T>& lines, int64_t t) {
    Row r[N];
#pragma GCC unroll 16
    for (int l = 0; l < N; ++l)
      r[l] = lines.lane[l] ? Row(*reinterpret_cast<const UnalignedRow*>(lines.lane[l] + t)) : Row{};
    swap_blocks<N / 2>(r);
    T* const dst = lines.dst;  // these are copies, for the stores may alias the fields
    const int64_t* const index = lines.index;
    const int64_t pitch = lines.pitch;
#pragma GCC unroll 16
    for (int j = 0; j < N; ++j)
      *reinterpret_cast<UnalignedRow*>(dst + (index ? index[t + j] : t + j) * pitch) = r[j];
  }

  static void interleave(const Lines<T>& lines) {
    bool adjacent = true;
    for (int l = 0; l < N; ++l) adjacent &= lines.lane[l] != nullptr && lines.lane[l] == lines.lane[0] + l;
    const auto at = [&](int64_t t) { return lines.dst + (lines.index ? lines.index[t] : t) * lines.pitch; };
    int64_t t = 0;
    if (adjacent) {
      for (; t < lines.steps; ++t)
        *reinterpret_cast<UnalignedRow*>(at(t)) =
            *reinterpret_cast<const UnalignedRow*>(lines.lane[0] + t * lines.step);
    } else if (lines.step == 1 && lines.steps >= N) {
      for (; t + N <= lines.steps; t += N) transpose(lines, t);
      if (t < lines.steps) transpose(lines, lines.steps - N);  // the last block overlaps the one before
      t = lines.steps;
    }
    for (; t < lines.steps; ++t) {
      T* to = at(t);
      for (int l = 0; l < N; ++l) to[l] = lines.lane[l] ? lines.lane[l][t * lines.step] : T(0);
    }
  }
};

template <typename T>
void interleave(const Lines<T>& lines) {
  switch (lines.width) {
    case 16:
      if constexpr (sizeof(T) == 4) Block<T, 16>::interleave(lines);
      return;
    case 8:
      return Block<T, 8>::interleave(lines);
    case 4:
      return Block<T, 4>::interleave(lines);
    case 2:
      return Block<T, 2>::interleave(lines);
    default:
      for (int64_t t = 0; t < lines.steps; ++t)
        lines.dst[(lines.index ? lines.index[t] : t) * lines.pitch] = lines.lane[0][t * lines.step];
  }
}

template <typename T>
void axpy(T factor, const T* src, int64_t length, T* sum) {
  constexpr int64_t kLanes = Vector<T>::kLanes;
  int64_t i = 0;
  for (; i + kLanes <= length; i += kLanes) put(sum + i, load(sum + i) + factor * load(src + i));
  for (; i < length; ++i) sum[i] += factor * src[i];
}

template <typename T>
void dot(const T* q, const T* s, int64_t length, double* sum, double* magnitude) {
  // Sums are doubles of a full register; the narrower T is widened on the way.
  constexpr int64_t kLanes = ENGM_VECTOR_BYTES / sizeof(double);
  typedef double Wide __attribute__((vector_size(ENGM_VECTOR_BYTES)));
  typedef T Narrow __attribute__((vector_size(kLanes * sizeof(T)), aligned(sizeof(T)), may_alias));
  Wide total = {}, absolute = {};
  int64_t i = 0;
  for (; i + kLanes <= length; i += kLanes) {
    const Wide product = __builtin_convertvector(*reinterpret_cast<const Narrow*>(q + i), Wide) *
                         __builtin_convertvector(*reinterpret_cast<const Narrow*>(s + i), Wide);
    total += product;
    absolute += product < 0 ? -product : product;
  }
  double a = 0, b = 0;
  for (int64_t l = 0; l < kLanes; ++l) a += total[l], b += absolute[l];
  for (; i < length; ++i) {
    const double product = double(q[i]) * double(s[i]);
    a += product;
    b += product < 0 ? -product : product;
  }
  *sum += a;
  *magnitude += b;
}

// Forms Σ gy (x - mean) rstd and Σ gy, where mean and rstd are one number for the row or one for each position.
template <typename T, bool kOneMean, bool kOneRstd>
inline void affine_row(const AffineRow<T>& r, double* scale_sum, double* shift_sum) {
  constexpr int64_t kLanes = Vector<T>::kLanes, kChunk = 64 * kLanes;
  const T mean0 = kOneMean && r.mean ? r.mean[0] : T(0);
  double scale = 0, shift = 0;
  for (int64_t start = 0; start < r.length; start += kChunk) {
    const int64_t end = start + kChunk < r.length ? start + kChunk : r.length;
    typename Vector<T>::Full a[2] = {}, b[2] = {};
    int64_t i = start;
    const auto step = [&](int k) {
      const typename Vector<T>::Full g = load(r.gy + i);
      typename Vector<T>::Full h = kOneMean ? load(r.x + i) - mean0 : load(r.x + i) - load(r.mean + i);
      if (!kOneRstd) h *= load(r.rstd + i);
      a[k] += g * h;
      b[k] += g;
      i += kLanes;
    };
    while (i + 2 * kLanes <= end) step(0), step(1);
    if (i + kLanes <= end) step(0);
    scale += sum_lanes<T>(a[0] + a[1]);
    shift += sum_lanes<T>(b[0] + b[1]);
    for (; i < end; ++i) {
      const T h = r.x[i] - (kOneMean ? mean0 : r.mean[i]);
      scale += double(r.gy[i]) * (kOneRstd ? h : h * r.rstd[i]);
      shift += r.gy[i];
    }
  }
  *scale_sum = kOneRstd ? scale * r.rstd[0] : scale;
  *shift_sum = shift;
}

template <typename T>
void affine_sums(const AffineRow<T>& r, double* scale_sum, double* shift_sum) {
  const bool one_mean = !r.mean || r.mean_step == 0, one_rstd = r.rstd_step == 0;
  if (one_mean && one_rstd) return affine_row<T, true, true>(r, scale_sum, shift_sum);
  if (one_mean) return affine_row<T, true, false>(r, scale_sum, shift_sum);
  if (one_rstd) return affine_row<T, false, true>(r, scale_sum, shift_sum);
  affine_row<T, false, false>(r, scale_sum, shift_sum);
}

template <typename T, bool kOneMean, bool kOneRstd>
inline void affine_add_row(const AffineRow<T>& r, T* __restrict__ scale_sum, T* __restrict__ shift_sum) {
  const T mean0 = kOneMean && r.mean ? r.mean[0] : T(0), rstd0 = r.rstd[0];
  for (int64_t c = 0; c < r.length; ++c) {
    const T h = (r.x[c] - (kOneMean ? mean0 : r.mean[c])) * (kOneRstd ? rstd0 : r.rstd[c]);
    scale_sum[c] += r.gy[c] * h;
    shift_sum[c] += r.gy[c];
  }
}

template <typename T>
void affine_add(const AffineRow<T>& r, T* scale_sum, T* shift_sum) {
  const bool one_mean = !r.mean || r.mean_step == 0, one_rstd = r.rstd_step == 0;
  if (one_mean && one_rstd) return affine_add_row<T, true, true>(r, scale_sum, shift_sum);
  if (one_mean) return affine_add_row<T, true, false>(r, scale_sum, shift_sum);
  if (one_rstd) return affine_add_row<T, false, true>(r, scale_sum, shift_sum);
  affine_add_row<T, false, false>(r, scale_sum, shift_sum);
}

#include "cells.inl"

template <typename T>
constexpr Kernels<T> kTable = {ENGM_ISA_NAME, Vector<T>::kLanes, ENGM_ROWS,  sum_of_squares<T>, store<T>,
                               lanewise<T>,   interleave<T>,     axpy<T>,    dot<T>,            affine_sums<T>,
                               affine_add<T>,
                               {lstm<T>, gru<T>, rnn_tanh<T>, rnn_relu<T>},
                               {back_lstm<T>, back_gru<T>, back_rnn_tanh<T>, back_rnn_relu<T>}};

}  // namespace

extern const Kernels<float> kFloat = kTable<float>;
extern const Kernels<double> kDouble = kTable<double>;

}  // namespace engm::cpu::ENGM_ISA
