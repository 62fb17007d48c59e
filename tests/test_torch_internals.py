"""Names of engm/torch_internals.py, one by one, against plain torch: nodes of the graph, and what layers save in them.

What a new version of torch changes fails here first. The names that are about tensors and modules are in
test_torch_internals_of_modules.py, those about the compiler in test_torch_internals_of_the_compiler.py.
"""

import ast
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge, save_on_cpu

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
    assert {"AnyBatchNorm", "SYNC_BATCH_NORM_NODE", "node_name", "never_compiled"} <= set(public_names())


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
    assert internals.operator_name(scaled()[2].grad_fn) == "Scaled"
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


def test_slot_of():
    a, b = leaf(2, 3), leaf(2, 3, seed=1)
    node = torch.add(a, b).grad_fn
    assert (internals.slot_of(node, a), internals.slot_of(node, b)) == (0, 1)
    first, second = leaf(4, 2).unbind(1)  # two outputs of one node
    node = torch.mul(first, second).grad_fn
    assert (internals.slot_of(node, first), internals.slot_of(node, second)) == (0, 1)
    assert internals.slot_of(node, torch.ones(4)) == 0
    assert internals.slot_of(node, "not a tensor") == 0


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


@pytest.mark.parametrize("kept", [True, False])
def test_graph_is_kept(kept):
    x, seen = leaf(2), []
    output = x.square()
    output.register_hook(lambda _: seen.append(internals.graph_is_kept()))
    output.sum().backward(retain_graph=kept)
    torch.autograd.grad(x.square().sum(), x, retain_graph=kept)
    assert seen == [kept]


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

    torch.utils.checkpoint.checkpoint(part, leaf(2), use_reentrant=False)
    assert seen == [True]
    assert not internals.hooks_pack_what_is_saved()


def test_put_last():
    x, order = leaf(2), []
    output = x * 1
    ours = output.register_hook(lambda _: order.append("ours"))
    output.register_hook(lambda _: order.append("theirs"))
    internals.put_last(ours)
    output.sum().backward(retain_graph=True)
    assert order == ["theirs", "ours"]
    ours.remove()
    output.sum().backward()
    assert order == ["theirs", "ours", "theirs"]


# -- what normalisation layers save -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layer", "name"), [(nn.GroupNorm(2, 4), "NativeGroupNormBackward"), (nn.LayerNorm(4), "NativeLayerNormBackward")]
)
def test_saved_statistics(layer, name):
    x = leaf(5, 4)
    groups = x.detach().view(5, -1, 2 if name == "NativeGroupNormBackward" else 4)
    output = layer.double()(x)
    mean, rstd = internals.saved_statistics(output, name)
    torch.testing.assert_close(mean.flatten(), groups.mean(-1).flatten())
    var = groups.var(-1, correction=0).flatten()
    torch.testing.assert_close(rstd.flatten(), torch.rsqrt(var + layer.eps))
    assert not mean.requires_grad
    assert internals.saved_statistics(output.relu(), name) is None
    assert internals.saved_statistics(x.detach(), name) is None
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        assert internals.saved_statistics(layer(x), name) is None


def test_saved_statistics_of_16_bits_are_not_used():
    layer = nn.LayerNorm(4).bfloat16()
    found = internals.saved_statistics(layer(leaf(5, 4).bfloat16()), "NativeLayerNormBackward")
    assert found is None or found[1].dtype == torch.float32


def test_saved_rstd_of_other_nodes():
    x = leaf(5, 4)
    assert internals.saved_rstd(x.square()) is None
    assert internals.saved_rstd(x.detach()) is None
    assert hasattr(torch._C._functions.FusedRmsNormBackward0, "_saved_result1")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, whose RMS norm alone is one node")
def test_saved_rstd():
    x, weight = leaf(5, 4).float().cuda(), leaf(4, seed=1).float().cuda()
    found = internals.saved_rstd(F.rms_norm(x, [4], weight, 1e-5))
    torch.testing.assert_close(found.flatten(), torch.rsqrt(x.detach().square().mean(1) + 1e-5))
    assert not found.requires_grad
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        assert internals.saved_rstd(F.rms_norm(x, [4], weight, 1e-5)) is None


def test_is_narrow():
    narrow = [dtype for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)
              if internals.is_narrow(torch.zeros(1, dtype=dtype))]  # fmt: skip
    assert narrow == [torch.float16, torch.bfloat16]


def test_batch_norm_nodes():
    node = F.batch_norm(leaf(5, 4), None, None, training=True).grad_fn
    assert internals.node_name(node).startswith(internals.BATCH_NORM_NODES[0])
    missing = [name for name in internals.BATCH_NORM_NODES if not hasattr(torch._C._functions, f"{name}0")]
    assert not missing, "no operator of torch makes such a node"


@pytest.mark.parametrize("training", [True, False])
def test_batch_norm_statistics(training):
    x, weight, bias = leaf(5, 4, 3), leaf(4, seed=1), leaf(4, seed=2)
    running_mean, running_var = leaf(4, seed=3).detach(), leaf(4, seed=4).detach().exp()
    node = F.batch_norm(x, running_mean.clone(), running_var.clone(), weight, bias, training=training).grad_fn
    mean, rstd, of_the_batch = internals.batch_norm_statistics(node)
    var, own = torch.var_mean(x.detach(), [0, 2], correction=0)
    torch.testing.assert_close(mean, own if training else running_mean)
    torch.testing.assert_close(rstd, torch.rsqrt((var if training else running_var) + 1e-5))
    assert of_the_batch == training
    assert not any(found.requires_grad for found in (mean, rstd))
    assert internals.batch_norm_statistics(x.square().grad_fn) is None


def sync_batch_norm(rank: int, port: int, folder: Path) -> None:
    """Leave what is known of the node of two processes' batch norm, whose kernels on the CPU are given here."""
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    channels = lambda t: t.view(1, -1, 1)  # noqa: E731

    def statistics(x, eps):
        var, mean = torch.var_mean(x, [0, 2], correction=0)
        return mean, torch.rsqrt(var + eps)

    def gathered(x, means, rstds, running_mean, running_var, momentum, eps, counts):
        mean = means.mean(0)  # both processes have equally many
        return mean, torch.rsqrt((rstds**-2 - eps + means**2).mean(0) - mean**2 + eps)

    def normalised(x, weight, bias, mean, rstd, eps):
        return (x - channels(mean)) * channels(rstd * weight) + channels(bias)

    torch.batch_norm_stats, torch.batch_norm_elemt = statistics, normalised
    torch.batch_norm_gather_stats_with_counts = gathered
    x, weight, bias = leaf(5, 4, 3, seed=rank), leaf(4, seed=7), leaf(4, seed=8)
    function = nn.modules._functions.SyncBatchNorm
    output = function.apply(x, weight, bias, None, None, 1e-5, 0.1, dist.group.WORLD, 2)
    node = output.grad_fn
    mean, rstd, of_the_batch = internals.batch_norm_statistics(node)
    inputs, scale = internals.batch_norm_inputs(node)
    found = {"mean": mean, "rstd": rstd, "x": inputs, "weight": scale}
    found["known"] = torch.tensor([of_the_batch, internals.node_name(node).startswith(internals.SYNC_BATCH_NORM_NODE)])
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def of_two_processes(tmp_path_factory):
    from processes import found_by

    return found_by(sync_batch_norm, 2, tmp_path_factory.mktemp("sync"))


def test_sync_batch_norm_node(of_two_processes):
    assert internals.SYNC_BATCH_NORM_NODE == "SyncBatchNormBackward"
    assert all(found["known"].all() for found in of_two_processes)


def test_batch_norm_statistics_of_two_processes(of_two_processes):
    var, mean = torch.var_mean(torch.cat([leaf(5, 4, 3, seed=rank).detach() for rank in (0, 1)]), [0, 2], correction=0)
    assert internals.batch_norm_statistics(leaf(2).square().grad_fn) is None
    for found in of_two_processes:
        torch.testing.assert_close(found["mean"], mean)
        torch.testing.assert_close(found["rstd"], torch.rsqrt(var + 1e-5))


def test_batch_norm_inputs(of_two_processes):
    x, weight = leaf(5, 4), leaf(4, seed=1)
    found, scale = internals.batch_norm_inputs(F.batch_norm(x, None, None, weight, training=True).grad_fn)
    assert torch.equal(found, x)
    assert torch.equal(scale, weight)
    assert not any(saved.requires_grad for saved in (found, scale))
    assert internals.batch_norm_inputs(F.batch_norm(x, None, None, training=True).grad_fn)[1] is None
    for rank, found in enumerate(of_two_processes):
        assert torch.equal(found["x"], leaf(5, 4, 3, seed=rank))
        assert torch.equal(found["weight"], leaf(4, seed=7))


def test_anybatchnorm():
    kinds = nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, nn.LazyBatchNorm2d
    assert all(issubclass(kind, internals.AnyBatchNorm) for kind in kinds)
    assert not issubclass(nn.InstanceNorm1d, internals.AnyBatchNorm)
    assert not issubclass(nn.GroupNorm, internals.AnyBatchNorm)
