// The steps of a recurrent layer in one direction, forwards and back, in float32 and float64. cells.inl has what a step
// does element by element, recurrence.cpp the same in ATen's operators, engm/ops.py the arguments.
//
// n examples, T steps, H hidden features, P features of the hidden state (H without projections), G·H numbers of all
// gates. A step's product with W_hh is formed by the inner loops of outer_product.inl on one thread where it is small,
// since ATen's takes some microseconds to begin, and by ATen elsewhere. The rest is one loop over examples a step.
#include "../recurrence.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <optional>
#include <type_traits>
#include <vector>

#include "shape.h"

namespace engm::cpu {

namespace {

using Tensors = std::vector<at::Tensor>;

constexpr int64_t kSmallProduct = 1 << 20;  // multiplications; one thread does as many in some 20 µs
constexpr int64_t kWorkOfGate = 8;          // what a number of a gate costs beside reading an element

// Products of rows [n, K] with one matrix [K, M], again and again.
template <typename T>
class Product {
 public:
  Product(const at::Tensor& matrix, int64_t n)
      : kernels_(kernels<T>()), matrix_(matrix), n_(n), k_(matrix.size(0)), m_(matrix.size(1)) {
    const int64_t multiplications = n_ * k_ * m_, lanes = kernels_.lanes, vectors = ceil_div(m_, lanes);
    pitch_ = multiplications == 0 || multiplications > kSmallProduct ? m_ : vectors * lanes;
    result_ = at::zeros({round_up(n_, kRowQuantum), pitch_}, matrix.options());
    if (multiplications == 0 || multiplications > kSmallProduct) return;
    Operand<T> columns{};
    columns.channel = matrix.stride(1), columns.space[2] = matrix.stride(0);
    packed_.resize(vectors * lanes * k_);
    for (int64_t m = 0; m < m_; m += lanes) {
      vector_offset_.push_back(m * k_);
      pack_lanes<T>(kernels_, columns, matrix.const_data_ptr<T>() + m * columns.channel, {1, 1, k_},
                    std::min(lanes, m_ - m), lanes, nullptr, packed_.data() + m * k_);
    }
    for (int64_t k = 0; k < k_; ++k) step_offset_.push_back(k * lanes);
    first_lane_.resize(result_.size(0));
    panels_.resize(result_.size(0) * k_);
  }

  // The rows are those of step `t` of a tensor [n, T, K] whose steps are dense.
  void operator()(const at::Tensor& all, int64_t t) {
    if (k_ == 0) return;
    if (packed_.empty()) {
      at::Tensor into = result_.narrow(0, 0, n_);
      at::mm_out(into, all.select(1, t), matrix_);
      return;
    }
    Operand<T> rows{};
    rows.channel = all.stride(0), rows.space[2] = 1;
    pack_rows<T>(kernels_, rows, all.const_data_ptr<T>() + t * all.stride(1), {1, 1, k_}, n_, panels_.data());
    PanelProduct<T> product;
    product.x = packed_.data(), product.vector_offset = vector_offset_.data(), product.vectors = vector_offset_.size();
    product.step_offset = step_offset_.data(), product.steps = k_;
    product.rows = panels_.data(), product.row_count = first_lane_.size();
    kernels_.store(product, result_.mutable_data_ptr<T>(), pitch_, first_lane_.data());
  }

  // Row `i` of the latest product.
  const T* row(int64_t i) const { return result_.const_data_ptr<T>() + i * pitch_; }

 private:
  const Kernels<T>& kernels_;
  at::Tensor matrix_, result_;
  int64_t n_, k_, m_, pitch_;
  std::vector<int64_t> vector_offset_, step_offset_, first_lane_;
  std::vector<T> packed_, panels_;
};

// Where the numbers of an example and a step are in a tensor [n, T, .], or [n, .], or in none, which is all null.
template <typename T>
struct Rows {
  Rows() = default;
  explicit Rows(const at::Tensor& tensor)
      : data(const_cast<T*>(tensor.const_data_ptr<std::remove_const_t<T>>())),
        example(tensor.stride(0)),
        step(tensor.dim() == 3 ? tensor.stride(1) : 0) {}
  T* operator()(int64_t i, int64_t t = 0) const { return data + i * example + t * step; }
  T* data = nullptr;
  int64_t example = 0, step = 0;
};

// The tensor, with the last dimension side by side in memory.
at::Tensor dense(const at::Tensor& tensor) { return tensor.stride(-1) == 1 ? tensor : tensor.contiguous(); }

// Which steps an example has: [n, T], or all.
struct Present {
  explicit Present(const OptionalTensor& mask) : mask(mask ? mask->contiguous() : at::Tensor()) {
    if (mask) given = this->mask.const_data_ptr<bool>(), length = this->mask.size(1);
  }
  bool operator()(int64_t i, int64_t t) const { return given == nullptr || given[i * length + t]; }
  at::Tensor mask;
  const bool* given = nullptr;
  int64_t length = 0;
};

template <typename T>
Tensors run(Recurrent kind, const at::Tensor& given, const at::Tensor& hh, const OptionalTensor& hr,
            const OptionalTensor& bias, at::TensorList state, const OptionalTensor& mask, bool reverse) {
  const bool is_lstm = kind == Recurrent::kLstm, is_gru = kind == Recurrent::kGru;
  const int64_t n = given.size(0), length = given.size(1), wide = given.size(2), narrow = hh.size(1);
  const int64_t size = hr ? hr->size(1) : narrow;
  const auto made = [&](int64_t width) { return at::empty({n, length, width}, given.options()); };
  Tensors kept{made(narrow)};
  if (hr) kept.push_back(made(size));
  const at::Tensor outputs = kept[0], unprojected = kept.back();
  const at::Tensor first = dense(state[0]).unsqueeze(1), first_cell = is_lstm ? dense(state[1]) : at::Tensor();
  Rows<T> inner, squashed;
  if (is_lstm || is_gru) {
    kept.insert(kept.end(), {given, made(size)});
    inner = Rows<T>(kept.back());
  }
  if (is_lstm) {
    kept.push_back(made(size));
    squashed = Rows<T>(kept.back());
  }
  const Rows<T> gates(given), output(outputs), hidden(unprojected);
  const Present present(mask);
  const at::Tensor more = bias ? bias->contiguous() : at::zeros({is_gru ? wide : 0}, given.options());
  Product<T> across(hh.t(), n);
  std::optional<Product<T>> projection;
  if (hr) projection.emplace(hr->t(), n);
  const auto step = kernels<T>().step[static_cast<int>(kind)];
  for (int64_t k = 0, last = 0; k < length; ++k) {
    const int64_t t = reverse ? length - 1 - k : k;
    const Rows<T> before = k ? output : Rows<T>(first);
    const Rows<T> own_before = !is_lstm ? before : k ? inner : Rows<T>(first_cell);
    across(k ? outputs : first, last);
    at::parallel_for(0, n, grain(kWorkOfGate * wide, kGrainElements), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        step({gates(i, t), across.row(i), more.const_data_ptr<T>(), own_before(i, last), inner(i, t), squashed(i, t),
              hidden(i, t), size});
        if (present(i, t)) continue;
        std::copy_n(before(i, last), narrow, output(i, t));  // the state stays as it was
        if (is_lstm) std::copy_n(own_before(i, last), size, inner(i, t));
      }
    });
    if (hr) {
      (*projection)(unprojected, t);
      for (int64_t i = 0; i < n; ++i)
        if (present(i, t)) std::copy_n(projection->row(i), narrow, output(i, t));
    }
    last = t;
  }
  return kept;
}

template <typename T>
Tensors run_back(Recurrent kind, at::TensorList kept, const at::Tensor& hh, const OptionalTensor& hr,
                 at::TensorList state, const OptionalTensor& outputs, const OptionalTensor& last_hidden,
                 const OptionalTensor& last_cell, const OptionalTensor& mask, bool reverse) {
  const bool is_lstm = kind == Recurrent::kLstm, is_gru = kind == Recurrent::kGru;
  const int64_t n = kept[0].size(0), length = kept[0].size(1), wide = hh.size(0), narrow = hh.size(1);
  const int64_t size = hr ? hr->size(1) : narrow;
  const at::TensorList own = kept.slice(hr ? 2 : 1);  // gates, cells and their tanh, or gates and W_hn h + b_hn
  const at::Tensor first = dense(state[is_lstm ? 1 : 0]), given = outputs ? dense(*outputs) : at::Tensor();
  const Rows<const T> gates = own.empty() ? Rows<const T>() : Rows<const T>(own[0]), start(first);
  const Rows<const T> inner(is_lstm ? own[2] : is_gru ? own[1] : kept[0]), before(is_lstm ? own[1] : kept[0]);
  const Rows<const T> gradient = outputs ? Rows<const T>(given) : Rows<const T>();

  const auto options = hh.options();
  const at::Tensor found = at::empty({n, length, wide}, options), of_inputs = is_gru ? at::empty_like(found) : found;
  const at::Tensor projected = at::empty({n, hr ? length : 0, narrow}, options);
  // Of the hidden state after a step, summed up; its part that does not go through W_hh; and of an LSTM's cell.
  const at::Tensor hidden = at::empty({n, narrow}, options), by = at::zeros({n, narrow}, options);
  const at::Tensor cell = at::zeros({n, size}, options);
  if (last_hidden) by.copy_(*last_hidden);
  if (last_cell) cell.copy_(*last_cell);
  const Rows<T> arrived(hidden), past(by), cells(cell), into(found), into_inputs(of_inputs), narrowed(projected);
  const Present present(mask);
  Product<T> across(hh, n);
  std::optional<Product<T>> projection;
  if (hr) projection.emplace(*hr, n);
  const auto back = kernels<T>().back[static_cast<int>(kind)];
  for (int64_t k = length - 1, later = -1; k >= 0; --k) {
    const int64_t t = reverse ? length - 1 - k : k, earlier = reverse ? t + 1 : t - 1;
    if (later >= 0) across(found, later);
    const auto sum_up = [&](int64_t i) {
      T* const sum = arrived(i);
      std::copy_n(past(i), narrow, sum);
      if (const T* const more = outputs ? gradient(i, t) : nullptr)
        for (int64_t u = 0; u < narrow; ++u) sum[u] += more[u];
      if (const T* const more = later >= 0 ? across.row(i) : nullptr)
        for (int64_t u = 0; u < narrow; ++u) sum[u] += more[u];
    };
    if (hr) {
      for (int64_t i = 0; i < n; ++i) {
        sum_up(i);
        for (int64_t u = 0; u < narrow; ++u) narrowed(i, t)[u] = present(i, t) ? arrived(i)[u] : T(0);
      }
      (*projection)(projected, t);
    }
    at::parallel_for(0, n, grain(kWorkOfGate * wide, kGrainElements), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        if (!hr) sum_up(i);
        if (!present(i, t)) {  // the state stayed as it was
          std::copy_n(arrived(i), narrow, past(i));
          std::fill_n(into(i, t), wide, T(0));
          std::fill_n(into_inputs(i, t), wide, T(0));
          continue;
        }
        back({gates(i, t), inner(i, t), k ? before(i, earlier) : start(i), hr ? projection->row(i) : arrived(i),
              is_gru ? past(i) : cells(i), into(i, t), into_inputs(i, t), size});
        if (!is_gru) std::fill_n(past(i), narrow, T(0));
      }
    });
    later = t;
  }
  Tensors all{found};
  if (is_gru) all.push_back(of_inputs);
  if (hr) all.push_back(projected);
  return all;
}

// Calls `body` with a number of the tensor's type.
template <class Body>
Tensors in_type_of(const at::Tensor& tensor, const Body& body) {
  TORCH_CHECK(tensor.scalar_type() == at::kFloat || tensor.scalar_type() == at::kDouble,
              "recurrence: expected float32 or float64, got ", tensor.scalar_type(), ".");
  return tensor.scalar_type() == at::kFloat ? body(float()) : body(double());
}

}  // namespace

Tensors recurrence(std::string_view kind, const at::Tensor& inputs, const at::Tensor& ih, const at::Tensor& hh,
                   const OptionalTensor& bias_ih, const OptionalTensor& bias_hh, const OptionalTensor& hr,
                   at::TensorList state, const OptionalTensor& present, bool reverse) {
  const Recurrent known = recurrent_kind(kind);
  return in_type_of(inputs, [&](auto number) {
    const at::Tensor gates = from_inputs(known, inputs, ih, hh, bias_ih, bias_hh, hr, state, present);
    return run<decltype(number)>(known, gates, hh, hr, bias_hh, state, present, reverse);
  });
}

Tensors recurrence_back(std::string_view kind, at::TensorList kept, const at::Tensor& hh, const OptionalTensor& hr,
                        at::TensorList state, const OptionalTensor& outputs, const OptionalTensor& hidden,
                        const OptionalTensor& cell, const OptionalTensor& present, bool reverse) {
  const Recurrent known = recurrent_kind(kind);
  return in_type_of(hh, [&](auto number) {
    return run_back<decltype(number)>(known, kept, hh, hr, state, outputs, hidden, cell, present, reverse);
  });
}

}  // namespace engm::cpu
