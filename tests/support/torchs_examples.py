"""The rules of operators on torch's own examples of calls: every operator, every option that its derivative may read.

The truth is the backward pass of the operator's own node, once an example. This is a program of its own, since torch's
list of operators, once imported, leaves its process with settings for torch's own tests.

    python tests/support/torchs_examples.py float64
"""

import sys
import warnings
from collections import Counter

import torch
from entering import assert_term, random_owners
from torch.testing._internal.common_methods_invocations import op_db

from engm.rules.any_operator import BROADCASTING, by_element, masked_gradients
from engm.rules.entries import Entry, entry_term, has_operator_rule
from engm.terms.owners import Owners
from engm.torch_internals import (
    entering_shape,
    node_name,
    node_outputs,
    operator_name,
    output_shape,
    passed_to_input,
)

SAMPLES = 6  # of an operator, spread over those that torch has
OPERATORS = [operator for operator in op_db if operator.supports_autograd]
N = 3
GENERATOR = torch.Generator()


def graph_of(output):
    """All nodes behind a tensor."""
    found, pending = {}, [output.grad_fn]
    while pending:
        node = pending.pop()
        if node is not None and node not in found:
            found[node] = None
            pending += [child for child, _ in node.next_functions]
    return list(found)


def tensors_in(value):
    if isinstance(value, torch.Tensor):
        return [value]
    return [t for part in value for t in tensors_in(part)] if isinstance(value, list | tuple) else []


def calls(operator, dtype):
    samples = list(operator.sample_inputs("cpu", dtype, requires_grad=True))
    for sample in samples[:: max(1, len(samples) // SAMPLES)]:
        try:
            outputs = tensors_in(operator(sample.input, *sample.args, **sample.kwargs))
        except (RuntimeError, ValueError, TypeError):  # an example of what the operator refuses, say
            continue
        yield from (output for output in outputs if output.grad_fn is not None and output.layout == torch.strided)


def check_node(node, slot):
    """Returns how often a rule, or one run for all examples, answered."""
    child, number = node.next_functions[slot]
    output = node_outputs(node)[0]
    shape = entering_shape(child, number)
    answered = 0
    for dims in range(len(output.shape) + 1):
        owners = Owners(random_owners(tuple(output.shape[:dims]), N, dims), N)
        entry = Entry(node, slot, shape, owners, N)
        gradient = torch.randn(output_shape(node), dtype=output.dtype, generator=GENERATOR.manual_seed(dims))
        others = [None] * (len(node_outputs(node)) - 1)
        term = entry_term(entry, [gradient, *others]) or by_element(entry, [gradient, *others])
        if term is None:
            continue
        answered += 1
        truth = []
        for example in range(N):
            own = torch.where(owners.elements(gradient.dim()) == example, gradient, 0)
            found = passed_to_input(node, slot, [own, *others])
            truth.append(torch.zeros(shape, dtype=gradient.dtype) if found is None else found.sum_to_size(shape))
        if not torch.stack(truth).isfinite().all():  # a division by zero in torch's example
            continue
        assert_term(term, torch.stack(truth))
        if dims == 1:
            assert_term(masked_gradients(entry, [gradient, *others]), torch.stack(truth))
    return answered


def is_differentiable(node):
    output = node_outputs(node)[0].dtype
    return output.is_floating_point or output.is_complex


def checks(operator, dtype, most=6):
    """Nodes that are not run once an example, and a slot by which something enters, at most so many of a kind."""
    seen = {}
    for output in calls(operator, dtype):
        for node in graph_of(output):
            told = has_operator_rule(node) or operator_name(node) in BROADCASTING
            if told and is_differentiable(node):
                for slot, (child, _) in enumerate(node.next_functions):
                    kind = node_name(node), slot
                    seen[kind] = seen.get(kind, 0) + 1
                    if child is not None and seen[kind] <= most:
                        yield node, slot


def main(dtype):
    answered, wrong = Counter(), []
    for operator in OPERATORS:
        if dtype not in operator.supported_backward_dtypes("cpu"):
            continue
        for node, slot in checks(operator, dtype):
            try:
                answered[operator_name(node)] += check_node(node, slot)
            except Exception as error:
                wrong.append(f"{operator.formatted_name}, slot {slot} of {node_name(node)}: {error!r}")
    assert not wrong, "\n".join(wrong)
    common = {"Add", "Sub", "Mul", "Div", "Expand", "Repeat", "Addcmul", "Where", "Pow"}
    if not dtype.is_complex:
        common |= BROADCASTING
    missing = common - (+answered).keys() - ({"Repeat"} if dtype.is_complex else set())
    assert not missing, f"torch has no examples of {sorted(missing)}"
    print(f"{sum(answered.values())} answers of {len(+answered)} operators are right")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(getattr(torch, sys.argv[1]))
