"""Names of engm/torch_internals.py, one by one, against plain torch: nodes of the autograd graph.

What a new version of torch changes fails here first. The names that are not about nodes in general are in the files
beside this one that end with of_normalization, of_modules and of_the_compiler.
"""

import ast
import gc
import re
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import get_gradient_edge, save_on_cpu
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from engm import torch_internals as internals

pytestmark = pytest.mark.torch_insides

ALIASES = {"Node", "Statistics"}  # types of ours that name nothing of torch


def public_names() -> list[str]:
    """What the file defines or hands on, in the order in which it does."""
    found = list(internals.__all__)
    for statement in ast.parse(Path(internals.__file__).read_text()).body:
        if isinstance(statement, ast.FunctionDef | ast.ClassDef):
            found.append(statement.name)
        elif isinstance(statement, ast.Assign | ast.AnnAssign):
            targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
            found += [target.id for target in targets if isinstance(target, ast.Name)]
    return [name for name in found if not name.startswith("_") and name not in ALIASES]


@pytest.mark.parametrize("name", public_names())
def test_every_name_has_a_test_that_uses_it(name):
    used = set()
    for path in Path(__file__).parent.glob("test_torch_internals*.py"):
        for function in ast.parse(path.read_text()).body:
            if isinstance(function, ast.FunctionDef) and re.match(rf"test_{name.lower()}(_|$)", function.name):
                used |= {node.attr for node in ast.walk(function) if isinstance(node, ast.Attribute)}
    assert name in used, f"no test_{name.lower()} uses torch_internals.{name}"


def test_the_names_are_found():
    assert {"AnyBatchNorm", "SYNC_BATCH_NORM", "node_name", "never_compiled"} <= set(public_names())


class Scaled(torch.autograd.Function):
    """``(a * number, a + b)``, whose gradients are told apart by an added 10 and 20."""

    @staticmethod
    def forward(ctx, number, a, constant, b):
        ctx.save_for_backward(a, b)
        ctx.number = number
        return a * number, a + b

    @staticmethod
    def backward(ctx, first, second):
        return None, ctx.number * first + second + 10, None, second + 20


def leaf(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()


def scaled() -> tuple[Tensor, Tensor, Tensor]:
    """Two leaves, and the second output of the function in Python above."""
    a, b = leaf(2, 3), leaf(2, 3, seed=1)
    return a, b, Scaled.apply(3.0, a, torch.zeros(()), b)[1]


# -- nodes of the autograd graph --------------------------------------------------------------------------------------


def test_node_name():
    x, weight, bias = leaf(5, 4), leaf(3, 4), leaf(3)
    assert internals.node_name(F.linear(x, weight, bias).grad_fn) == "AddmmBackward0"
    _, _, output = scaled()
    assert internals.node_name(output.grad_fn) == output.grad_fn.name() == "ScaledBackward"
    assert internals.node_name(scaled()[2].grad_fn) == "ScaledBackward", "the output is gone"
    assert internals.node_name(get_gradient_edge(weight).node).endswith("AccumulateGrad")


def test_operator_name():
    assert internals.operator_name(F.linear(leaf(5, 4), leaf(3, 4), leaf(3)).grad_fn) == "Addmm"
    assert internals.operator_name(torch.log1p(leaf(2)).grad_fn) == "Log1P"
    of_user, of_torch = scaled()[2], torch.utils.checkpoint.CheckpointFunction.apply(torch.neg, True, leaf(2))
    assert internals.operator_name(of_user.grad_fn) == f"Scaled of {__name__}"  # no operator's, whatever its name
    assert internals.operator_name(of_torch.grad_fn) == "CheckpointFunction"
    assert internals.operator_name(get_gradient_edge(leaf(2)).node) == "AccumulateGrad"


def test_leaf_of():
    x = leaf(2)
    square = x.square()
    assert internals.leaf_of(square.grad_fn.next_functions[0][0]) is x
    assert internals.leaf_of(square.grad_fn) is None
    assert internals.leaf_of(scaled()[2].grad_fn) is None


def test_node_outputs():
    _, second = leaf(5, 4).float().split([2, 3])
    found = internals.node_outputs(second.grad_fn)
    assert [tuple(output.shape) for output in found] == [(2, 4), (3, 4)]
    assert (found[1].dtype, found[1].device) == (torch.float32, second.device)
    _, _, output = scaled()
    python = internals.node_outputs(output.grad_fn)
    assert [(tuple(found.shape), found.dtype) for found in python] == [((2, 3), torch.float64)] * 2


def test_output_shape():
    assert internals.output_shape(F.linear(leaf(5, 4), leaf(3, 4)).grad_fn) == (5, 3)
    first, second = leaf(5, 4).split([2, 3])
    assert internals.output_shape(second.grad_fn, second.output_nr) == (3, 4)
    assert internals.output_shape(first.sum().grad_fn) == ()


def test_entering_shape():
    node = F.linear(leaf(5, 4), leaf(3, 4), leaf(3)).grad_fn  # bias, x, weight transposed
    assert [internals.entering_shape(child, number) for child, number in node.next_functions] == [(3,), (5, 4), (4, 3)]


def test_entering_dtype():
    node = (leaf(3) * torch.ones(3, dtype=torch.complex64).requires_grad_().conj()).grad_fn
    found = [internals.entering_dtype(child, number) for child, number in node.next_functions]
    assert found == [leaf(3).dtype, torch.complex64]


def test_is_python_function():
    assert internals.is_python_function(scaled()[2].grad_fn)
    assert not internals.is_python_function(leaf(2).square().grad_fn)


def test_is_python_function_unpacks_nothing():
    def refuse(packed):
        raise AssertionError("unpacked")

    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, refuse):
        assert internals.is_python_function(scaled()[2].grad_fn)


def test_saved_by():
    x, weight = leaf(5, 4), leaf(3, 4)
    node = F.linear(x * 1, weight, leaf(3)).grad_fn
    mat1 = internals.saved_by(node, "mat1")
    assert torch.equal(mat1, x)
    assert not mat1.requires_grad
    assert internals.saved_by(node, "mat2").shape == (4, 3)
    assert internals.saved_by(node, "alpha") == 1
    assert internals.saved_by(node, "nothing of that name") is None
    square = x.square()
    square.sum().backward()
    with pytest.raises(RuntimeError, match="freed"):
        internals.saved_by(square.grad_fn, "self")


@pytest.mark.parametrize(
    "number", [2, 2.5, True, torch.tensor(2.0), torch.tensor(2), torch.ones((), dtype=torch.float64)]
)
def test_is_wrapped_number(number):
    node = (leaf(3) * number).grad_fn
    assert internals.is_wrapped_number(node._saved_other) == (not isinstance(number, torch.Tensor))
    assert not internals.is_wrapped_number((leaf(3) * leaf(3)).grad_fn._saved_other)


def test_saved_by_while_operators_are_traced():
    def function(x):
        return internals.saved_by((2 * x.requires_grad_()).grad_fn, "other") * x.detach()

    assert make_fx(function, tracing_mode="real")(torch.ones(2))(torch.full((2,), 3.0)).tolist() == [6, 6]


def test_passed_to_input_of_an_operator():
    x, weight, gradient = leaf(5, 4), leaf(3, 4), leaf(5, 3, seed=2).detach()
    output = F.linear(x * 1, weight, leaf(3))
    x.register_hook(lambda g: g * 100)
    output.register_hook(lambda g: g * 100)
    found = internals.passed_to_input(output.grad_fn, 1, [gradient])
    torch.testing.assert_close(found, gradient @ weight.detach())
    assert not found.requires_grad
    torch.testing.assert_close(internals.passed_to_input(output.grad_fn, 2, [gradient]), x.detach().T @ gradient)
    assert internals.passed_to_input(leaf(2).unsqueeze(0).grad_fn, 0, [None]) is None


def test_passed_to_input_of_a_function_in_python():
    a, b, output = scaled()
    node, gradient = output.grad_fn, torch.ones(2, 3, dtype=torch.float64)
    slots = {child.variable: slot for slot, (child, _) in enumerate(node.next_functions) if child is not None}
    torch.testing.assert_close(internals.passed_to_input(node, slots[a], [gradient, 2 * gradient]), gradient * 15)
    torch.testing.assert_close(internals.passed_to_input(node, slots[b], [gradient, 2 * gradient]), gradient * 22)
    zero = torch.zeros_like(gradient)
    found = [internals.passed_to_input(node, slots[tensor], [zero, 2 * gradient]) for tensor in (a, b)]
    torch.testing.assert_close(found, list(torch.autograd.grad(output, [a, b], 2 * gradient)))
    without = [internals.passed_to_input(node, slots[tensor], [None, 2 * gradient]) for tensor in (a, b)]
    torch.testing.assert_close(without, found)


def test_passed_to_inputs():
    a, b, output = scaled()
    node, gradient = output.grad_fn, torch.ones(2, 3, dtype=torch.float64)
    given = internals.passed_to_inputs(node, [gradient, 2 * gradient])
    assert len(given) == len(node.next_functions)
    for slot, (child, _) in enumerate(node.next_functions):
        wanted = {id(a): gradient * 15, id(b): gradient * 22}
        assert given[slot] is None if child is None else torch.equal(given[slot], wanted[id(child.variable)])
    given = internals.passed_to_inputs(torch.mul(leaf(3), torch.full((3,), 2.0)).grad_fn, [gradient[0]])
    torch.testing.assert_close(given[0], 2 * gradient[0])
    assert given[1] is None


def test_is_multiplied():
    given, found = [leaf(3, 4).detach()], leaf(5).detach()
    assert internals.is_multiplied(2 * found, found, given)
    assert not internals.is_multiplied(found, found, given), "as what is clipped comes out"
    assert internals.is_multiplied(
        torch.full((5,), 1e-15, dtype=torch.float64), torch.zeros(5, dtype=torch.float64), given
    )
    assert internals.is_multiplied(found, found * float("nan"), given), "nothing can be told"
    assert internals.is_multiplied(8 * found, found, given, 8)
    assert not internals.is_multiplied(2 * found, found, given, 8)


def test_adds_up():
    x = leaf(3, 4)
    losses = x.tanh().sum(1)
    (batched,) = torch.autograd.grad(losses, x, torch.eye(3, dtype=torch.float64), True, is_grads_batched=True)
    (whole,) = torch.autograd.grad(losses.sum(), x)
    assert internals.adds_up(batched, whole)
    assert not internals.adds_up(batched[:1].expand(3, -1, -1), whole), "the first entry repeated"
    assert not internals.adds_up(batched * 1.001, whole)
    assert internals.adds_up(batched.float() * (1 + 1e-6), whole.float()), "rounding"
    assert internals.adds_up(batched * float("nan"), whole), "nothing can be told"
    assert internals.adds_up(torch.ones(3), torch.tensor(3.0))


def test_hooks_pack_what_is_saved():
    assert not internals.hooks_pack_what_is_saved()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        assert internals.hooks_pack_what_is_saved()
    with save_on_cpu():
        assert internals.hooks_pack_what_is_saved()
    seen = []

    def part(x):
        seen.append(internals.hooks_pack_what_is_saved())
        return x.square()

    checkpoint(part, leaf(2), use_reentrant=False)
    assert seen == [True]
    assert not internals.hooks_pack_what_is_saved()


def test_selective_checkpoint():
    """torch 2.13 refuses a second backward pass through one; on torch 2.11 the pass may be wrong."""
    seen = []

    def part(x):
        seen.append(internals.selective_checkpoint())
        return torch.addmm(x, x, torch.addmm(x, x, x).sin())  # the second is kept, and not needed again

    def policy(ctx, operator, *args, **kwargs):
        kept = operator == torch.ops.aten.addmm.default
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    x = leaf(3, 3)
    checkpoint(part, x, use_reentrant=False)
    assert seen == [False]
    output = checkpoint(
        part, x, use_reentrant=False, context_fn=partial(create_selective_checkpoint_contexts, policy)
    ).sum()
    assert seen == [False, True]
    (first,) = torch.autograd.grad(output, x, retain_graph=True)
    if torch.__version__ < (2, 13):
        (second,) = torch.autograd.grad(output, x)
        assert not torch.allclose(first, second)
    else:
        with pytest.raises(RuntimeError, match="only allowed to backward once"):
            torch.autograd.grad(output, x)


def test_is_opaque():
    x = leaf(3, 4)
    assert internals.is_opaque(Ordered.apply(x, torch.tensor([2, 0, 1])).grad_fn)
    assert not internals.is_opaque((x * 2).grad_fn)


def test_saves_data():
    class Weighted(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, by):
            ctx.save_for_backward(x, by)
            return by @ x

        @staticmethod
        def backward(ctx, gradient):
            return ctx.saved_tensors[1].T @ gradient, None

    x = leaf(3, 4)
    assert internals.saves_data(Weighted.apply(x, torch.eye(3, dtype=x.dtype)).grad_fn)
    assert not internals.saves_data(Ordered.apply(x, torch.tensor([2, 0, 1])).grad_fn)


def test_options_reader():
    """Equal where the options are, and another where they are not."""
    nodes = [(leaf(3, 4) * 1).select(dim, index).grad_fn for dim, index in ((1, 2), (1, 2), (0, 2), (1, -1))]
    read = internals.options_reader(nodes[0])
    first, same, *others = (read(node) for node in nodes)
    assert hash(first) == hash(same)
    assert first == same
    assert first not in others
    assert internals.options_reader((leaf(2) * leaf(2)).grad_fn)(nodes[0]) == internals.saved_options(nodes[0])
    by_dim = internals.options_reader(nodes[0], ["dim"])
    assert by_dim(nodes[0]) == by_dim(nodes[3]) != by_dim(nodes[2])
    shapes = [torch.nn.functional.layer_norm(leaf(3, 4), shape).grad_fn for shape in ((4,), (4,), (3, 4))]
    one, alike, other = map(internals.options_reader(shapes[0], ["normalized_shape"]), shapes)
    assert hash(one) == hash(alike)
    assert one == alike != other


def test_saved_options():
    assert set(internals.saved_options((leaf(3, 4) * 1).select(1, 2).grad_fn)) == {1, 2, (3, 4)}


def test_saved_option():
    node = (leaf(3, 4) * 1).select(1, 2).grad_fn
    assert internals.saved_option(node, "dim") == 1
    assert internals.saved_option(node, "nothing") is None
    assert internals.saved_option((leaf(3, 4) * 1).roll(-1, 0).grad_fn, "shifts") == (-1,)


def test_saved_tensor_names():
    x = leaf(3, 4)
    assert internals.saved_tensor_names((x * 1).select(1, 2).grad_fn) == ()
    assert internals.saved_tensor_names((x * 1)[torch.tensor([2, 0])].grad_fn) == ("indices",)
    assert internals.saved_tensor_names(Ordered.apply(x, torch.tensor([2, 0, 1])).grad_fn) == ("",)


def test_saved_tensors_of():
    x, order = leaf(3, 4), torch.tensor([2, 0, 1])
    indexed, ordered = (x * 1)[order], Ordered.apply(x, order)
    (found,) = internals.saved_tensors_of(indexed.grad_fn, "indices")
    assert torch.equal(found, order)
    assert torch.equal(internals.saved_tensors_of(ordered.grad_fn, "")[0], x)


class Ordered(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, order):
        ctx.order, ctx.note = order, "kept"
        ctx.save_for_backward(x)
        return x[order]

    @staticmethod
    def backward(ctx, gradient):
        return gradient[ctx.order.argsort()], None


def test_attributes_of_function():
    order = torch.tensor([2, 0, 1])
    attributes = internals.attributes_of_function(Ordered.apply(leaf(3, 4), order).grad_fn)
    assert attributes["note"] == "kept"
    assert attributes["order"] is order


def test_is_recomputed():
    x = leaf(3, 4)
    assert not internals.is_recomputed((x * x).grad_fn)
    assert not internals.is_recomputed((x * 1).view(4, 3).grad_fn)
    seen = []
    checkpoint(lambda x: seen.append((x * x.sin()).grad_fn) or x * 2, x, use_reentrant=False)
    kept = checkpoint(lambda x: (x * x).cos(), x, use_reentrant=False)
    assert internals.is_recomputed(kept.grad_fn)


def nested_parts() -> list[torch.Tensor]:
    return [torch.ones(2, 3), 2 * torch.ones(1, 3)]


def test_rows_of_nested():
    for layout in (torch.strided, torch.jagged):
        nested = torch.nested.nested_tensor(nested_parts(), layout=layout)
        assert torch.equal(internals.rows_of_nested(nested), torch.cat(nested_parts()))
    uneven = torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(1, 4)])
    assert internals.rows_of_nested(uneven).shape == (10,)


def written(change) -> torch.Tensor:
    base = torch.zeros(3, 4)
    change(base)
    return base


def test_written_slice():
    x = leaf(3)
    found = internals.written_slice(written(lambda base: base[:, 1].copy_(x)).grad_fn)
    assert isinstance(found, internals.WrittenSlice)
    assert found.operator == "CopyBackwards"
    found = internals.written_slice(written(lambda base: base.t()[1:3].add_(x)).grad_fn)
    assert found is not None
    assert found.operator == "Add"
    assert internals.written_slice((x * 2).grad_fn) is None


def test_writtenslice_and_geometry():
    found = internals.written_slice(written(lambda base: base.t()[1:3].add_(leaf(3))).grad_fn)
    base, view = internals.Geometry((3, 4), (4, 1), 0), internals.Geometry((2, 3), (1, 4), 1)
    assert found == internals.WrittenSlice("Add", base, view)


def test_geometry():
    found = internals.written_slice(written(lambda base: base[1].copy_(leaf(4))).grad_fn)
    assert found is not None
    assert found.view == internals.Geometry((4,), (1,), 4)


class Region:
    """Two products and a sine in checkpoints within each other; counts its runs, and knows the first run's nodes."""

    def __init__(self, depth: int = 1) -> None:
        self.runs, self.nodes, self.weight, self.depth = 0, [], leaf(3), depth

    def __call__(self, x: Tensor, depth: int | None = None) -> Tensor:
        depth = self.depth if depth is None else depth
        return checkpoint(self._inside, x, depth, use_reentrant=False) if depth else x.cos()

    def _inside(self, x: Tensor, depth: int) -> Tensor:
        self.runs += 1
        y = x * self.weight
        z = y * self.weight.exp()
        if len(self.nodes) < 2 * self.depth:
            self.nodes += [y.grad_fn, z.grad_fn]
        return self(z.sin(), depth - 1)


def read_twice(nodes: list) -> list[Tensor]:
    """What the nodes saved, by names, each of which is asked for more than once."""
    found = [internals.saved_by(node, name) for node in nodes for name in ("self", "other", "self")]
    return found + [one for node in nodes for one in internals.saved_tensors_of(node, "self")]


def used_twice(nodes: list) -> list[Tensor]:
    """The same, and what the nodes themselves make of it."""
    ones = torch.ones(3, dtype=torch.float64)
    return read_twice(nodes) + [g for node in [*nodes, *nodes] for g in internals.passed_to_inputs(node, [ones])]


def test_recomputed_once():
    """Whatever is read of a checkpoint in a row, and however often, it runs again once, within a pass or outside."""
    region = Region()
    output = region(leaf(3))
    with internals.recomputed_once():
        found = used_twice(region.nodes)
        with internals.recomputed_once():
            used_twice(region.nodes)
    assert region.runs == 2
    torch.testing.assert_close(found[4], region.weight.detach().exp())
    within = []

    def hook(gradients):
        with internals.recomputed_once():
            within.extend(read_twice(region.nodes))

    handles = [node.register_prehook(hook) for node in region.nodes]  # the first of them when the second is used up
    for _ in range(2):
        (gradient,) = torch.autograd.grad(output.sum(), [region.weight], retain_graph=True)
    for handle in handles:
        handle.remove()
    assert region.runs == 8, "a pass has its own"
    for one, other in zip(within, 4 * read_twice(region.nodes), strict=True):
        torch.testing.assert_close(one, other)
    torch.testing.assert_close(torch.autograd.grad(output.sum(), [region.weight])[0], gradient)


def test_recomputed_once_in_any_order():
    """What is around a checkpoint, and what was let go of meanwhile, runs again as often as need be."""
    region = Region(depth=7)  # more than are kept
    region(leaf(3))
    found = [used_twice([node]) for node in region.nodes]
    region.runs = 0
    with internals.recomputed_once():
        kept = [used_twice([node]) for node in region.nodes]
        assert region.runs == region.depth
        kept += [used_twice([node]) for node in reversed(region.nodes)]
    for one, other in zip(kept, found + found[::-1], strict=True):
        for a, b in zip(one, other, strict=True):
            torch.testing.assert_close(a, b)


def test_computed_anew():
    """All that one pass asks for is kept until the next one, which may run under vmap; without a phase it is not."""
    region = Region(depth=7)
    output, runs = region(leaf(3)), []
    between, pending = set(), [output.grad_fn]
    while pending:
        node = pending.pop()
        between.add(node)
        pending += [child for child, _ in node.next_functions if child is not None and child not in between]

    def pull(gradient: Tensor) -> Tensor:
        with internals.computed_anew(between):
            return torch.autograd.grad(output, [region.weight], gradient, retain_graph=True)[0]

    with internals.recomputed_once():
        one = pull(torch.ones(3, dtype=torch.float64))
        each = torch.func.vmap(pull)(torch.eye(3, dtype=torch.float64))
        runs.append(region.runs)
    torch.testing.assert_close(each.sum(0), one)
    for _ in range(2):
        torch.testing.assert_close(pull(torch.ones(3, dtype=torch.float64)), one)
        runs.append(region.runs)
    assert runs == [14, 21, 28]


def tensors() -> int:
    gc.collect()
    return sum(isinstance(one, Tensor) for one in gc.get_objects())


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_what_was_recomputed_is_let_go_of():
    region = Region(depth=2)
    output = region(leaf(3))
    before = tensors()
    with internals.recomputed_once():
        used_twice(region.nodes)
        assert tensors() > before
    assert tensors() == before
    used_twice(region.nodes)
    assert tensors() == before
    region.weight.data = region.weight.data.new_ones(4)  # no region runs with that
    with internals.recomputed_once():
        for _ in range(2):
            with pytest.raises(RuntimeError, match="size"):
                used_twice(region.nodes)
        region.weight.data = region.weight.data.new_ones(3)
        used_twice(region.nodes)
    assert tensors() == before
    output.sum().backward()


def test_gradients_of():
    x, unused = torch.arange(3.0, dtype=torch.float64).requires_grad_(), torch.ones(2).requires_grad_()
    hidden = x.exp()
    losses, seeds = hidden.square(), torch.tensor([1.0, 0.0, 2.0], dtype=torch.float64)
    for keep in (True, False):
        found = internals.gradients_of(losses, [x, torch.autograd.graph.get_gradient_edge(hidden), unused], seeds, keep)
        torch.testing.assert_close(found[0], seeds * 2 * (2 * x.detach()).exp())
        torch.testing.assert_close(found[1], seeds * 2 * hidden.detach())
        assert found[2] is None
        assert x.grad is None
    with pytest.raises(RuntimeError, match="second time"):
        internals.gradients_of(losses, [x], seeds, False)
