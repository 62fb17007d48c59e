// Tells the owners of rows from prints of plain and of scaled gradients (engm/graph/owners.py), on the host: there are
// few rows, and many tensors of them, each of which would take a dozen operators.
#include "row_owners.h"

#include <ATen/Dispatch.h>
#include <ATen/ops/empty.h>
#include <pybind11/stl.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <cmath>
#include <string_view>
#include <unordered_map>
#include <vector>

namespace engm {

namespace {

namespace py = pybind11;

void check_numbers(const at::Tensor& numbers, int64_t rows) {
  TORCH_CHECK(numbers.is_cpu() && numbers.scalar_type() == at::kLong && numbers.is_contiguous() &&
                  numbers.numel() == rows,
              "expected an int64 number for every row on the CPU, one behind the other");
}

void check_truths(const at::Tensor& truths, int64_t rows) {
  TORCH_CHECK(
      truths.is_cpu() && truths.scalar_type() == at::kBool && truths.is_contiguous() && truths.numel() == rows,
      "expected a truth value for every row on the CPU");
}

void check_marks(const at::Tensor& marks, const at::Tensor& alike) {
  TORCH_CHECK(marks.is_cpu() && marks.dim() == 2 && marks.is_contiguous() && marks.sizes() == alike.sizes() &&
                  marks.scalar_type() == alike.scalar_type(),
              "expected marks [rows, marks of a row] of one type on the CPU, one behind the other");
}

// The largest absolute value; NaN if some is.
template <class Number, class Value>
Number largest_of(int64_t count, const Value& value) {
  Number largest = 0;
  for (int64_t k = 0; k < count; ++k) {
    const Number one = std::abs(value(k));
    if (!(one <= largest)) largest = one;  // NaN too, after which nothing is larger
    if (std::isnan(largest)) break;
  }
  return largest;
}

// Reads a digit of the owners' numbers from the marks of gradients of losses that were multiplied by 2^(digit + 1).
//   of         [rows], the numbers as far as they are known; place * digit is added
//   several    [rows], set where a row is no such power times its plain self, but for a share `tolerance`
void add_digit(const at::Tensor& of, const at::Tensor& several, const at::Tensor& plain, const at::Tensor& scaled,
               int64_t place, int64_t base, double tolerance) {
  check_marks(plain, plain);
  check_marks(scaled, plain);
  const int64_t rows = plain.size(0), width = plain.size(1);
  check_numbers(of, rows);
  check_truths(several, rows);
  auto* const number = of.mutable_data_ptr<int64_t>();
  auto* const mixed = several.mutable_data_ptr<bool>();
  AT_DISPATCH_FLOATING_TYPES(plain.scalar_type(), "add_digit", [&] {
    const auto* one = plain.const_data_ptr<scalar_t>();
    const auto* other = scaled.const_data_ptr<scalar_t>();
    const auto share = static_cast<scalar_t>(tolerance);
    for (int64_t row = 0; row < rows; ++row, one += width, other += width) {
      const auto largest = largest_of<scalar_t>(width, [&](int64_t k) { return one[k]; });
      const auto found = largest_of<scalar_t>(width, [&](int64_t k) { return other[k]; });
      auto power = std::nearbyint(std::log2(found / largest));
      power = std::isfinite(power) ? std::clamp<scalar_t>(power, 0, base + 1) : scalar_t(0);
      const auto times = std::exp2(power);
      const auto differs = largest_of<scalar_t>(width, [&](int64_t k) { return other[k] - times * one[k]; });
      const bool told = largest == 0 || (power >= 1 && power <= base);
      mixed[row] = mixed[row] || !(differs <= share * largest * times) || !told;
      number[row] += std::clamp<int64_t>(static_cast<int64_t>(power) - 1, 0, base - 1) * place;
    }
  });
}

// Whose rows are, [rows]: an example, or what is given for rows of several, of nobody, and of which nothing is known.
//   of        [rows], the owners' numbers
//   several   [rows], see add_digit
//   plain     the marks of the plain gradients
//   examples  by number; of numbers that nobody has n or more
at::Tensor owners_of(const at::Tensor& of, const at::Tensor& several, const at::Tensor& plain,
                     const at::Tensor& examples, int64_t n, int64_t of_several, int64_t of_nobody, int64_t blind) {
  check_marks(plain, plain);
  const int64_t rows = plain.size(0), width = plain.size(1), known = examples.numel();
  check_numbers(of, rows);
  check_numbers(examples, known);
  check_truths(several, rows);
  at::Tensor owners = at::empty({rows}, of.options());
  const auto* const number = of.const_data_ptr<int64_t>();
  const auto* const example = examples.const_data_ptr<int64_t>();
  const auto* const mixed = several.const_data_ptr<bool>();
  auto* const owner = owners.mutable_data_ptr<int64_t>();
  AT_DISPATCH_FLOATING_TYPES(plain.scalar_type(), "owners_of", [&] {
    const auto* one = plain.const_data_ptr<scalar_t>();
    for (int64_t row = 0; row < rows; ++row, one += width) {
      TORCH_CHECK(0 <= number[row] && number[row] < known, "there is no such number");
      const auto largest = largest_of<scalar_t>(width, [&](int64_t k) { return one[k]; });
      const int64_t found = example[number[row]];
      owner[row] = !std::isfinite(largest)     ? blind
                   : mixed[row]                ? of_several
                   : largest == 0              ? of_nobody
                   : found >= n                ? of_several
                                               : found;
    }
  });
  return owners;
}

// Whether the marks of gradients that were scaled, by digits at these places of the owners' numbers, are those of rows
// with these owners; of the rows of nobody (owners below 0) whether they are zero.
bool are_owned(const at::Tensor& of, const at::Tensor& owners, const at::Tensor& plain,
               const std::vector<at::Tensor>& scaled, const std::vector<int64_t>& places, int64_t base) {
  check_marks(plain, plain);
  const int64_t rows = plain.size(0), width = plain.size(1);
  check_numbers(of, rows);
  check_numbers(owners, rows);
  TORCH_CHECK(scaled.size() == places.size(), "expected a place for every digit");
  const auto* const number = of.const_data_ptr<int64_t>();
  const auto* const owner = owners.const_data_ptr<int64_t>();
  bool alike = true;
  AT_DISPATCH_FLOATING_TYPES(plain.scalar_type(), "are_owned", [&] {
    for (size_t digit = 0; digit < scaled.size() && alike; ++digit) {
      check_marks(scaled[digit], plain);
      const auto* one = plain.const_data_ptr<scalar_t>();
      const auto* other = scaled[digit].const_data_ptr<scalar_t>();
      for (int64_t row = 0; row < rows && alike; ++row, one += width, other += width) {
        const auto power = static_cast<scalar_t>(number[row] / places[digit] % base + 1);
        const auto times = owner[row] >= 0 ? std::exp2(power) : scalar_t(0.5);  // the factor of no example
        for (int64_t k = 0; k < width; ++k) alike = alike && other[k] == times * one[k];
      }
    }
  });
  return alike;
}

// Which rows have elements of other examples than their owners, by the exponents of a gradient that was scaled by a digit
// at this place of the owners' numbers (see gradient_prints.cpp): every element counts alike there, while in projections
// small shares are lost in rounding. Of rows in which no element counts nothing is said.
//
//   of      [rows], the owners' numbers
//   plain   [rows, 2], int64, of the plain gradient
//   scaled  [rows, 2], the same of the other
at::Tensor other_exponents(const at::Tensor& of, const at::Tensor& plain, const at::Tensor& scaled, int64_t place,
                           int64_t base) {
  const int64_t rows = of.numel();
  check_numbers(of, rows);
  for (const auto& sums : {plain, scaled}) check_numbers(sums.flatten(), 2 * rows);
  const at::Tensor others = at::empty({rows}, of.options().dtype(at::kBool));
  const auto* const number = of.const_data_ptr<int64_t>();
  const auto* const one = plain.const_data_ptr<int64_t>();
  const auto* const other = scaled.const_data_ptr<int64_t>();
  auto* const differs = others.mutable_data_ptr<bool>();
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t power = number[row] / place % base + 1, ones = one[2 * row + 1];
    differs[row] = ones != 0 && (other[2 * row] != one[2 * row] + power * ones || other[2 * row + 1] != ones);
  }
  return others;
}

// For every part of `numbers` ([rows], int64, on the CPU), the first part that is the same.
std::vector<int64_t> first_alike(const at::Tensor& numbers, const std::vector<int64_t>& lengths) {
  TORCH_CHECK(numbers.is_cpu() && numbers.scalar_type() == at::kLong && numbers.is_contiguous(),
              "expected int64 numbers on the CPU, one behind the other");
  const auto* at = reinterpret_cast<const char*>(numbers.const_data_ptr<int64_t>());
  const char* const end = at + numbers.numel() * sizeof(int64_t);
  std::unordered_map<std::string_view, int64_t> met;
  std::vector<int64_t> found;
  for (const int64_t length : lengths) {
    const std::string_view part(at, length * sizeof(int64_t));
    TORCH_CHECK(length >= 0 && at + part.size() <= end, "the parts are longer than the numbers");
    found.push_back(met.emplace(part, found.size()).first->second);
    at += part.size();
  }
  return found;
}

}  // namespace

void bind_row_owners(py::module_& m) {
  m.def("add_digit", torch::wrap_pybind_function_no_gil(add_digit));
  m.def("owners_of", torch::wrap_pybind_function_no_gil(owners_of));
  m.def("are_owned", torch::wrap_pybind_function_no_gil(are_owned));
  m.def("other_exponents", torch::wrap_pybind_function_no_gil(other_exponents));
  m.def("first_alike", &first_alike, py::arg("numbers"), py::arg("lengths"));
}

}  // namespace engm
