"""Ranks whose graphs differ: one example, a branch without batch norm, more micro-batches, an error of one's own."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from oracle import per_example_gradients
from processes import found_by, process_group
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from training import assert_close, assert_same, batch, losses_of, network, sgd

import engm
from engm.backward.norms import measure_graph, own_mode
from engm.backward.prepare import planned_losses

RANKS, N, STEPS = 2, 8, 4
METHODS = {
    "engm": lambda model, inner: engm.ENGM(model, inner, 5.0),
    "aengm": lambda model, inner: engm.AENGM(model, inner, 6.0, tau=1),
}
BORROWED = {"nothing": None, "as the step": True, "in evaluation mode": False}

pytestmark = [
    pytest.mark.skipif(not dist.is_gloo_available(), reason="torch was built without gloo"),
    pytest.mark.torch_insides,
]


class Branches(nn.Module):
    """A batch norm that a forward pass may leave out."""

    skips = False

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.last = nn.Linear(108, 6), nn.BatchNorm1d(6), nn.Linear(6, 5)

    def forward(self, x):
        x = self.first(x.flatten(1))
        return self.last(torch.tanh(x if self.skips else self.norm(x)))


def data_parallel(net, **options):
    wrapped = engm.GradNormModule(net, calibrate_every=1, calibrate_examples=4, **options)
    return DistributedDataParallel(wrapped, find_unused_parameters=True)


def blocks(net, reshard=None):
    """A network of which every layer and the batch norm behind it are one part."""
    parts = [nn.Sequential(net[0], net[1]), net[2], nn.Sequential(net[3], net[4]), *net[5:]]
    mesh = init_device_mesh("cpu", (RANKS,))
    for part in parts:
        if next(part.parameters(), None) is not None:
            fully_shard(part, mesh=mesh, reshard_after_forward=reshard)
    return fully_shard(nn.Sequential(*parts), mesh=mesh, reshard_after_forward=reshard)


def layers(net):
    mesh = init_device_mesh("cpu", (RANKS,))
    for layer in net:
        if next(layer.parameters(), None) is not None:
            fully_shard(layer, mesh=mesh)
    return fully_shard(net, mesh=mesh)


def one_alone(rank, step):
    """One example on one rank and the rest on the other, in turn."""
    x, y = batch(N, seed=step)
    rows = slice(0, 1) if (rank + step) % 2 else slice(1, N)
    return x[rows].clone().requires_grad_(), y[rows]


def in_halves(rank, step):
    x, y = batch(N, seed=step)
    return x[rank::RANKS].clone().requires_grad_(), y[rank::RANKS]


def exact_norms(losses, parameters, passes):
    """Norms of the examples' own gradients, of a rank that takes part in so many backward passes."""
    parts = [losses[i % len(losses)] for i in range(passes)]
    return per_example_gradients(parts, parameters).norms[: len(losses)]


def steps(rank, model, share, method="engm", borrowed=None, before=lambda step: None, split=False):
    """Norms of every step, exact ones, and whether the rank's examples are coupled; the factors in the end."""
    opt = METHODS[method](model, sgd(model, lr=0.01))
    wrapped, found = opt.model, []
    if borrowed is not None:
        wrapped.calibration.most_error = -1.0  # what is borrowed is judged and not used
    for step in range(STEPS):
        before(step)
        x, y = share(rank, step)
        measurement = None
        if borrowed is not None:
            wrapped.train(borrowed)
            measurement = engm.measure(wrapped, losses_of(wrapped, x, y), x)
            wrapped.train()
        losses = losses_of(model, x, y)
        exact = exact_norms(losses, dict(wrapped.trainable_parameters()), N if split else len(y))
        coupled = planned_losses(wrapped, losses).plan.couples
        (opt.reweight(losses, x, measurement=measurement).mean() * len(y) * RANKS / N).backward()
        norms = opt.stats.norms if method == "engm" else torch.zeros(())
        found.append({"norms": norms, "exact": exact, "coupled": coupled})
        opt.step()
        opt.zero_grad()
    state = wrapped.calibration.state_dict()
    return {"steps": found, "calibration": state, "fits": getattr(opt, "gamma", torch.zeros(()))}


def branches(rank):
    net = Branches().double()

    def skip(step):
        net.skips = (rank + step) % 2 == 0

    return steps(rank, data_parallel(net), in_halves, before=skip)


def micro_batches(rank):
    """Under ``no_sync`` ranks may have unequally many, with batch norm too; whose rank has none waits for nobody."""
    model = data_parallel(network("batch"))
    opt, found = METHODS["engm"](model, sgd(model, lr=0.01)), []
    for step in range(STEPS):
        with model.no_sync():
            for _ in range(3 * rank):
                opt.backward(losses_of(model, *in_halves(rank, step)))
        opt.backward(losses_of(model, *in_halves(rank, step)))
        opt.step()
        opt.zero_grad()
        found.append([p.detach().clone() for p in model.parameters()])
    calibration = model.module.calibration
    shared = [entry for entry in calibration.state_dict()["factors"] if entry["all_ranks"]]
    return {"parameters": found, "shared": shared, "steps": calibration.steps}


def factors_of(rank, split):
    """One example on one rank: the factors, and the squared norms that they should map."""
    net = network("batch")
    model = engm.GradNormModule(split(net), calibrate_examples=16)
    opt = METHODS["engm"](model, sgd(model))
    x, y = one_alone(rank, 0)
    losses = losses_of(model, x, y)
    parts = [losses[i % len(y)] for i in range(N)]  # every rank takes part in as many backward passes
    exact = per_example_gradients(parts, dict(model.trainable_parameters())).squared_norms
    graph = planned_losses(model, losses)
    measured = measure_graph(graph, losses, own_mode(model, graph)).stacked
    opt.reweight(losses).mean().backward()
    (entry,) = model.calibration.state_dict()["factors"]
    exact = torch.stack(list(exact.values()))[:, : len(y)]
    return {"factors": entry["values"], "exact": exact, "measured": measured, "norms": opt.stats.norms}


def halves(rank, split):
    """Norms of some steps, with the batch in two halves."""
    net = network("batch")
    model = split(net)
    model = model if isinstance(model, DistributedDataParallel) else engm.GradNormModule(model, calibrate_every=2)
    opt, found = METHODS["engm"](model, sgd(model)), []
    for step in range(STEPS):
        opt.reweight(losses_of(model, *in_halves(rank, step))).mean().backward()
        found.append(opt.stats.norms)
        opt.step()
        opt.zero_grad()
    return found


def late_errors(rank):
    """What only one rank finds wrong with its weights or its inputs: what is said, and gradients."""
    found = {}

    def weigh(norms, alpha):
        if rank == 1:
            raise ArithmeticError("no weights today")
        return (alpha / norms).clamp(max=1)

    x, y = in_halves(rank, 0)
    model = DistributedDataParallel(engm.GradNormModule(network("group")))
    calls = {
        "weigh": lambda: engm.ENGM(model, sgd(model), 5.0, weigh=weigh).backward(losses_of(model, x, y)),
        "inputs": lambda: engm.NENGM(model, sgd(model), 5.0).backward(
            losses_of(model, x, y), x.detach().clone().requires_grad_() if rank == 1 else x
        ),
    }
    for name, call in calls.items():
        try:
            call()
        except (RuntimeError, ValueError, ArithmeticError) as error:
            found[name] = str(error)
    found["untouched"] = all(p.grad is None for p in model.parameters())
    engm.ENGM(model, sgd(model), 5.0).backward(losses_of(model, x, y))
    return found


def work(rank, port, results):
    with process_group(rank, port, RANKS):
        found = {
            ("one", method, name): steps(rank, data_parallel(network("batch")), one_alone, method, borrowed)
            for method in METHODS
            for name, borrowed in BORROWED.items()
        }
        for method in METHODS:
            model = engm.GradNormModule(layers(network("batch")), calibrate_every=1, calibrate_examples=4)
            found["one", method, "split"] = steps(rank, model, one_alone, method, split=True)
        found["branches"] = branches(rank)
        found["micro"] = micro_batches(rank)
        found["factors"] = factors_of(rank, layers)
        found["halves"] = {
            "alike": halves(rank, lambda net: DistributedDataParallel(engm.GradNormModule(net, calibrate_every=2))),
            **{
                name: halves(rank, lambda net, r=r: blocks(net, r)) for name, r in (("default", None), ("never", False))
            },
        }
        found["late"] = late_errors(rank)
        torch.save(found, results / f"{rank}.pt")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each of the processes found."""
    return found_by(work, RANKS, tmp_path_factory.mktemp("ranks"))


def check(ranks, key):
    """Uncoupled examples have exact norms, all others such as factors of the same steps give, alike on all ranks."""
    assert_same(ranks[0][key]["calibration"], ranks[1][key]["calibration"])
    assert_same(ranks[0][key]["fits"], ranks[1][key]["fits"])
    coupled = [[step["coupled"] for step in rank[key]["steps"]] for rank in ranks]
    assert coupled == [[step % 2 == turn for step in range(STEPS)] for turn in (1, 0)][:: 1 if coupled[0][1] else -1]
    for rank in ranks:
        for step in rank[key]["steps"]:
            if step["norms"].dim() == 0:  # predicted
                continue
            if not step["coupled"]:
                assert_close(step["norms"], step["exact"])
            else:
                assert ((step["norms"] / step["exact"] - 1).abs() < 0.5).all()


@pytest.mark.parametrize("method", METHODS)
class TestOneExampleOnOneRank:
    @pytest.mark.parametrize("borrowed", BORROWED)
    def test_under_ddp(self, ranks, method, borrowed):
        check(ranks, ("one", method, borrowed))

    def test_under_fully_shard(self, ranks, method):
        check(ranks, ("one", method, "split"))


def test_a_batch_norm_that_one_rank_skips(ranks):
    check(ranks, "branches")


def test_factors_under_fully_shard_are_of_the_coupled_examples_alone(ranks):
    one, other = sorted((rank["factors"] for rank in ranks), key=lambda found: len(found["norms"]))
    assert (len(one["norms"]), len(other["norms"])) == (1, N - 1)
    assert_close(one["norms"], one["exact"].sum(0).sqrt())
    share = 1 / other["exact"].sum(0)
    expected = (other["exact"] * share).sum(1) / (other["measured"] * share).sum(1)
    kept = other["measured"].sum(1) > 1e-20 * other["measured"].sum()  # a bias behind a batch norm is rounding
    for found in (one, other):
        assert_close(found["factors"][kept], expected[kept])
    assert_close(other["norms"], (other["measured"] * other["factors"].unsqueeze(1)).sum(0).sqrt())


def test_unequally_many_micro_batches(ranks):
    assert_same(ranks[0]["micro"], ranks[1]["micro"])
    assert ranks[0]["micro"]["steps"] == STEPS
    (entry,) = ranks[0]["micro"]["shared"]
    assert set(entry["taken"]) == {STEPS - 1}


@pytest.mark.parametrize("reshard", ["default", "never"])
def test_layers_and_their_batch_norms_as_one_part(ranks, reshard):
    for rank in ranks:
        assert_close(rank["halves"][reshard], rank["halves"]["alike"], rtol=1e-7)


@pytest.mark.parametrize(("case", "said"), [("weigh", "no weights today"), ("inputs", "do not depend on inputs")])
def test_an_error_that_one_rank_finds_late(ranks, case, said):
    for rank in ranks:
        assert rank["late"]["untouched"]
        assert said in rank["late"][case]
    assert ranks[0]["late"][case].startswith(f"on rank 1 of {RANKS}, which stops all of them: ")
