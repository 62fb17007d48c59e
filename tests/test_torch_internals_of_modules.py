"""Names of engm/torch_internals.py, one by one, against plain torch: tensors and modules."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from engm import torch_internals as internals

pytestmark = pytest.mark.torch_insides


# -- tensors ----------------------------------------------------------------------------------------------------------


def test_tree_flatten():
    tree = {"a": [1, (2, None)], "b": {"c": 3}}
    leaves, spec = internals.tree_flatten(tree)
    assert leaves == [1, 2, None, 3]
    assert spec == internals.tree_flatten({"a": [5, (6, None)], "b": {"c": 7}})[1]
    assert spec != internals.tree_flatten([1, 2, None, 3])[1]


def test_tree_leaves():
    assert internals.tree_leaves([1, {"a": (2, 3)}]) == [1, 2, 3]


def test_tree_unflatten():
    _, spec = internals.tree_flatten([1, {"a": (2, 3)}])
    assert internals.tree_unflatten([4, 5, 6], spec) == [4, {"a": (5, 6)}]


def test_treespec():
    assert isinstance(internals.tree_flatten([1])[1], internals.TreeSpec)


def test_address_of():
    x = torch.zeros(4)
    assert internals.address_of(x[2:]) == internals.address_of(x) != 0
    assert internals.address_of(x.clone()) != internals.address_of(x)
    seen = []

    def under_vmap(row: Tensor) -> Tensor:
        seen.append(internals.address_of(row))
        return row

    torch.func.vmap(under_vmap)(torch.zeros(2, 3))
    assert seen == [0]


def test_version_of():
    x = torch.zeros(4)
    before = internals.version_of(x)
    assert internals.version_of(x + 1) == before
    x[1:].add_(1)
    assert internals.version_of(x) == internals.version_of(x.detach()) != before
    with torch.inference_mode():
        assert internals.version_of(torch.zeros(4).add_(1)) == 0


def test_is_view():
    x = torch.zeros(4, requires_grad=True)
    assert internals.is_view(x[1:])
    assert internals.is_view(x.view(2, 2))
    assert not internals.is_view(x)
    assert not internals.is_view(x + 1)


def test_untracked_alias():
    x = torch.ones(4, requires_grad=True)
    output = x * 2
    alias = internals.untracked_alias(output)
    assert internals.address_of(alias) == internals.address_of(output)
    assert not internals.is_view(alias)
    alias.mul_(3)
    assert output.tolist() == [6.0] * 4
    alias.sum().backward()
    assert x.grad.tolist() == [6.0] * 4


def test_has_gradient_hooks():
    plain, hooked, after = (nn.Parameter(torch.ones(2)) for _ in range(3))
    hooked.register_hook(lambda g: g)
    handle = after.register_post_accumulate_grad_hook(lambda p: None)
    found = [internals.has_gradient_hooks([parameter]) for parameter in (plain, hooked, after)]
    assert found == [False, True, True]
    handle.remove()
    assert not internals.has_gradient_hooks([plain, after])


def test_norms_of_each():
    tensors = [torch.randn(3, 4), torch.randn(5), torch.zeros(())]
    found = internals.norms_of_each(tensors)
    torch.testing.assert_close(found, [tensor.norm() for tensor in tensors])


def test_norms_of_each_in_a_wider_type():
    (found,) = internals.norms_of_each([torch.full((4,), 1e30)], torch.float64)
    assert found.dtype == torch.float64
    assert abs(float(found) / 2e30 - 1) < 1e-6  # in float32 its square would be infinite


def test_differences_of_each():
    first, second = [torch.ones(2), torch.ones(3, 1)], [torch.zeros(2), torch.full((3, 1), 3.0)]
    found = internals.differences_of_each(first, second)
    assert torch.equal(found[0], torch.ones(2))
    assert torch.equal(found[1], torch.full((3, 1), -2.0))


def test_copy_each():
    targets, sources = [torch.zeros(2), torch.zeros(3, 1)], [torch.ones(2), torch.full((3, 1), 2.0)]
    addresses = [internals.address_of(target) for target in targets]
    internals.copy_each(targets, sources)
    assert all(map(torch.equal, targets, sources))
    assert [internals.address_of(target) for target in targets] == addresses


def test_keep_device_busy_asks_torch(monkeypatch):
    asked = []
    monkeypatch.setattr("torch.cuda._sleep", asked.append)
    internals.keep_device_busy(1000)
    assert asked == [1000]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_keep_device_busy():
    internals.keep_device_busy(1)
    torch.cuda.synchronize()
    internals.keep_device_busy(100_000_000)
    assert not torch.cuda.current_stream().query()
    torch.cuda.synchronize()


# -- modules ----------------------------------------------------------------------------------------------------------


def test_state_of_a_module():
    """A module that shares these dicts with another has the same state, whoever adds to it."""
    net, sharing = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)), nn.Module()
    for name in internals.STATE_OF_A_MODULE:
        assert name in net.__dict__
        object.__setattr__(sharing, name, net.__dict__[name])
    net.register_buffer("kept", torch.ones(1))
    net.register_buffer("lost", torch.ones(1), persistent=False)
    net.register_parameter("late", nn.Parameter(torch.ones(1)))
    calls = []
    net.register_state_dict_pre_hook(lambda *_: calls.append("before saving"))
    net.register_state_dict_post_hook(lambda *_: calls.append("after saving"))
    net.register_load_state_dict_pre_hook(lambda *_: calls.append("before loading"))
    net.register_load_state_dict_post_hook(lambda *_: calls.append("after loading"))
    saved = sharing.state_dict()
    assert list(saved) == list(net.state_dict())
    assert "kept" in saved
    assert "lost" not in saved
    calls.clear()
    sharing.load_state_dict(copy.deepcopy(sharing.state_dict()))
    assert calls == ["before saving", "after saving", "before loading", "after loading"]
    known = set(vars(nn.Module()))
    assert {name for name in known if "state_dict" in name} <= set(internals.STATE_OF_A_MODULE)


def test_call_of_a_module():
    """Each of the three names decides what ``module(x)`` runs, and torch reads it from the very module."""
    assert internals.CALL_OF_A_MODULE == ("forward", "_is_full_backward_hook", "_compiled_call_impl")
    x, net = torch.ones(2), nn.Identity()
    net.forward = lambda x: x + 1
    assert net(x).tolist() == [2.0, 2.0]
    net._compiled_call_impl = lambda x: x + 2
    assert net(x).tolist() == [3.0, 3.0]
    assert "_is_full_backward_hook" in vars(nn.Identity())
    hooked = nn.Linear(2, 2)
    hooked.register_full_backward_hook(lambda *_: None)
    assert vars(hooked)["_is_full_backward_hook"]


def test_own_parameters():
    layer = nn.Linear(3, 2, bias=False)
    assert dict(internals.own_parameters(layer)) == {"weight": layer.weight, "bias": None}
    assert not internals.own_parameters(nn.Sequential(layer))


def test_own_buffers():
    layer = nn.BatchNorm1d(3)
    assert list(internals.own_buffers(layer)) == ["running_mean", "running_var", "num_batches_tracked"]
    new = torch.full((3,), 7.0)
    internals.own_buffers(layer)["running_mean"] = new
    assert layer.running_mean is new
    assert layer.state_dict()["running_mean"].tolist() == [7.0] * 3


def test_own_children():
    layer = nn.Linear(3, 3)
    net = nn.Sequential(layer, layer)
    net.register_module("none", None)
    assert dict(internals.own_children(net)) == {"0": layer, "1": layer, "none": None}


def test_trained_of():
    layer = nn.Linear(3, 2)
    layer.bias.requires_grad_(False)
    assert internals.trained_of(layer) == {"weight": layer.weight}
    assert internals.trained_of(nn.Linear(3, 2, bias=False).requires_grad_(False)) == {}


def test_computes_like():
    class Renamed(nn.Conv1d):
        def extra_repr(self) -> str:
            return "renamed"

    class OtherForward(nn.Conv1d):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    class OtherConvolution(nn.Conv1d):
        def _conv_forward(self, *args: Tensor) -> Tensor:
            return 2 * super()._conv_forward(*args)

    found = [internals.computes_like(kind, nn.Conv1d) for kind in (nn.Conv1d, Renamed, OtherForward, OtherConvolution)]
    assert found == [True, True, False, False]
    ours, x = OtherConvolution(2, 3, 1), torch.randn(1, 2, 4)
    plain = nn.Conv1d(2, 3, 1)
    plain.load_state_dict(ours.state_dict())
    torch.testing.assert_close(ours(x), 2 * plain(x))


def test_computing():
    assert set(internals.COMPUTING) <= {name for kind in (nn.Conv2d, nn.GRU) for name in dir(kind)}


def test_rank_without_batch():
    layers = nn.InstanceNorm1d(3), nn.InstanceNorm2d(3), nn.InstanceNorm3d(3)
    for dims, layer in enumerate(layers, 1):
        rank = internals.rank_without_batch(layer)
        assert rank == dims + 1
        assert layer(torch.randn([3, 4, 4, 4][:rank])).dim() == rank


@pytest.mark.parametrize("options", [{}, {"bidirectional": True, "bias": False}, {"num_layers": 2}])
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_parameters(kind, options):
    layer = kind(3, 4, **options)
    assert internals.recurrent_parameters(layer) == tuple(name for name, _ in layer.named_parameters())


def test_original_of_compiled():
    net = nn.Linear(2, 2)
    assert internals.original_of_compiled(torch.compile(net, backend="eager")) is net
    assert internals.original_of_compiled(net) is None
    assert internals.original_of_compiled(nn.Sequential(net)) is None


def test_some_global_forward_hook():
    assert not internals.some_global_forward_hook()
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    assert internals.some_global_forward_hook()
    handle.remove()
    assert not internals.some_global_forward_hook()


def test_firstforwardhooks():
    """As ``register_forward_hook(prepend=True, with_kwargs=True)`` on each, and gone afterwards."""
    first, second, order = nn.Identity(), nn.Identity(), []

    def ours(module, args, kwargs, output):
        order.append((module, args, kwargs, output))
        return output + 1

    theirs = first.register_forward_hook(lambda module, args, output: order.append(output))
    with internals.FirstForwardHooks({first: ours, second: ours}):
        assert first(7) == 8
        assert second(1) == 2
        theirs.remove()
        later = first.register_forward_hook(lambda module, args, output: order.append("later"))
        assert first(7) == 8
    assert order == [(first, (7,), {}, 7), 8, (second, (1,), {}, 1), (first, (7,), {}, 7), "later"]
    assert first(7) == 7
    later.remove()
    assert not first._forward_hooks
    assert not first._forward_hooks_with_kwargs


def test_first_global_forward_hook():
    order = []
    theirs = nn.modules.module.register_module_forward_hook(lambda *_: order.append("theirs"))
    ours = internals.first_global_forward_hook(
        lambda module, args, kwargs, output: order.append(("ours", args, kwargs))
    )
    try:
        nn.Identity()(7)
    finally:
        theirs.remove()
        ours.remove()
    assert order == [("ours", (7,), {}), "theirs"]
    nn.Identity()(7)
    assert len(order) == 2


class Asks(nn.Module):
    """Notes what the two functions about ``DistributedDataParallel`` say within a forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.seen = nn.Linear(2, 2), []

    def forward(self, x: Tensor) -> Tensor:
        running = internals.running_data_parallel()
        self.seen.append((running, running is not None and internals.joins(running)))
        return self.layer(x)


@pytest.fixture
def asks():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield DistributedDataParallel(Asks())
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_gloo_available(), reason="torch was built without gloo")
def test_running_data_parallel(asks):
    asks.module(torch.ones(1, 2))
    asks(torch.ones(1, 2))
    assert asks.module.seen == [(None, False), (asks, False)]
    assert internals.running_data_parallel() is None


@pytest.mark.skipif(not dist.is_gloo_available(), reason="torch was built without gloo")
def test_joins(asks):
    assert not internals.joins(asks)
    asks(torch.ones(1, 2)).sum().backward()
    with asks.join():
        asks(torch.ones(1, 2)).sum().backward()
    assert [joins for _, joins in asks.module.seen] == [False, True]


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace.*")
def test_is_transformed():
    seen = []

    def asks(x: Tensor) -> Tensor:
        seen.append(internals.is_transformed())
        return x.sum()

    x = torch.ones(2, 3)
    asks(x)
    torch.func.vmap(asks)(x)
    torch.func.grad(asks)(x)
    torch.func.jvp(asks, (x,), (x,))
    torch.jit.trace(asks, x, check_trace=False)
    asks(x)
    assert seen == [False, True, True, True, True, False]


def test_hooks_of():
    layer = nn.Linear(2, 2)
    assert not any(internals.hooks_of(layer))
    handles = [
        layer.register_forward_pre_hook(print),
        layer.register_forward_hook(print),
        layer.register_full_backward_pre_hook(print),
        layer.register_full_backward_hook(print),
    ]
    assert [list(hooks.values()) for hooks in internals.hooks_of(layer)] == [[print]] * 4
    for handle in handles:
        handle.remove()
    assert not any(internals.hooks_of(layer))


def test_hooks_of_all_modules():
    hang = nn.modules.module
    assert not any(internals.hooks_of_all_modules())
    handles = [
        hang.register_module_forward_pre_hook(print),
        hang.register_module_forward_hook(print),
        hang.register_module_full_backward_pre_hook(print),
        hang.register_module_full_backward_hook(print),
    ]
    assert [list(hooks.values()) for hooks in internals.hooks_of_all_modules()] == [[print]] * 4
    for handle in handles:
        handle.remove()
    assert not any(internals.hooks_of_all_modules())
