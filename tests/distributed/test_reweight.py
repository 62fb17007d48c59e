"""Two gloo processes: ``DistributedDataParallel(engm.GradNormModule(net))`` by ``reweight``.

Processes are slow to start, so they are started once and work through everything; the tests look at what they found.
"""

from __future__ import annotations

from math import inf
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from oracle import per_example_gradients, trained
from processes import found_by, process_group
from torch.nn.parallel import DistributedDataParallel
from training import assert_close, assert_same, batch, losses_of, network, sgd

import engm
from engm.backward.norms import measure_graph, own_mode
from engm.backward.prepare import planned_losses
from engm.batch_norm.factors import FactorKey
from engm.distributed import Ranks, gathered
from engm.optim.aengm import fit_line

N, RANKS, STEPS = 8, 2, 4
SPLITS = {"even": (4, 4), "uneven": (5, 3), "single": (1, 7)}
METHODS = {
    "engm": lambda model, inner: engm.ENGM(model, inner, 5.0),
    "nengm": lambda model, inner: engm.NENGM(model, inner, 0.45),
    "aengm": lambda model, inner: engm.AENGM(model, inner, 6.0, tau=2),
    "auto": lambda model, inner: engm.ENGM(model, inner, "auto", clip_fraction=0.3),
    "fengm": engm.FENGM,
    "gnc": lambda model, inner: engm.GNC(model, inner, 1.0),
    "sngm": engm.SNGM,
    "msgd": engm.MSGD,
}
SHARED = ("gamma", "r_squared", "fits", "failed_fits", "quantile", "grad_norm")
FITS = 24

pytestmark = [
    pytest.mark.skipif(not dist.is_gloo_available(), reason="torch was built without gloo"),
    pytest.mark.torch_insides,
]


def rows_of(rank, split):
    start = sum(SPLITS[split][:rank])
    return slice(start, start + SPLITS[split][rank])


def train(method, wrap, rows=slice(0, N), ranks=1, norm="group"):
    """Some steps on ``rows`` of each batch: the parameters, every step's weights, and what all ranks share."""
    model = wrap(engm.GradNormModule(network(norm)))
    opt = METHODS[method](model, sgd(model))
    weights = []
    for step in range(STEPS):
        x, y = (t[rows].clone() for t in batch(N, seed=step))
        x.requires_grad_()
        opt.zero_grad()
        share = ranks * len(y) / N if ranks > 1 else 1.0  # DDP averages over the ranks: 1 unless n differs
        (opt.reweight(losses_of(model, x, y), x).mean() * share).backward()
        opt.step()
        weights.append(opt.stats.weights)
    found = {key: getattr(opt, key) for key in SHARED if getattr(opt, key, None) is not None}
    if "quantile" in found:
        found["quantile"] = found["quantile"].value
    return {"parameters": [p.detach() for p in model.parameters()], "weights": torch.stack(weights), "shared": found}


def calibrated(rank, *, borrowed):
    """Every step's factors, norms and weights, and (where the step probed) both kinds of squared norms of its probe."""
    model = DistributedDataParallel(
        engm.GradNormModule(network("batch"), calibrate_every=2, calibrate_examples=4)  # rank 1 has 3
    )
    wrapped = model.module
    wrapped.calibration.most_error = inf  # borrowed norms are used as they are, however far off
    opt = engm.ENGM(model, sgd(model), 5.0)
    drawn, draw = [], wrapped.calibration.shared_sample.draw

    def noted(*args):
        drawn.append(draw(*args))
        return drawn[-1]

    wrapped.calibration.shared_sample.draw = noted
    found = []
    for step in range(STEPS):
        x, y = (t[rows_of(rank, "uneven")] for t in batch(N, seed=step))
        measurement = None
        if borrowed:
            wrapped.eval()
            measurement = engm.measure(wrapped, losses_of(wrapped, x, y))
            wrapped.train()
        losses = losses_of(model, x, y)
        exact = torch.stack(list(per_example_gradients(losses, trained(model)).squared_norms.values()), 1)
        graph = planned_losses(wrapped, losses)
        own = measurement or measure_graph(graph, losses, own_mode(wrapped, graph))
        before = len(drawn)
        opt.zero_grad()
        opt.reweight(losses, measurement=measurement).mean().backward()
        opt.step()
        entry, *others = wrapped.calibration.state_dict()["factors"]
        mode = tuple(entry[key] for key in FactorKey._fields)
        entry = {"mode": mode, "others": len(others), "factors": entry["values"], "norms": opt.stats.norms}
        entry |= {"squared_norms": own.stacked, "error": wrapped.calibration.state_dict()["factors"][0]["error"]}
        if len(drawn) > before:
            rows = drawn[-1][0]
            entry["probe"] = [exact.T[:, rows], own.stacked[:, rows]]
        found.append(entry)
    return found


def judged(rank):
    """Where the norms of three steps came from, and the weights, if what is borrowed is always judged too far off."""
    model = DistributedDataParallel(engm.GradNormModule(network("batch"), calibrate_every=2, calibrate_examples=4))
    opt, found = engm.ENGM(model, sgd(model), 5.0), []
    model.module.calibration.most_error = -1.0
    for step in range(3):
        x, y = (t[rows_of(rank, "uneven")] for t in batch(N, seed=step))
        measurement = engm.measure(model.module.eval(), losses_of(model.module, x, y))
        model.train()
        stats = opt.backward(losses_of(model, x, y), measurement=measurement)
        found.append((stats.source, bool(stats.norms.isfinite().all())))
        opt.zero_grad()
    return found


def looking(rank, *, look, resume=False):
    """A-ENGM with batch norm, where rank 0 alone takes norms besides, and all may go on from what rank 0 saved."""

    def make():
        model = DistributedDataParallel(engm.GradNormModule(network("batch"), calibrate_every=2, calibrate_examples=3))
        return model, engm.AENGM(model, sgd(model), 5.0, tau=2)

    model, opt = make()
    found = {"looked": [], "stats": []}
    for step in range(STEPS):
        x, y = (t[rows_of(rank, "even")] for t in batch(N, seed=step))
        if look and rank == 0:  # a forward pass without DDP
            engm.per_example_grad_norms(model, losses_of(model.module, x, y))
        losses = losses_of(model, x, y)
        if look and rank == 0:
            found["looked"].append(engm.per_example_grad_norms(model, losses))
        opt.zero_grad()
        opt.reweight(losses, x).mean().backward()
        opt.step()
        if resume and step == 1:
            saved = [(model.module.state_dict(), opt.state_dict())]
            dist.broadcast_object_list(saved)
            model, opt = make()
            model.module.load_state_dict(saved[0][0])
            opt.load_state_dict(saved[0][1])
    calibration = opt.state_dict()["engm"]["calibration"]
    key = FactorKey("corrected", borrowed=False, all_ranks=True)
    (factors,) = (entry for entry in calibration["factors"] if all(entry[k] == v for k, v in key._asdict().items()))
    found.update(parameters=[p.detach() for p in model.parameters()], gamma=opt.gamma)
    return {**found, "shared": [calibration["shared_draws"], calibration["steps"], factors]}


def broken(rank):
    """State before, after a batch that is not finite on rank 1, and after a good one again."""
    model = DistributedDataParallel(engm.GradNormModule(network("batch"), calibrate_every=8, calibrate_examples=3))
    opt = engm.AENGM(model, sgd(model), 5.0, tau=1)
    found = []
    for step in range(3):
        x, y = (t[rows_of(rank, "even")].clone() for t in batch(N, seed=step))
        if step == 1:
            opt.model.calibration.forget()
            x[0] = torch.nan if rank == 1 else x[0]
        opt.reweight(losses_of(model, x, y), x, check=False)
        found.append(opt.state_dict()["engm"])
    return found


def points(seed):
    """Sizes of the two ranks, and that many points."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(1, 9, (RANKS,), generator=generator).tolist()
    x, y = torch.rand(2, sum(sizes), generator=generator, dtype=torch.float64)
    return sizes, x + 100, y


def fits(rank):
    """Lines through points that lie on two ranks, and the points gathered."""
    found = []
    for seed in range(FITS):
        sizes, x, y = points(seed)
        x, y = x.split(sizes)[rank], y.split(sizes)[rank]
        alike = fit_line(torch.full_like(x, 3.0), y, dist.group.WORLD)[2]
        found.append([*fit_line(x, y, dist.group.WORLD), alike, gathered(dist.group.WORLD, y)])
    return found


def work(rank, port, results):
    with process_group(rank, port, RANKS):
        found = {
            split: {m: train(m, DistributedDataParallel, rows_of(rank, split), RANKS) for m in METHODS}
            for split in SPLITS
        }
        found["calibrated"] = {way: calibrated(rank, borrowed=way == "borrowed") for way in ("own", "borrowed")}
        found["judged"] = judged(rank)
        found["quiet"] = looking(rank, look=False)
        found["looking"] = looking(rank, look=True)
        found["resumed"] = looking(rank, look=True, resume=True)
        found["broken"] = broken(rank)
        found["fits"] = fits(rank)
        if rank == 0:  # no DDP: the others are not asked
            found["alone"] = {m: train(m, lambda model: model, norm="batch") for m in ("aengm", "auto")}
        groups = [dist.new_group([each]) for each in range(RANKS)]
        found["apart"] = {
            m: train(
                m,
                lambda model: DistributedDataParallel(model, process_group=groups[rank]),
                rows_of(rank, "uneven"),
                norm="batch",
            )
            for m in ("aengm", "auto")
        }
        torch.save(found, results / f"{rank}.pt")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each of the processes found."""
    return found_by(work, RANKS, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("method", METHODS)
class TestTwoProcesses:
    @pytest.mark.parametrize("split", SPLITS)
    def test_are_one(self, ranks, method, split):
        one = train(method, lambda model: model)
        found = [rank[split][method] for rank in ranks]
        for each in found:
            assert_close(each["parameters"], one["parameters"])
            assert_close(each["shared"], one["shared"])
        assert_close(torch.cat([each["weights"] for each in found], dim=1), one["weights"])
        assert_same(found[0]["shared"], found[1]["shared"])
        assert_same(found[0]["parameters"], found[1]["parameters"])

    def test_the_method_did_something(self, ranks, method):
        one = train(method, lambda model: model)
        clipped = int((one["weights"] < 1).sum())
        if method in ("msgd", "sngm", "gnc"):
            assert clipped == 0
            assert method == "msgd" or one["shared"]["grad_norm"] > 1
        else:
            assert 0 < clipped < N * STEPS or method == "fengm"
        assert method != "aengm" or int(one["shared"]["fits"]) == STEPS // 2


class TestLine:
    def test_is_through_the_points_of_all_ranks(self, ranks):
        for seed in range(FITS):
            _, x, y = points(seed)
            expected = torch.linalg.lstsq(torch.stack([x - 100, torch.ones_like(x)], 1), y.unsqueeze(1)).solution[:, 0]
            residual = (y - expected[0] * (x - 100) - expected[1]).square().sum()
            r_squared = 1 - residual / (y - y.mean()).square().sum()
            for rank in ranks:
                coefficients, found, usable, alike, _ = rank["fits"][seed]
                assert_close(coefficients[0], expected[0], rtol=1e-8)
                assert_close(coefficients[1] + 100 * coefficients[0], expected[1], rtol=1e-8, atol=1e-8)
                assert_close(found, r_squared, rtol=1e-8, atol=1e-8)
                assert usable
                assert not alike, "one x on all ranks"
            assert_same(ranks[0]["fits"][seed], ranks[1]["fits"][seed])

    def test_gathering_keeps_the_order_of_the_ranks(self, ranks):
        assert {points(seed)[0][0] == points(seed)[0][1] for seed in range(FITS)} == {True, False}
        for seed in range(FITS):
            for rank in ranks:
                assert_same(rank["fits"][seed][4], points(seed)[2])


@pytest.mark.parametrize("way", ["own", "borrowed"])
class TestCalibration:
    def test_factors_are_of_the_probes_of_all_ranks(self, ranks, way):
        steps = list(zip(*(rank["calibrated"][way] for rank in ranks), strict=True))
        for entries in steps:
            if "probe" in entries[0]:
                exact, measured = (torch.cat([entry["probe"][i] for entry in entries], dim=1) for i in (0, 1))
                assert exact.shape[1] == 4 + 3, "as many as there are on rank 1"
                share = 1 / exact.sum(0)
                expected = (exact * share).sum(1) / (measured * share).sum(1)
                kept = measured.sum(1) > 1e-20 * measured.sum()  # a bias behind a batch norm, corrected, is 0 and noise
                assert kept.sum() >= len(kept) - 2
            for entry in entries:
                assert_close(entry["factors"][kept], expected[kept])
                norms = (entry["squared_norms"] * entry["factors"].unsqueeze(1)).sum(0).sqrt()
                assert_close(entry["norms"], norms)
        assert ["probe" in entries[0] for entries in steps] == [step % 2 == 0 for step in range(STEPS)]

    def test_factors_are_the_same_on_all_ranks(self, ranks, way):
        for one, other in zip(*(rank["calibrated"][way] for rank in ranks), strict=True):
            assert_same(one["factors"], other["factors"])
            assert one["mode"] == other["mode"]
            assert one["mode"][1:] == (way != "own", True), "borrowed or not, and of all ranks"
            assert one["others"] == other["others"] == 0


class TestJudgement:
    def test_is_of_the_probes_of_all_ranks(self, ranks):
        judged = 0
        for entries in zip(*(rank["calibrated"]["borrowed"] for rank in ranks), strict=True):
            assert_same(entries[0]["error"], entries[1]["error"])
            if "probe" not in entries[0]:
                continue
            halves = []
            for first in (0, 1):
                exact, measured = (
                    torch.cat([e["probe"][i][:, (first + rank) % 2 :: 2] for rank, e in enumerate(entries)], dim=1)
                    for i in (0, 1)
                )
                halves.append((exact, measured, (exact / exact.sum(0)).sum(1) / (measured / exact.sum(0)).sum(1)))
            errors = [
                (exact.sum(0) / (measured * other[2].unsqueeze(1)).sum(0)).sqrt() - 1
                for (exact, measured, _), other in zip(halves, reversed(halves), strict=True)
            ]
            assert_close(entries[0]["error"], torch.cat(errors).abs().mean())
            judged += 1
        assert judged == (STEPS + 1) // 2

    def test_all_ranks_take_their_own_norms(self, ranks):
        assert [rank["judged"] for rank in ranks] == [[("own", True)] * 3] * 2


class TestOneRankAlone:
    def test_looking_at_norms_changes_nothing(self, ranks):
        for rank in ranks:
            for key in ("parameters", "gamma", "shared"):
                assert_same(rank["looking"][key], rank["quiet"][key], key)
        assert ranks[0]["looking"]["shared"][0] == 2, "at steps 0 and 2"

    def test_before_the_first_step_it_calibrates_on_its_own(self, ranks):
        model = engm.GradNormModule(network("batch"), calibrate_examples=3)
        x, y = (t[rows_of(0, "even")] for t in batch(N))
        expected = engm.per_example_grad_norms(model, losses_of(model, x, y))
        assert_close(ranks[0]["looking"]["looked"][0], expected)

    def test_a_checkpoint_of_rank_0_resumes_all(self, ranks):
        for rank in ranks:
            for key in ("parameters", "gamma", "shared"):
                assert_same(rank["resumed"][key], rank["quiet"][key], key)

    @pytest.mark.parametrize("method", ["aengm", "auto"])
    def test_without_ddp_nobody_else_is_asked(self, ranks, method):
        one = train(method, lambda model: model, norm="batch")
        assert_close(ranks[0]["alone"][method], one)

    @pytest.mark.parametrize("method", ["aengm", "auto"])
    def test_only_the_ranks_of_the_models_own_group_are_asked(self, ranks, method):
        for number, rank in enumerate(ranks):
            one = train(method, lambda model: model, rows_of(number, "uneven"), norm="batch")
            assert_close(rank["apart"][method], one)


def test_a_batch_that_is_not_finite_on_one_rank_is_so_on_all(ranks):
    before, bad, after = zip(*(rank["broken"] for rank in ranks), strict=True)
    for one, two, three in zip(before, bad, after, strict=True):
        assert_same(two["gamma"], one["gamma"])
        assert [int(state["failed_fits"]) for state in (one, two, three)] == [0, 1, 1]
        assert [int(state["fits"]) for state in (one, two, three)] == [1, 1, 2]
        lifetimes = [set(state["calibration"]["factors"][0]["good_for"]) for state in (one, two, three)]
        assert lifetimes == [{8}, {0}, {8}], "it could not be taken, and was taken at the next step"
        assert bool((two["calibration"]["factors"][0]["values"] == 1).all())
    assert_same(after[0]["gamma"], after[1]["gamma"])
    assert_same(after[0]["calibration"], after[1]["calibration"])


def test_a_group_is_of_the_models_own_forward_passes():
    model, other = (engm.GradNormModule(network("group")) for _ in range(2))
    x, y = batch(4)
    traced = planned_losses(model, losses_of(model, x, y) + losses_of(other, x, y)).trace
    captures = traced.captures
    for capture in captures:
        capture.ranks = Ranks("own" if capture.owner is model else "other's")
    assert traced.ranks.group == "own"
    for capture in captures:
        capture.ranks = None if capture.owner is model else Ranks("other's")
    assert traced.ranks is None


def test_wrapping_the_other_way_round_is_refused():
    class Fake(DistributedDataParallel):
        def __init__(self):
            torch.nn.Module.__init__(self)

    with pytest.raises(TypeError, match=r"DistributedDataParallel\(engm.GradNormModule\(net\)\)"):
        engm.GradNormModule(Fake())


def test_a_static_graph_is_refused():
    model = engm.GradNormModule(network("group"))
    x, _ = batch(4)
    active = SimpleNamespace(static_graph=True, process_group=None)
    with (
        mock.patch.object(DistributedDataParallel, "_active_ddp_module", active),
        pytest.raises(RuntimeError, match="Leave static_graph out"),
    ):
        model(x)
    model(x)
