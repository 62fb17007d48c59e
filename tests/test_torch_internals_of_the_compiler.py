"""Names of engm/torch_internals.py, one by one, against plain torch: what the engine asks of torch's compiler."""

import subprocess
import sys
from contextlib import nullcontext

import numpy as np
import pytest
import torch
import torch._dynamo
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

from engm import torch_internals as internals

pytestmark = pytest.mark.torch_insides


@pytest.fixture(autouse=True)
def _nothing_compiled():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def inner(x: Tensor) -> Tensor:
    return x.sin().exp().sum()


def test_is_compiled_region():
    x = torch.ones(3, requires_grad=True)
    output = torch.compile(inner, backend="aot_eager")(x)
    assert internals.is_compiled_region(output.grad_fn)
    assert internals.is_python_function(output.grad_fn)
    assert not internals.is_compiled_region(inner(x).grad_fn)


def test_is_kind_of_region():
    x = torch.ones(3, requires_grad=True)
    assert internals.is_kind_of_region(type(torch.compile(inner, backend="aot_eager")(x).grad_fn))
    assert not internals.is_kind_of_region(type(inner(x).grad_fn))


def test_never_compiled():
    def told() -> bool:
        return torch.compiler.is_compiling()

    quiet = internals.never_compiled(told)
    compiled = torch.compile(lambda x: (x + 1, told(), quiet()), backend="eager")
    assert compiled(torch.ones(1))[1:] == (True, False)
    assert not quiet()


class Exported(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 1 if internals.is_exported() else x + 2


@pytest.mark.parametrize("strict", [True, False])
def test_is_exported(strict):
    net, x = Exported(), torch.zeros(())
    assert not internals.is_exported()
    assert torch.compile(net, backend="eager")(x) == 2
    torch.compiler.reset()
    assert torch.export.export(net, (x,), strict=strict).module()(x) == 1
    assert not internals.is_exported()


def test_dynamo_in_use():
    torch.compile(nn.Linear(2, 2), backend="eager")
    assert internals.dynamo_in_use()
    script = """
import torch
from engm import torch_internals as internals
layer = torch.nn.Linear(2, 2)
torch.optim.SGD(layer.parameters(), 0.1).step()  # imports the compiler
assert not internals.dynamo_in_use()
torch.compile(layer, backend="eager")
assert internals.dynamo_in_use()
torch.compiler.reset()
assert internals.dynamo_in_use()
"""
    subprocess.run([sys.executable, "-c", script], check=True)


def keeps_its_graph(where, prepare=lambda node: None) -> bool:
    """Whether a region compiled in a context can keep its graph after it did not; torch compiles backward for both."""
    compiled = torch.compile(inner, backend="aot_eager")
    x = torch.ones(3, requires_grad=True)
    with where:
        compiled(x).backward()
        output = compiled(x)
    prepare(type(output.grad_fn))
    try:
        for _ in range(2):
            output.backward(retain_graph=True)
    except RuntimeError as error:
        if "donated buffers" in str(error):
            return False
        raise
    torch.testing.assert_close(x.grad, 3 * (torch.ones(3).cos() * torch.ones(3).sin().exp()))
    return True


def test_graphs_that_can_be_kept():
    with internals.graphs_that_can_be_kept():
        assert keeps_its_graph(nullcontext())
    torch.compiler.reset()
    assert not keeps_its_graph(nullcontext()), "the context is not needed, or does not end"


def test_let_graph_be_kept():
    assert not keeps_its_graph(internals.graphs_that_can_be_kept()), "it is not needed"
    torch.compiler.reset()
    assert keeps_its_graph(internals.graphs_that_can_be_kept(), internals.let_graph_be_kept)
    torch.compiler.reset()
    assert not keeps_its_graph(nullcontext(), internals.let_graph_be_kept), "memory that was given away is gone"
    internals.let_graph_be_kept(type(torch.ones(1, requires_grad=True).square().grad_fn))  # nothing to do


def test_regionbackward():
    """Of a node without an example of its value no shape is known."""
    graph = torch.fx.Graph()
    tangent = graph.placeholder("tangent")
    tangent.meta["val"] = torch.ones(2, 3)
    backward = internals.RegionBackward(graph, {tangent: 0}, {0: None}, {})
    assert backward.shape_of(tangent) == (2, 3)
    assert backward.shape_of(graph.call_function(torch.neg, (tangent,))) is None


def test_backward_of_region():
    def function(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h = (x @ w).exp()
        return h.detach() + 1, h.view(-1), h.sum(1)

    compiled = torch.compile(function, backend="aot_eager")
    w = torch.ones(3, 2, requires_grad=True)
    for n in (4, 5, 6):  # from the second size on it is a symbol
        outputs = compiled(torch.ones(n, 3, requires_grad=True), w)  # on torch 2.11 a node is gone with them
        node = outputs[2].grad_fn
        backward = internals.backward_of_region(node)
        assert isinstance(backward, internals.RegionBackward)
        given = {number: backward.shape_of(tangent) for tangent, number in backward.tangents.items()}
        assert given == {1: (2 * n,), 2: (n,)}
        slots = [slot for slot, (child, _) in enumerate(node.next_functions) if child is not None]
        assert [backward.shape_of(backward.passed[slot]) for slot in slots] == [(n, 3), (3, 2)]
        (leaf,) = (slot for slot in slots if node.next_functions[slot][0].variable is w)
        assert backward.shape_of(backward.passed[leaf]) == (3, 2)
        assert backward.number(3) == 3
        assert backward.number("no number") is None
    assert internals.backward_of_region(w.sum().grad_fn) is None


def sees_a_later_hook(where) -> bool:
    net = nn.Sequential(nn.Linear(2, 2))
    compiled = torch.compile(net, backend="eager")
    with where:
        compiled(torch.ones(1, 2))
        net[0].register_forward_hook(lambda module, args, output: output * 0)
        return not compiled(torch.ones(1, 2)).any()


@pytest.mark.filterwarnings("ignore")
def test_in_operator_of_graphs():
    def branch(x: Tensor) -> Tensor:
        return x.sin() if internals.in_operator_of_graphs() else x.cos()

    @torch.compile(backend="eager", fullgraph=True)
    def region(x: Tensor) -> Tensor:
        inside = torch.cond(x.sum() > 0, branch, lambda x: x.clone(), (x,))
        return torch.stack([branch(x), inside, checkpoint(branch, x, use_reentrant=False)])

    x = torch.ones(3, dtype=torch.float64)
    torch.testing.assert_close(region(x), torch.stack([x.cos(), x.sin(), x.cos()]))
    torch.testing.assert_close(torch.cond(x.sum() > 0, branch, lambda x: x.clone(), (x,)), x.sin())
    assert not internals.in_operator_of_graphs()


def test_guard_hooks(monkeypatch):
    monkeypatch.setattr(torch._dynamo.config, "skip_nnmodule_hook_guards", True)
    assert not sees_a_later_hook(nullcontext()), "it is not needed"
    torch.compiler.reset()
    internals.guard_hooks()
    assert sees_a_later_hook(nullcontext())


def test_whatever_hooks():
    internals.guard_hooks()
    torch.compiler.reset()
    assert not sees_a_later_hook(internals.whatever_hooks())
    torch.compiler.reset()
    assert sees_a_later_hook(nullcontext())


def test_skip_code():
    def hook(x: Tensor) -> Tensor:
        return x.sin() + 1

    def around(x: Tensor) -> Tensor:
        return hook(x) * 2

    counter = CompileCounter()
    internals.skip_code(hook.__code__)
    torch.compile(hook, backend=counter)(torch.ones(2))
    assert counter.frame_count == 0, "a region of its own"
    torch.compile(around, backend=counter, fullgraph=True)(torch.ones(2))
    assert (counter.frame_count, counter.op_count) == (1, 3), "a part of one"


def traced(function, *inputs):
    return make_fx(function, tracing_mode="real")(*inputs)


def test_is_recorded():
    seen = []
    traced(lambda x: seen.append(internals.is_recorded()) or x + 1, torch.ones(2))
    assert seen == [True]
    assert not internals.is_recorded()
    with internals.Operators():
        assert not internals.is_recorded()


def test_quick_descriptions():
    def function(x):
        return (2 * x).sum() + torch.ones(())

    with internals.quick_descriptions():
        quick = traced(function, torch.ones(2)).graph
    slow = traced(function, torch.ones(2)).graph
    assert [(node.op, node.target) for node in quick.nodes] == [(node.op, node.target) for node in slow.nodes]
    modes = [
        {node.meta["val"].fake_mode for node in graph.nodes if isinstance(node.meta.get("val"), torch.Tensor)}
        for graph in (quick, slow)
    ]
    assert [len(found) == 1 for found in modes] == [True, False]


def test_unrecorded():
    def function(x):
        with internals.unrecorded():
            assert (x * 3).sum().item() == 6
        return x + 1

    graph = traced(function, torch.ones(2)).graph
    assert [node.target for node in graph.nodes if node.op == "call_function"] == [torch.ops.aten.add.Tensor]
    with internals.unrecorded():
        assert torch.ones(()).item() == 1


def test_decided():
    internals.take_decisions()
    assert internals.decided(torch.tensor(True))
    assert internals.take_decisions() == []
    found = []

    def function(x):
        assert not internals.decided((x > 1).any())
        found.extend(internals.take_decisions())
        return [x + 1, *found]

    graph = traced(function, torch.ones(2)).graph
    assert len(found) == 1
    assert [str(node.target) for node in graph.nodes if node.op == "call_function"][:2] == [
        "aten.gt.Scalar",
        "aten.any.default",
    ]


def test_take_decisions():
    internals.take_decisions()
    assert internals.take_decisions() == []


def test_decided_for_now():
    internals.take_surprises()
    assert not internals.decided_for_now(torch.tensor(False))
    assert internals.take_surprises() == []
    found = []

    def function(x):
        assert internals.decided_for_now((x > 0).all())
        found.extend(internals.take_surprises())
        return [x + 1, *found]

    program = traced(function, torch.ones(2))
    assert [bool(program(x)[1]) for x in (torch.ones(2), torch.tensor([1.0, -1.0]))] == [False, True]


def test_take_surprises():
    internals.take_surprises()
    assert internals.take_surprises() == []


def test_constant():
    internals.take_constants()
    value = torch.ones(2)
    assert internals.constant(value) is value
    assert internals.take_constants() == []

    def function(x):
        return [x + internals.constant(value)]

    traced(function, torch.ones(2))
    (found,) = internals.take_constants()
    assert found is value


def test_take_constants():
    internals.take_constants()
    assert internals.take_constants() == []


def test_modes_on():
    assert internals.modes_on() == ()
    with torch.device("cpu"):
        assert internals.modes_on() == (torch.device("cpu"),)
        with internals.Calls(), internals.Operators():
            assert internals.modes_on() == (torch.device("cpu"), None, None)
    assert internals.modes_on() == ()


def test_operators():
    class Noting(internals.Operators):
        def before(self, func, args, kwargs):
            found.append((str(func), len(args)))

    found = []
    with Noting():
        assert (torch.ones(2) + 1).tolist() == [2, 2]
    assert ("aten.add.Tensor", 2) in found


def test_operators_that_fail():
    class Noting(internals.Operators):
        def failed(self, error):
            found.append(str(error))

    found = []
    with Noting(), pytest.raises(RuntimeError):
        torch.ones(2) + torch.ones(3)
    assert "must match the size" in found[0]


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return torch.add(gradient, gradient)


def test_calls():
    """Also of what functions in Python call, and of what a backward pass does; what an operator does is its own."""

    class Noting(internals.Calls):
        def before_call(self, func, args, kwargs):
            before.append(func)
            torch.zeros(1)  # not told of

        def after_call(self, func, args, kwargs):
            after.append(func)

    def step(x):
        with internals.Operators(), Noting():
            losses = F.dropout(Doubled.apply(x), 0.5).square().sum()
            (slope,) = torch.autograd.grad(losses, x, retain_graph=True)
            losses.clone().backward()
        return [slope]

    before, after = [], []
    graph = traced(step, torch.ones(2, requires_grad=True)).graph
    assert sorted(map(str, before)) == sorted(map(str, after))
    assert {F.dropout, torch.dropout, torch.Tensor.square, torch.autograd.grad, torch.Tensor.backward} <= set(before)
    assert before.count(torch.add) == 2
    assert torch.zeros not in before
    assert [str(node.target) for node in graph.nodes].count("aten.add.Tensor") == 2
    before.clear()
    with Noting():
        torch.ones(2)
    assert not before, "only while operators are traced"


def test_calls_of_what_runs_functions_in_its_own_way():
    class Loud(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            heard.append(func)

    def step(x):
        with internals.Operators(), internals.Calls():
            F.dropout(loud, 0.5)
        return [x + 1]

    heard = []
    loud = torch.ones(2).as_subclass(Loud)
    traced(step, torch.ones(2))
    assert heard == [F.dropout]


def test_packed():
    """What reads the sizes of packed batches on the host is called under these names."""

    class Noting(internals.Calls):
        def before_call(self, func, args, kwargs):
            if func in internals.PACKED:
                found.append(args[1])

    def step(x):
        with internals.Operators(), Noting():
            return [nn.utils.rnn.pad_packed_sequence(nn.utils.rnn.PackedSequence(x, sizes), batch_first=True)[0]]

    found = []
    sizes = torch.tensor([2, 2, 1])
    traced(step, torch.ones(5, 2))
    assert found == [sizes]
    recurrent = [torch._VF.lstm, torch._VF.gru, torch._VF.rnn_tanh, torch._VF.rnn_relu]  # as torch.nn calls them
    assert set(recurrent) <= set(internals.PACKED)


def test_is_operator():
    assert internals.is_operator(torch.ops.aten.add.Tensor)
    assert not internals.is_operator(torch.add)


def test_schema_of():
    schema = internals.schema_of(torch.ops.aten.add_.Tensor)
    assert (schema.name, schema.overload_name, schema.is_mutable) == ("aten::add_", "Tensor", True)
    assert internals.schema_of(torch.add) is None


def test_written_operands():
    a, b, c = (torch.ones(2) for _ in range(3))
    aten = torch.ops.aten
    assert [id(t) for t in internals.written_operands(aten.add_.Tensor, (a, b), {})] == [id(a)]
    assert [id(t) for t in internals.written_operands(aten.add.out, (a, b), {"out": c})] == [id(c)]
    assert [id(t) for t in internals.written_operands(aten._foreach_add_.List, ([a, b], [b, c]), {})] == [id(a), id(b)]
    assert internals.written_operands(aten.add.Tensor, (a, b), {}) == []


def test_moved_statistics():
    aten = torch.ops.aten
    x, weight, bias, mean, var = torch.full((2, 3), 2.0), *(torch.ones(3) for _ in range(4))
    for training in (True, False):
        arguments = (x, weight, bias, mean, var, training, 0.1, 1e-5)
        found = internals.moved_statistics(aten.native_batch_norm.default, arguments, {})
        assert [id(t) for t in found] == ([id(mean), id(var)] if training else [])
        before = mean.clone(), var.clone()
        aten.native_batch_norm.default(*arguments)
        assert torch.equal(mean, before[0]) != training, "the operator does what is said of it"
    without = (x, weight, bias, None, None, True, 0.1, 1e-5)
    assert internals.moved_statistics(aten.native_batch_norm.default, without, {}) == []
    backward = (x, x, weight, mean, var, mean, var, True, 1e-5, [True, True, True])
    assert internals.moved_statistics(aten.native_batch_norm_backward.default, backward, {}) == []
    assert internals.moved_statistics(aten.add.Tensor, (x, x), {}) == []
    assert internals.moved_statistics(torch.add, (x, x), {}) == []


def test_without_autocast():
    x = torch.ones(2, 2)
    with torch.autocast("cpu", torch.bfloat16):
        assert (x @ x).dtype == torch.bfloat16
        with internals.without_autocast():
            assert (x @ x).dtype == torch.float32
        assert (x @ x).dtype == torch.bfloat16


def test_memory():
    memory, x = internals.Memory(), torch.ones(4)
    memory.add(x[1:])
    assert x[:2] in memory
    assert torch.ones(4) not in memory
    sparse = torch.eye(2).to_sparse()
    memory.add(sparse)
    assert sparse not in memory
    del x
    assert not any(torch.ones(4) in memory for _ in range(5))  # the address is not given to others


def test_is_of_others():
    numbers = np.ones(3)
    assert internals.is_of_others(torch.from_numpy(numbers)[1:])
    assert not internals.is_of_others(torch.ones(3))
    assert not internals.is_of_others(torch.tensor(numbers))
    assert not internals.is_of_others(torch.eye(2).to_sparse())


def test_all_memory_of():
    x = torch.arange(6.0).view(2, 3)
    version = internals.version_of(x)
    internals.all_memory_of(x[1:, ::2]).fill_(3)
    assert x.eq(3).all()
    assert internals.version_of(x) == version


def test_deciding_sizes():
    aten, x = torch.ops.aten, torch.ones(3)
    mask, rows = x > 0, torch.tensor([0, 1])
    assert internals.deciding_sizes(aten.nonzero.default, (x,)) == [x]
    assert internals.deciding_sizes(aten.index.Tensor, (x, [mask])) == [mask]
    assert internals.deciding_sizes(aten.index.Tensor, (x, [None, rows])) == []
    assert internals.deciding_sizes(aten.add.Tensor, (x, x)) == []


def test_tensors_in():
    x, y = torch.ones(1), torch.ones(2)
    assert internals.tensors_in(((x, 1), {"a": [None, y]})) == [x, y]


def test_compiled_by_inductor():
    """It draws what is drawn eagerly, writes into its inputs, and reads them anew."""

    def step(weight: Tensor, level: Tensor, x: Tensor) -> list[Tensor]:
        noise = torch.rand_like(x)
        level.lerp_(x.mean(), 0.1)
        return [torch.relu(x + noise).mm(weight).exp(), torch.bernoulli(torch.full_like(x, 0.5))]

    torch.manual_seed(0)
    weight, level, x = nn.Parameter(torch.randn(3, 2)), torch.zeros(()), torch.randn(4, 3)
    with torch.no_grad():
        compiled = internals.compiled_by_inductor(make_fx(step)(weight, level, x), [weight, level, x])
        for seed in range(2):
            found = []
            for way in (compiled, step):
                torch.manual_seed(seed)
                level.zero_()
                found.append([*way(weight, level, x), level.clone(), torch.get_rng_state()])
            torch.testing.assert_close(*found)
            assert all(map(torch.equal, found[0][1:2] + found[0][3:], found[1][1:2] + found[1][3:]))
            weight.mul_(2.0)
