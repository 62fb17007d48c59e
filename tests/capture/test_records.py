"""What is written on nodes of the autograd graph (csrc/graph_records.h), and what is recorded of a call."""

import gc
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import engm
from engm._C import (
    ALL_GRADIENTS,
    NO_GRADIENTS,
    GradientQueue,
    note_call,
    records_of,
    saved_statistics,
    slot_of,
    walk_graph,
    write_record,
)
from engm.capture.calls import Call, Capture
from engm.rules import find_rule

pytestmark = pytest.mark.torch_insides


class Record:
    """Stands for a call; gradients are kept with a note of who saw them."""

    def __init__(self, seen: list, collecting: bool = True) -> None:
        self.capture = SimpleNamespace(queue=queue(lambda _, gradients: seen.append(gradients)) if collecting else None)
        self._activations = "activations"

    def arranged(self, gradients: tuple) -> tuple:
        return (*gradients, None)


def queue(receive: Callable[[Any, Any], None], most_bytes: int = 0) -> GradientQueue:
    return GradientQueue(SimpleNamespace(receive=receive), most_bytes)


def leaf(*shape: int) -> Tensor:
    return torch.arange(1.0, 1 + torch.Size(shape).numel(), dtype=torch.float64).view(shape).requires_grad_()


def test_records_are_found_again_in_order():
    output = leaf(2).square()
    assert records_of(output) == []
    write_record(output, "first", NO_GRADIENTS)
    write_record(output, "second", NO_GRADIENTS)
    assert records_of(output) == ["first", "second"]
    *_, records, _ = walk_graph(output.sum(), "no token")
    assert records == [(0, "first"), (0, "second")]
    assert torch.equal(*torch.autograd.grad(output.sum(), output), torch.ones(2, dtype=torch.float64))


@pytest.mark.parametrize(
    "hang",
    [
        lambda made: made.register_hook(print),
        lambda made: made.grad_fn.register_hook(print),
        lambda made: made.grad_fn.register_prehook(print),
    ],
)
def test_the_walk_tells_whether_hooks_of_others_hang_in_the_graph(hang):
    made = leaf(2).square()
    loss = made.sum()
    made.retain_grad()
    made.register_hook(print).remove()
    write_record(made, "record", NO_GRADIENTS)
    hooked = [walk_graph(loss, "no token")[-1]]
    handle = hang(made)
    hooked.append(walk_graph(loss, "no token")[-1])
    handle.remove()
    hooked.append(walk_graph(loss, "no token")[-1])
    assert hooked == [False, True, False]


@pytest.mark.parametrize("method", ["register_full_backward_hook", "register_full_backward_pre_hook"])
def test_the_walk_tells_of_the_hooks_of_modules(method):
    layer, x = nn.Linear(3, 3).double(), leaf(2, 3)
    getattr(layer, method)(lambda *_: None)
    assert walk_graph(layer(x).sum(), "no token")[-1]
    assert not walk_graph(nn.Linear(3, 3).double()(x).sum(), "no token")[-1]


def test_a_leaf_has_none():
    assert records_of(leaf(2)) == []
    with pytest.raises(ValueError, match="no node"):
        write_record(leaf(2), "record", NO_GRADIENTS)


def test_a_record_lives_as_long_as_the_node():
    record = Record([])
    output = leaf(2).square()
    write_record(output, record, 0)
    further, reference = output * 2, weakref.ref(record)
    del record, output
    gc.collect()
    assert reference() is not None
    del further
    assert reference() is None


@pytest.mark.parametrize("kind", [Tensor, type("Kin", (Tensor,), {})])
def test_the_gradient_that_the_users_hook_returns_counts(kind):
    """Whoever hung a hook first; and the gradient of the right output of the node."""
    first, second = leaf(2, 2).unbind()
    first = first.as_subclass(kind)
    seen: list[Tensor] = []
    first.register_hook(lambda g: g * 2)
    for output in (first, second):
        write_record(output, Record(seen), output.output_nr)
    handle = first.register_hook(lambda g: g * 5)
    loss = (first * 3).sum() + (second * 7).sum()
    walk_graph(loss, "no token")
    loss.backward(retain_graph=True)
    assert sorted(float(gradient[0]) for gradient in seen) == [7, 30]
    seen.clear()
    handle.remove()
    loss.backward()
    assert sorted(float(gradient[0]) for gradient in seen) == [6, 7]


def test_a_pass_that_ends_at_the_node():
    seen: list[Tensor] = []
    output = leaf(2).square()
    write_record(output, Record(seen), 0)
    torch.autograd.grad((output * 4).sum(), output)
    assert [gradient.tolist() for gradient in seen] == [[4, 4]]


def test_all_gradients_of_a_node():
    seen: list[tuple] = []
    first, second = leaf(2, 2).unbind()
    write_record(first, Record(seen), ALL_GRADIENTS)
    second.sum().backward()
    assert (seen[0][0], seen[0][2]) == (None, None)
    assert seen[0][1].tolist() == [1, 1]


@pytest.mark.parametrize("kept", [True, False])
def test_an_ordinary_pass_that_frees_the_graph_frees_the_activations(kept):
    record, output = Record([], collecting=False), leaf(2).square()
    write_record(output, record, 0)
    output.sum().backward(retain_graph=kept)
    assert record._activations == ("activations" if kept else None)


def test_an_error_of_the_collector_reaches_the_caller():
    record, output = Record([]), leaf(2).square()
    record.capture.queue = queue(lambda *_: {}["missing"])
    write_record(output, record, 0)
    with pytest.raises(KeyError, match="missing"):
        output.sum().backward()


def waiting_record(waiting: GradientQueue, name: str, activations: Any = None) -> SimpleNamespace:
    return SimpleNamespace(capture=SimpleNamespace(queue=waiting), name=name, _activations=activations)


@pytest.mark.parametrize("several", [False, True])
def test_gradients_of_a_call_whose_input_the_graph_alone_holds_do_not_wait(several):
    seen: list[str] = []
    waiting, x = queue(lambda call, _: seen.append(call.name), 1 << 20), leaf(2)
    first = x * 2
    second = first * first
    held = (None, weakref.ref(x)) if several else weakref.ref(x)
    write_record(first, waiting_record(waiting, "weakly", held), 0)
    write_record(second, waiting_record(waiting, "strongly", (None, x) if several else x), 0)
    second.sum().backward()
    assert seen == ["strongly", "weakly"]
    write_record(third := x * 3, waiting_record(waiting, "strongly again", x), 0)
    third.sum().backward()
    assert len(seen) == 2


def chain(waiting: GradientQueue, wrong: bool = False) -> Tensor:
    """Powers of two, and records "0", "1" and "2" of them; a function in between changes what it is given."""

    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            return gradient.mul_(3) if wrong else gradient * 3

    x = leaf(2)
    for number in range(3):
        x = Wrong.apply(x * 2)
        write_record(x, waiting_record(waiting, str(number)), 0)
    return (x * torch.ones_like(x)).sum()


@pytest.mark.parametrize(("most_bytes", "sizes"), [(0, [1, 2, 3]), (16, [0, 2, 2]), (1 << 20, [0, 0, 0])])
def test_gradients_wait_until_there_are_enough(most_bytes, sizes):
    """Every gradient takes 16 bytes; the order is that of the backward pass, and the grad mode too."""
    seen: list[tuple] = []
    waiting = queue(lambda call, g: seen.append((call.name, g.tolist(), torch.is_grad_enabled())), most_bytes)
    total, met = chain(waiting), []
    for node in walk_graph(total, "none")[0]:
        if node.name() == "WrongBackward":
            node.register_hook(lambda *_: met.append(len(seen)))
    total.backward()
    assert met == sizes
    waiting.flush()
    assert seen == [(str(2 - k), [6.0**k] * 2, False) for k in range(3)]
    waiting.flush()
    assert len(seen) == 3


def test_a_gradient_that_was_changed_in_place_while_it_waited():
    seen: list[Tensor] = []
    waiting = queue(lambda _, gradient: seen.append(gradient), 1 << 20)
    chain(waiting, wrong=True).backward()
    with pytest.raises(RuntimeError, match="modified in place"):
        waiting.flush()
    assert seen == []


def test_gradients_without_memory_of_the_usual_kind_do_not_wait():
    seen: list[Tensor] = []
    waiting, weight = queue(lambda _, gradient: seen.append(gradient), 1 << 20), leaf(4, 2) * 1
    write_record(weight, waiting_record(waiting, "weight"), 0)
    F.embedding(torch.tensor([1, 1]), weight, sparse=True).sum().backward()
    assert [gradient.layout for gradient in seen] == [torch.sparse_coo]


def test_slot_of():
    a, b = leaf(2, 3), leaf(2, 3)
    output = torch.add(a, b)
    assert (slot_of(output, a), slot_of(output, b)) == (0, 1)
    first, second = leaf(4, 2).unbind(1)  # two outputs of one node
    output = torch.mul(first, second)
    assert (slot_of(output, first), slot_of(output, second)) == (0, 1)
    assert slot_of(output, torch.ones(4)) == 0


def test_statistics_are_those_of_the_node_that_was_named():
    x = leaf(2, 4, 3)
    mean, rstd = saved_statistics(F.group_norm(x, 2), "NativeGroupNormBackward")
    torch.testing.assert_close(mean, x.detach().view(2, 2, 6).mean(2))
    torch.testing.assert_close(rstd, x.detach().view(2, 2, 6).var(2, correction=0).add(1e-5).rsqrt())
    assert saved_statistics(F.group_norm(x, 2), "NativeLayerNormBackward") is None


@pytest.mark.parametrize("name", ["NativeGroupNorm", "OurNativeGroupNorm"])
def test_a_function_with_the_name_of_an_operator_has_saved_no_statistics(name):
    methods = {
        "forward": staticmethod(lambda ctx, x: x * 2),
        "backward": staticmethod(lambda ctx, gradient: gradient * 2),
    }
    function = type(name, (torch.autograd.Function,), methods)
    assert saved_statistics(function.apply(leaf(2, 4, 3)), "NativeGroupNormBackward") is None


def test_what_is_noted_of_a_call():
    first, second = nn.Linear(3, 4).double(), nn.BatchNorm1d(4).double()
    x = torch.ones(5, 3, dtype=torch.float64)
    y = first(x)
    capture = Capture(None)
    call = Call(capture, "first", first, find_rule(first), x, y)
    assert (call.capture, call.name, call.module, call.shape, call.batch) == (capture, "first", first, (5, 4), 5)
    assert call.parameters == {"weight": first.weight, "bias": first.bias}
    assert (call.input_nodes, call.input_storages) == ((), {x.untyped_storage().data_ptr()})
    assert (call.couples, call.reads, call.producer, call.saved) == (False, True, None, None)
    assert call.activations().data_ptr() == x.data_ptr()
    write_record(y, call, 0)
    z = second(y)
    other = Call(capture, "second", second, find_rule(second), y, z)
    assert (other.couples, other.producer, other.slot) == (True, call, 0)
    assert (other.input_nodes, other.input_storages, other.input_is_index) == ((y.grad_fn,), frozenset(), False)
    mean, rstd = other.saved
    torch.testing.assert_close(mean, y.detach().mean(0))
    torch.testing.assert_close(rstd, y.detach().var(0, correction=0).add(1e-5).rsqrt())


@pytest.mark.parametrize(("trained", "reads"), [("weight", True), ("bias", False), ("", False)])
def test_a_lone_bias_needs_no_activations(trained, reads):
    layer = nn.Linear(3, 4)
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_(name == trained)
    x = torch.ones(5, 3, requires_grad=True)
    call = Call(Capture(None), "layer", layer, find_rule(layer), x, layer(x))
    assert list(call.parameters) == [trained] * bool(trained)
    assert call.reads == reads
    assert (call._activations is not None) == reads


def test_nested_rows_have_no_shape():
    x = torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(1, 3)]).requires_grad_()
    layer = nn.Linear(3, 4)
    assert Call(Capture(None), "layer", layer, find_rule(layer), x, layer(x)).shape == (2, -1, -1)


def test_several_inputs():
    layer = nn.Bilinear(2, 3, 4)
    x, y = torch.ones(5, 2), torch.ones(5, 3, requires_grad=True) * 1
    call = Call(Capture(None), "layer", layer, find_rule(layer), (x, y), layer(x, y))
    assert call.input_nodes == (y.grad_fn,)
    assert call.input_storages == {x.untyped_storage().data_ptr()}
    assert [given.shape for given in call.activations()] == [(5, 2), (5, 3)]
    with torch.no_grad():
        y.add_(1)
    with pytest.raises(RuntimeError, match="modified in place"):
        call.activations()


def test_something_else_than_a_tensor_is_refused():
    with pytest.raises(TypeError, match="expected a tensor"):
        note_call(object.__new__(Call), Call, None, "layer", nn.Linear(1, 1), None, torch.ones(1), "no tensor")


class Both(nn.Module):
    """Layers that take and return one tensor, a batch norm, and a layer that returns several."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.cell = nn.Linear(3, 4), nn.BatchNorm1d(4), nn.LSTMCell(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat(self.cell(self.norm(self.first(x))), 1)


@pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace")
def test_compiled_autograd():
    """There torch runs hooks of Python alone."""
    torch.manual_seed(0)
    model, x = engm.GradNormModule(Both().double(), batch_norm="frozen"), leaf(5, 3).detach()
    expected = engm.per_example_grad_norms(model, model(x).square().sum(1))
    losses = model(x).square().sum(1)
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
        torch.testing.assert_close(engm.per_example_grad_norms(model, losses), expected)
        model(x).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
