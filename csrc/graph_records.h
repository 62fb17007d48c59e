// What engm writes on nodes of the autograd graph: Python objects that live as long as the node, and which it finds
// again when it walks the graph.
#pragma once

#include <pybind11/pybind11.h>
#include <torch/csrc/autograd/function.h>

#include <cstdint>
#include <utility>
#include <vector>

#include "held_object.h"

namespace engm {

// An object on a node. That of a layer's call also takes the gradients of what the layer returned; as a hook on
// tensors, so that it sees them too where a backward pass ends at the node without running it.
class GraphRecord : public torch::autograd::FunctionPreHook {
 public:
  enum : int64_t { kAll = -1, kNone = -2 };

  // `output`: the gradient of which of the node's outputs the call gets, kAll: a tuple of all, kNone: nothing.
  GraphRecord(pybind11::object object, int64_t output) : object_(std::move(object)), output_(output) {}

  torch::autograd::variable_list operator()(const torch::autograd::variable_list& gradients) override;

  // As a hook of Python, for torch's compiled autograd (torch._dynamo.config.compiled_autograd).
  void compiled_args(torch::dynamo::autograd::CompiledNodeArgs& args) const override;

  pybind11::handle object() const { return object_.get(); }

 private:
  HeldObject object_;
  int64_t output_;
};

// Writes an object on a node, see GraphRecord.
void write_record(torch::autograd::Node& node, pybind11::object object, int64_t output);

// The objects on a node in the order they were written; hooks of the user's own tensors run before them from now on,
// for the gradient that those return is the one that counts.
std::vector<pybind11::object> read_records(torch::autograd::Node& node);

// Whether hooks of the user's hang on a node or on its outputs, other than those that keep gradients alone.
bool is_hooked(torch::autograd::Node& node);

void bind_graph_records(pybind11::module_& m);

}  // namespace engm
