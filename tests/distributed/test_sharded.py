"""Two gloo processes: ``engm.GradNormModule`` around a network that ``fully_shard`` split, by ``reweight``."""

from __future__ import annotations

import itertools
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from oracle import per_example_gradients
from processes import found_by, process_group
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.fsdp._fully_shard import _fsdp_param_group
from training import assert_close, assert_same, batch, losses_of, network, sgd

import engm
from engm.adversarial import PGD
from engm.backward.norms import measure_graph
from engm.backward.prepare import planned_losses

N, RANKS, STEPS = 8, 2, 3
METHODS = {
    "engm": lambda model, inner: engm.ENGM(model, inner, 5.0),
    "auto": lambda model, inner: engm.ENGM(model, inner, "auto", clip_fraction=0.3),
    "nengm": lambda model, inner: engm.NENGM(model, inner, 0.45),
    "aengm": lambda model, inner: engm.AENGM(model, inner, 6.0, tau=2),
    "gnc": lambda model, inner: engm.GNC(model, inner, 1.0),
    "sngm": engm.SNGM,
    "msgd": engm.MSGD,
}
SPLITS = {"even": (4, 4), "uneven": (5, 3), "single": (1, 7)}
RESHARD = {"default": None, "always": True, "never": False}

pytestmark = [
    pytest.mark.skipif(not dist.is_gloo_available(), reason="torch was built without gloo"),
    pytest.mark.torch_insides,
]


def rows_of(rank, split):
    start = sum(SPLITS[split][:rank])
    return slice(start, start + SPLITS[split][rank])


def sharded(net, reshard=None, layers=True, mesh=None):
    """The network, split layer by layer or as one part."""
    mesh = init_device_mesh("cpu", (RANKS,)) if mesh is None else mesh
    for layer in net if layers else []:
        if next(layer.parameters(), None) is not None:
            fully_shard(layer, mesh=mesh, reshard_after_forward=reshard)
    return fully_shard(net, mesh=mesh, reshard_after_forward=reshard)


def whole(tensors):
    return [t.full_tensor() if hasattr(t, "full_tensor") else t for t in tensors]


def train(method, split=lambda net: net, rows=slice(0, N), divisor=N, **options):
    """Some steps on ``rows`` of each batch: parameters, every step's weights and norms, the last noise scale."""
    net = split(network(options.pop("norm", "group")))
    model = engm.GradNormModule(net, **options)
    opt = METHODS[method](model, sgd(model))
    weights, norms = [], []
    for step in range(STEPS):
        x, y = (t[rows].clone() for t in batch(N, seed=step))
        x.requires_grad_()
        opt.zero_grad()
        losses = losses_of(model, x, y)
        norms.append(engm.per_example_grad_norms(model, losses))
        (opt.reweight(losses, x).sum() / divisor).backward()
        noise = opt.gradient_noise_scale() if method == "engm" else torch.zeros(())
        opt.step()
        weights.append(opt.stats.weights)
    for part in net.modules():
        if hasattr(part, "reshard"):
            part.reshard()
    return {
        "parameters": whole(p.detach() for p in model.parameters()),
        "weights": weights,
        "norms": norms,
        "noise": noise,
        "shared": [getattr(opt, key, torch.zeros(())) for key in ("gamma", "grad_norm")],
    }


def calibrated(rank):
    """Batch norm: factors, and the norms that they were taken from, with 5 and 3 examples."""
    model = engm.GradNormModule(sharded(network("batch")), calibrate_every=1, calibrate_examples=4)
    opt = engm.ENGM(model, sgd(model), 5.0)
    found = []
    for step in range(STEPS):
        x, y = (t[rows_of(rank, "uneven")] for t in batch(N, seed=step))
        losses = losses_of(model, x, y)
        parts = [losses[i % len(y)] for i in range(5)]  # every rank takes part in as many backward passes
        exact = per_example_gradients(parts, dict(model.trainable_parameters())).squared_norms
        own = measure_graph(planned_losses(model, losses), losses, "corrected")
        opt.zero_grad()
        opt.reweight(losses).mean().backward()
        opt.step()
        (entry,) = model.calibration.state_dict()["factors"]
        generator = torch.Generator().manual_seed(step)
        found.append(
            {
                "factors": entry["values"],
                "drawn": torch.randperm(len(y), generator=generator)[:4].sort().values,
                "exact": torch.stack(list(exact.values()))[:, : len(y)],
                "measured": own.stacked,
                "norms": opt.stats.norms,
            }
        )
    return found


def traffic(rank, reshard):
    """How often parts were gathered and gradients scattered: forwards, by ``reweight``, and in the update's pass."""
    model = engm.GradNormModule(sharded(network("group"), reshard))
    opt = engm.ENGM(model, sgd(model), 5.0)
    torch_calls = "torch.distributed.fsdp._fully_shard._fsdp_param_group"
    with (
        mock.patch(f"{torch_calls}.foreach_all_gather", wraps=_fsdp_param_group.foreach_all_gather) as gathers,
        mock.patch(f"{torch_calls}.foreach_reduce", wraps=_fsdp_param_group.foreach_reduce) as scatters,
    ):
        for step in range(2):  # the first one checks the structure besides
            x, y = (t[rows_of(rank, "even")] for t in batch(N, seed=step))
            counts = [(gathers.call_count, scatters.call_count)]
            losses = losses_of(model, x, y)
            counts.append((gathers.call_count, scatters.call_count))
            mean = opt.reweight(losses).mean()
            counts.append((gathers.call_count, scatters.call_count))
            mean.backward()
            counts.append((gathers.call_count, scatters.call_count))
            opt.step()
            opt.zero_grad()
    return [[after - before for before, after in zip(*pair, strict=True)] for pair in itertools.pairwise(counts)]


def refused(rank):
    """What each refusal says, and whether gradients came of the call."""
    model = engm.GradNormModule(sharded(network("group")))
    x, y = batch(4)
    found = {}
    for method in ("engm", "msgd"):
        opt = METHODS[method](model, sgd(model))
        found[method] = words(RuntimeError, lambda opt=opt: opt.backward(losses_of(model, x, y)))
    found["untouched"] = all(p.grad is None for p in model.parameters())
    found["exact"] = words(ValueError, lambda: engm.GradNormModule(sharded(network("batch")), batch_norm="exact"))
    mesh = init_device_mesh("cpu", (RANKS, 1), mesh_dim_names=("copies", "shards"))
    found["mesh"] = words(ValueError, lambda: engm.GradNormModule(sharded(network("group"), mesh=mesh)))
    mesh = init_device_mesh("cpu", (RANKS,))
    found["wrapper"] = words(TypeError, lambda: fully_shard(engm.GradNormModule(network("group")), mesh=mesh))
    late = engm.GradNormModule(network("group"))
    fully_shard(late.unwrap()[0], mesh=mesh)
    found["late"] = words(RuntimeError, lambda: losses_of(late, x, y))
    return found


def words(kind, call):
    with pytest.raises(kind) as caught:
        call()
    return str(caught.value)


class Tied(nn.Module):
    """Layers within a layer, one of them called twice, and one that is not called."""

    def __init__(self):
        super().__init__()
        self.first, self.spare, self.last = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 5)

    def forward(self, x):
        x = x.flatten(1)[:, :6]
        return self.last(self.first(torch.tanh(self.first(x))))


def tied(rank):
    """Norms and gradients of a network with one sharded part inside another, after a pass without gradients."""
    torch.manual_seed(0)
    net = Tied().double()
    mesh = init_device_mesh("cpu", (RANKS,))
    fully_shard(net.first, mesh=mesh)
    fully_shard(net, mesh=mesh)
    with torch.no_grad():
        net(batch(4)[0])
    model = engm.GradNormModule(net)
    opt = engm.ENGM(model, sgd(model), 1.0)
    x, y = (t[rows_of(rank, "even")] for t in batch(N))
    opt.reweight(losses_of(model, x, y)).mean().backward()
    return {
        "norms": opt.stats.norms,
        "gradients": [None if p.grad is None else p.grad.full_tensor() for p in model.parameters()],
    }


def stopping(rank, split=lambda net: net):
    """Examples of an attack that stops, and their norms; those of the first process stop at once, no others do."""
    net, like = split(network("group")), batch(N)[0]
    model = engm.GradNormModule(net)
    x = torch.rand(like.shape, generator=torch.Generator().manual_seed(3)).to(like)
    with torch.no_grad():
        y = net(x).argmax(dim=1)
    y[: N // 2] = (y[: N // 2] + 1) % 5
    rows = slice(0, N) if rank is None else rows_of(rank, "even")
    attack = PGD(1e-3, 1e-4, 3, random_start=False, stop_when_broken=True)
    found = attack(model, x[rows], y[rows], measure=True)
    return {"inputs": found.inputs, "norms": found.measurement.norms, "plain": attack(net, x[rows], y[rows]).inputs}


def work(rank, port, results):
    with process_group(rank, port, RANKS):
        found = {
            (method, split): train(method, sharded, rows_of(rank, split), N / RANKS)
            for method in METHODS
            for split in (SPLITS if method in ("engm", "aengm") else ("even",))
        }
        for name, reshard in RESHARD.items():
            found["reshard", name] = train(
                "engm", lambda net, r=reshard: sharded(net, r), rows_of(rank, "even"), N / RANKS
            )
        found["one part"] = train("engm", lambda net: sharded(net, layers=False), rows_of(rank, "even"), N / RANKS)
        found["calibrated"] = calibrated(rank)
        found["refused"] = refused(rank)
        found["tied"] = tied(rank)
        found["stopping"] = stopping(rank, sharded)
        found["traffic"] = {name: traffic(rank, RESHARD[name]) for name in ("always", "never")}
        torch.save(found, results / f"{rank}.pt")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each of the processes found."""
    return found_by(work, RANKS, tmp_path_factory.mktemp("ranks"))


@pytest.fixture(scope="module")
def alone():
    """What one process finds on whole batches."""
    return {method: train(method) for method in METHODS}


def check(ranks, key, one):
    found = [rank[key] for rank in ranks]
    for each in found:
        assert_close(each["parameters"], one["parameters"])
        assert_close(each["shared"], one["shared"])
    for name in ("weights", "norms"):
        assert_close([torch.cat(step) for step in zip(*(each[name] for each in found), strict=True)], one[name])


class TestTwoProcessesAreOne:
    @pytest.mark.parametrize("method", METHODS)
    def test_with_every_method(self, ranks, alone, method):
        check(ranks, (method, "even"), alone[method])

    @pytest.mark.parametrize("method", ["engm", "aengm"])
    @pytest.mark.parametrize("split", ["uneven", "single"])
    def test_with_unequally_many_examples(self, ranks, alone, method, split):
        check(ranks, (method, split), alone[method])

    @pytest.mark.parametrize("name", RESHARD)
    def test_whenever_parameters_are_let_go(self, ranks, alone, name):
        check(ranks, ("reshard", name), alone["engm"])

    def test_split_as_one_part(self, ranks, alone):
        check(ranks, "one part", alone["engm"])

    def test_attacks_that_stop(self, ranks):
        one = stopping(None)
        for name, expected in one.items():
            assert_close(torch.cat([rank["stopping"][name] for rank in ranks]), expected)

    def test_noise_scale(self, ranks, alone):
        for rank in ranks:
            assert_close(rank["engm", "even"]["noise"], alone["engm"]["noise"])

    def test_something_was_clipped(self, alone):
        for method in ("engm", "auto", "nengm", "aengm"):
            weights = torch.cat(alone[method]["weights"])
            assert 0 < int((weights < 1).sum()) < len(weights)


def test_a_part_in_a_part_and_layers_called_twice_or_never(ranks):
    torch.manual_seed(0)
    model = engm.GradNormModule(Tied().double())
    opt = engm.ENGM(model, sgd(model), 1.0)
    opt.reweight(losses_of(model, *batch(N))).mean().backward()
    assert_close(torch.cat([rank["tied"]["norms"] for rank in ranks]), opt.stats.norms)
    for rank in ranks:
        for p, gradient in zip(model.parameters(), rank["tied"]["gradients"], strict=True):
            assert (gradient is None) == (p.grad is None)
            assert gradient is None or assert_close(gradient, p.grad) is None


def test_the_norm_pass_gathers_every_part_once_and_reduces_nothing(ranks):
    for rank in ranks:
        assert rank["traffic"]["always"] == [[5, 0], [5, 0], [5, 5]]
        assert rank["traffic"]["never"] == [[5, 0], [0, 0], [5, 5]]


def test_calibration_factors_are_of_the_probes_of_all_ranks(ranks):
    for entries in zip(*(rank["calibrated"] for rank in ranks), strict=True):
        exact, measured = (torch.cat([e[key][:, e["drawn"]] for e in entries], 1) for key in ("exact", "measured"))
        assert exact.shape[1] == 4 + 3, "as many as are asked for, or as there are"
        share = 1 / exact.sum(0)
        expected = (exact * share).sum(1) / (measured * share).sum(1)
        kept = measured.sum(1) > 1e-20 * measured.sum()  # a bias behind a batch norm, corrected, is 0 and noise
        for entry in entries:
            assert_close(entry["factors"][kept], expected[kept])
            assert_close(entry["norms"], (entry["measured"] * entry["factors"].unsqueeze(1)).sum(0).sqrt())
        assert_same(entries[0]["factors"], entries[1]["factors"])


@pytest.mark.parametrize(
    ("case", "said"),
    [
        ("engm", "opt.reweight(losses).mean().backward()"),
        ("msgd", "opt.reweight(losses).mean().backward()"),
        ("exact", "Leave it at 'calibrated'"),
        ("mesh", "one-dimensional mesh"),
        ("wrapper", "shard first, then wrap: fully_shard(layer)"),
        ("late", "after it was wrapped: shard first, then wrap"),
    ],
)
def test_what_cannot_be_is_one_clear_error(ranks, case, said):
    for rank in ranks:
        assert said in rank["refused"][case]
        assert rank["refused"]["untouched"]
