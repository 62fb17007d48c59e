// The walk through an autograd graph from the losses down (engm/graph/trace.py), which in Python takes as long as the
// backward pass of a small network.
#include "graph_walk.h"

#include <pybind11/stl.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/accumulate_grad.h>
#include <torch/csrc/autograd/functions/tensor.h>
#include <torch/csrc/autograd/input_metadata.h>
#include <torch/csrc/autograd/python_cpp_function.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <unordered_map>
#include <vector>

#include "graph_records.h"
#include "node_of.h"

namespace engm {

namespace {

namespace py = pybind11;
using torch::autograd::Node;

// Shapes of what the operator of a node returned; None for one that has no shape in plain numbers.
py::tuple shapes_of(const Node& node) {
  py::tuple shapes(node.num_inputs());
  for (size_t k = 0; k < shapes.size(); ++k) {
    const auto& output = node.input_metadata(k);
    shapes[k] = py::none();
    if (output.is_nested_tensor()) continue;
    const auto sizes = output.shape_as_dim_vector();
    py::tuple shape(sizes.size());
    bool plain = true;
    for (size_t d = 0; d < shape.size() && plain; ++d) {
      const auto size = sizes[d].maybe_as_int();
      plain = size.has_value();
      if (plain) shape[d] = py::int_(*size);
    }
    if (plain) shapes[k] = std::move(shape);
  }
  return shapes;
}

// Whether an object itself has an attribute. To ask for one that is missing everywhere takes as long as ten nodes here.
bool has_own(py::handle object, const py::str& name) {
  const auto own = py::reinterpret_steal<py::dict>(PyObject_GenericGetDict(object.ptr(), nullptr));
  if (!own) throw py::error_already_set();
  const int found = PyDict_Contains(own.ptr(), name.ptr());
  if (found < 0) throw py::error_already_set();
  return found != 0;
}

// Walks depth first, inputs from left to right, and returns
//   order     the nodes but those of leaves, each after those that it passes gradients to
//   children  for each of these its inputs: the place in `order` of the node behind, None, or -2 - k for leaf number k
//   numbers   for each which outputs of the nodes behind the inputs are; an empty tuple where all are the first
//   shapes    for each the shapes of its outputs
//   leaves    in the order that they were met
//   tokens    (place in `order`, leaf) where an input is a leaf that has the attribute `token`; it is not counted as one
//   hooked    (last) whether hooks of others hang on a node or on what it made
//   records   (place in `order`, object) for every object that was written on a node (graph_records.h), in that order
py::tuple walk(const at::Tensor& root, const py::str& token) {
  struct Frame {
    Node* node;
    size_t next;  // the input to go to
  };
  py::list order, children, numbers, shapes, leaves, tokens, records;
  bool hooked = false;
  std::unordered_map<const Node*, int64_t> positions, met;  // of nodes, of leaves
  std::unordered_map<const Node*, py::object> token_of;
  const py::tuple all_first(0);
  const auto finish = [&](Node* node) {
    const auto& edges = node->next_edges();
    py::tuple behind(edges.size());
    bool first = true;
    for (size_t k = 0; k < edges.size(); ++k) {
      const Node* const child = edges[k].function.get();
      behind[k] = py::none();
      if (child == nullptr) continue;
      first = first && edges[k].input_nr == 0;
      if (const auto found = positions.find(child); found != positions.end()) {
        behind[k] = py::int_(found->second);
      } else if (const auto leaf = met.find(child); leaf != met.end()) {
        behind[k] = py::int_(-2 - leaf->second);
      } else {
        tokens.append(py::make_tuple(order.size(), token_of.at(child)));
      }
    }
    children.append(std::move(behind));
    if (first) {
      numbers.append(all_first);
    } else {
      py::tuple found(edges.size());
      for (size_t k = 0; k < edges.size(); ++k) found[k] = py::int_(edges[k].input_nr);
      numbers.append(std::move(found));
    }
    shapes.append(shapes_of(*node));
    hooked = hooked || is_hooked(*node);
    for (auto& record : read_records(*node)) records.append(py::make_tuple(order.size(), std::move(record)));
    positions.emplace(node, order.size());
  };

  const auto& first = root.grad_fn();
  if (first == nullptr) return py::make_tuple(order, children, numbers, shapes, leaves, tokens, records, hooked);
  // The edges keep all nodes but the first alive, and the root that one.
  std::unordered_map<const Node*, bool> seen{{first.get(), true}};
  std::vector<Frame> stack{{first.get(), 0}};
  while (!stack.empty()) {
    Frame& frame = stack.back();
    Node* const node = frame.node;
    const auto& edges = node->next_edges();
    if (frame.next == 0) {
      // Leaves are numbered when their first reader is met, all of its inputs at once.
      for (const auto& edge : edges) {
        const auto* const leaf = dynamic_cast<torch::autograd::AccumulateGrad*>(edge.function.get());
        if (leaf == nullptr || met.count(leaf) != 0 || token_of.count(leaf) != 0) continue;
        py::object variable = py::reinterpret_steal<py::object>(THPVariable_Wrap(leaf->variable));
        if (has_own(variable, token)) {
          token_of.emplace(leaf, std::move(variable));
        } else {
          met.emplace(leaf, leaves.size());
          leaves.append(std::move(variable));
        }
      }
    }
    Node* further = nullptr;
    while (frame.next < edges.size() && further == nullptr) {
      Node* const child = edges[frame.next++].function.get();
      const bool is_leaf = child == nullptr || met.count(child) != 0 || token_of.count(child) != 0;
      if (!is_leaf && seen.emplace(child, true).second) further = child;
    }
    if (further != nullptr) {
      stack.push_back({further, 0});
      continue;
    }
    finish(node);
    stack.pop_back();
    order.append(py::none());  // the object of Python is put in below, where the pointer that owns the node is at hand
  }
  const auto put = [&](const auto& function) {
    const auto found = positions.find(function.get());
    if (found != positions.end() && order[found->second].is_none())
      order[found->second] = py::reinterpret_steal<py::object>(torch::autograd::functionToPyObject(function));
  };
  put(first);
  for (const auto& [node, position] : positions)
    for (const auto& edge : node->next_edges())
      if (edge.function != nullptr) put(edge.function);
  return py::make_tuple(order, children, numbers, shapes, leaves, tokens, records, hooked);
}

// Lets go of what the operators of a graph saved, as a backward pass that does not keep the graph does.
void release_graph(const py::list& order) {
  for (const py::handle node : order) node_of(node)->release_variables();
}

// What an operator wrote into a view: the name of its own node, and sizes, strides and offset of the tensor and of the
// view. None where the view is none of strides, or not of plain numbers.
py::object written_slice(py::handle object) {
  const auto node = node_of(object);
  const auto* const slices = dynamic_cast<const torch::autograd::CopySlices*>(node.get());
  if (slices == nullptr || slices->view_fn != nullptr || slices->fn == nullptr) return py::none();
  bool plain = true;
  const auto number = [&plain](const c10::SymInt& value) {
    const auto found = value.maybe_as_int();
    plain = plain && found.has_value();
    return py::int_(found.value_or(0));
  };
  const auto numbers = [&number](c10::SymIntArrayRef values) {
    py::tuple found(values.size());
    for (size_t k = 0; k < values.size(); ++k) found[k] = number(values[k]);
    return found;
  };
  const auto geometry = [&](const at::TensorGeometry& of) {
    return py::make_tuple(numbers(of.sym_sizes()), numbers(of.sym_strides()), number(of.sym_storage_offset()));
  };
  py::object found = py::make_tuple(slices->fn->name(), geometry(slices->base), geometry(slices->view));
  return plain ? found : py::none();
}

}  // namespace

void bind_graph_walk(py::module_& m) {
  m.def("walk_graph", &walk);
  m.def("written_slice", &written_slice);
  m.def("release_graph", &release_graph);
  m.def("is_hooked", [](py::handle node) { return is_hooked(*node_of(node)); });
}

}  // namespace engm
