"""Factors per parameter tensor, and when they are taken afresh."""

import pytest
import torch
from oracle import random_losses, relative, tensor, trained
from torch import nn

import engm
from engm.backward.norms import calibrated_squared_norms, measure_graph
from engm.backward.prepare import planned_losses
from engm.batch_norm.calibration import Calibration
from engm.batch_norm.factors import FactorKey
from engm.batch_norm.probe import ExactSample
from engm.exact import exact_squared_norms

pytestmark = pytest.mark.torch_insides

NAMED = [("a", nn.Parameter(tensor(3))), ("b", nn.Parameter(tensor(2)))]


def independent_losses(n=8):
    """Losses ``i * sum(a)``: the squared norm of example ``i`` is ``3 i^2`` over ``a`` and 0 over ``b``."""
    (_, a), _ = NAMED
    return (a * torch.arange(n, dtype=torch.float64).unsqueeze(1)).sum(1)


def counted(calibration):
    """A list that grows with every probe of ``calibration``."""
    draws = []
    original = calibration.sample.draw
    calibration.sample.draw = lambda *args: draws.append(1) or original(*args)
    return draws


def test_factor_is_the_ratio_of_sums_in_which_every_example_counts_alike():
    losses = independent_losses()
    measured = torch.stack([2.0 * torch.arange(8.0).double(), torch.zeros(8).double()])
    factors = Calibration(50, 8).factors(FactorKey("m", False), measured, losses, NAMED, count=True)
    exact = 3 * torch.arange(8).double().square()  # of the first example: 0, which leaves it out
    assert relative(factors[0], 7 / (measured[0] / exact)[1:].sum()) <= 1e-12


def test_zero_against_something_gives_0_and_zero_against_zero_gives_1():
    losses = independent_losses()
    measured = torch.ones(2, 8).double()
    assert Calibration(50, 4).factors(FactorKey("m", False), measured, losses, NAMED, count=True)[1] == 0
    measured[1] = 0
    assert Calibration(50, 4).factors(FactorKey("m", False), measured, losses, NAMED, count=True)[1] == 1


def test_factors_that_are_not_finite_fall_back_on_the_old():
    losses = independent_losses()
    calibration = Calibration(1, 8)
    good = calibration.factors(FactorKey("m", False), torch.full((2, 8), 2.0).double(), losses, NAMED, count=True)
    calibration.advance()
    bad = calibration.factors(
        FactorKey("m", False), torch.full((2, 8), float("nan")).double(), losses, NAMED, count=True
    )
    assert torch.equal(good, bad)
    again = calibration.factors(FactorKey("m", False), torch.full((2, 8), 4.0).double(), losses, NAMED, count=True)
    assert relative(2 * again[0], good[0]) <= 1e-12, "and tries again at once"
    first = Calibration(1, 8).factors(
        FactorKey("m", False), torch.full((2, 8), float("nan")).double(), losses, NAMED, count=True
    )
    assert bool((first == 1).all())


@pytest.mark.parametrize("every", [1, 3])
def test_probed_every_few_training_steps(every):
    calibration = Calibration(every, 4)
    draws = counted(calibration)
    losses, measured = independent_losses(), torch.ones(2, 8).double()
    when = []
    for _step in range(7):
        before = len(draws)
        calibration.factors(FactorKey("m", False), measured, losses, NAMED, count=True)
        calibration.advance()
        when.append(len(draws) > before)
    assert when == [step % every == 0 for step in range(7)]


def test_calls_that_do_not_count_leave_the_clock_alone():
    calibration = Calibration(2, 4)
    draws = counted(calibration)
    losses, measured = independent_losses(), torch.ones(2, 8).double()
    for _ in range(5):
        calibration.factors(FactorKey("m", False), measured, losses, NAMED, count=False)
    assert len(draws) == 1, "on first use, if need be"
    for _ in range(3):
        calibration.advance()
    calibration.factors(FactorKey("m", False), measured, losses, NAMED, count=False)
    assert len(draws) == 1, "any factors will do"
    calibration.factors(FactorKey("m", False), measured, losses, NAMED, count=True)
    assert len(draws) == 2, "three steps old, and two are the limit"


def test_steps_without_norms_age_the_factors_too():
    calibration = Calibration(3, 4)
    draws = counted(calibration)
    losses, measured = independent_losses(), torch.ones(2, 8).double()
    for step in range(10):
        if step % 2 == 0:
            calibration.factors(FactorKey("m", False), measured, losses, NAMED, count=True)
        calibration.advance()
    assert len(draws) == 3, "at steps 0, 4 and 8"


def test_fresh_factors_are_taken_whole():
    calibration = Calibration(1, 8)
    losses = independent_losses()
    first = calibration.factors(FactorKey("m", False), torch.ones(2, 8).double(), losses, NAMED, count=True)
    calibration.advance()
    second = calibration.factors(FactorKey("m", False), torch.full((2, 8), 4.0).double(), losses, NAMED, count=True)
    assert relative(second[0], first[0] / 4) <= 1e-12


def test_each_mode_has_its_own():
    calibration = Calibration(50, 8)
    losses = independent_losses()
    one = calibration.factors(FactorKey("one", False), torch.ones(2, 8).double(), losses, NAMED, count=True)
    two = calibration.factors(FactorKey("two", False), torch.full((2, 8), 2.0).double(), losses, NAMED, count=True)
    assert relative(one[0], 2 * two[0]) <= 1e-12
    assert torch.equal(
        calibration.factors(FactorKey("one", False), torch.ones(2, 8).double(), losses, NAMED, count=True), one
    )


def test_factors_belong_to_names():
    """Layers were frozen, thawed or added: rows no longer mean the same tensors, and known tensors keep theirs."""
    calibration, key = Calibration(50, 8), FactorKey("m", False)
    draws = counted(calibration)
    losses, measured = independent_losses(), torch.tensor([2.0, 5.0]).double().unsqueeze(1).expand(2, 8)
    both = calibration.factors(key, measured, losses, NAMED, count=True)
    for rows in ([0], [1], [1, 0], [0, 1]):
        found = calibration.factors(key, measured[rows], losses, [NAMED[row] for row in rows], count=True)
        assert torch.equal(found, both[rows])
    assert len(draws) == 1
    named = [("new", nn.Parameter(tensor(3))), *NAMED]
    found = calibration.factors(key, torch.ones(3, 8).double(), losses, named, count=True)
    assert len(draws) == 2
    assert found[0] == 0
    assert relative(found[1], 2 * both[0]) <= 1e-12, "all that have gradients are taken at once"


class TestTensorsWithoutGradients:
    """Factors are of the steps that reached a tensor, and one that has none is calibrated when it is reached."""

    def of(self, calibration, *measured, count=True):
        """Factors where the exact squared norms are 3 and 2 times the squares of 1, 2, ... and these were measured."""
        (_, a), (_, b) = NAMED
        reached = [m > 0 for m in measured]
        losses = ((a.sum() * reached[0] + b.sum() * reached[1]) * torch.arange(1.0, 9.0).double()).view(8)
        squares = torch.arange(1.0, 9.0).double().square()
        rows = torch.stack([m * squares for m in measured])
        return calibration.factors(FactorKey("m", False), rows, losses, NAMED, count=count).tolist()

    def test_two_branches_in_turn(self):
        calibration = Calibration(8, 8)
        draws, when = counted(calibration), []
        for step in range(20):
            found = self.of(calibration, *((1.0, 0.0) if step % 2 else (0.0, 4.0)))
            assert found == pytest.approx([3.0 if step else 1.0, 0.5])
            when.append(len(draws))
            calibration.advance()
        assert when == [1] + [2] * 7 + [3] + [4] * 7 + [5] + [6] * 3

    def test_a_block_that_begins_at_0(self):
        calibration = Calibration(50, 8)
        draws = counted(calibration)
        assert self.of(calibration, 0.0, 1.0) == pytest.approx([1, 2])
        calibration.advance()
        for _ in range(5):
            assert self.of(calibration, 6.0, 1.0) == pytest.approx([0.5, 2])
            calibration.advance()
        assert len(draws) == 2

    def test_never(self):
        calibration = Calibration(4, 8)
        draws = counted(calibration)
        for _ in range(8):
            self.of(calibration, 0.0, 1.0)
            calibration.advance()
        assert len(draws) == 2
        assert calibration.missing() == ((FactorKey("m", False), ("a",)),)

    def test_who_only_looks(self):
        calibration = Calibration(1, 8)
        draws = counted(calibration)
        for measured in ((0.0, 1.0), (0.0, 2.0), (1.0, 1.0), (2.0, 2.0)):
            self.of(calibration, *measured, count=False)
            calibration.advance()
        assert len(draws) == 2

    def test_resumed(self):
        calibration, again = Calibration(8, 8), Calibration(8, 8)
        self.of(calibration, 0.0, 1.0)
        calibration.advance()
        again.load_state_dict(calibration.state_dict())
        assert again.missing() == calibration.missing()
        assert self.of(again, 6.0, 1.0) == self.of(calibration, 6.0, 1.0)
        assert again.state_dict()["factors"][0]["taken"] == calibration.state_dict()["factors"][0]["taken"] == [1, 1]


def test_the_last_batch_of_an_epoch_leaves_factors_to_the_next():
    calibration, key, when = Calibration(4, 8), FactorKey("m", False), []
    draws = counted(calibration)
    for n in (8, 8, 8, 8, 3, 8, 8, 8, 8, 3, 3, 3, 3, 3, 4):
        before = len(draws)
        calibration.factors(key, torch.ones(2, n).double(), independent_losses(n), NAMED, count=True)
        calibration.advance()
        when.append(len(draws) - before)
    assert when == [1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 1, 0]


class TestExamplesWithoutGradients:
    def factors(self, calibration, scales, measured):
        (_, a), _ = NAMED
        losses = (a.sum() * scales).view(-1)
        return calibration.factors(FactorKey("frozen", True), measured.unsqueeze(0), losses, NAMED[:1], count=True)

    def test_are_neither_drawn_nor_judged(self):
        torch.manual_seed(0)
        silent = torch.arange(64) % 8 != 0
        scales = (torch.rand(64).double() + 0.5).masked_fill(silent, 0)
        measured = 3 * scales.square() * (1 + torch.rand(64).double())
        some, all_of_them = Calibration(50, 8), Calibration(50, 8)
        found = self.factors(some, scales, measured)
        assert torch.equal(found, self.factors(all_of_them, scales[~silent], measured[~silent]))
        (error,), (same) = some.judged_errors().values(), all_of_them.judged_errors()[FactorKey("frozen", True)]
        assert error == same > 0.02

    def test_alone_say_nothing(self):
        calibration, zeros = Calibration(50, 8), torch.zeros(16).double()
        draws = counted(calibration)
        assert self.factors(calibration, zeros, zeros) == 1
        assert not draws
        scales = torch.arange(1.0, 17.0).double()
        assert self.factors(calibration, scales, scales.square()).item() == pytest.approx(3)

    def test_one_example_with_a_gradient_judges_nothing(self):
        scales = torch.zeros(16).double()
        scales[3] = 1
        calibration = Calibration(50, 8)
        self.factors(calibration, scales, scales)
        assert calibration.judged_errors() == {}
        assert not calibration.faithful(FactorKey("frozen", True))


def test_draws_depend_on_seed_and_number_alone():
    losses = independent_losses(100)
    torch.manual_seed(3)
    state = torch.get_rng_state()
    parameters = [parameter for _, parameter in NAMED]
    first = [ExactSample(16).draw(losses, parameters)[0] for _ in range(2)]
    assert torch.equal(first[0], first[1])
    assert torch.equal(torch.get_rng_state(), state), "the user's random numbers are not touched"
    probe = ExactSample(16)
    a, b = (probe.draw(losses, parameters)[0] for _ in range(2))
    assert not torch.equal(a, b)
    assert a.shape == (16,)
    assert len(set(a.tolist())) == 16
    assert not torch.equal(ExactSample(16, seed=1).draw(losses, parameters)[0], a)
    assert ExactSample(16).draw(independent_losses(5), parameters)[0].tolist() == [0, 1, 2, 3, 4]


def test_state_dict_resumes():
    losses, measured = independent_losses(40), torch.rand(2, 40).double()
    ours = Calibration(3, 4)
    for _ in range(4):
        ours.factors(FactorKey("m", False), measured, losses, NAMED, count=True)
        ours.advance()
    other = Calibration(3, 4)
    other.load_state_dict(ours.state_dict())
    for _ in range(5):
        ours.advance()
        other.advance()
        measured = measured * 1.1
        expected = ours.factors(FactorKey("m", False), measured, losses, NAMED, count=True)
        assert torch.equal(other.factors(FactorKey("m", False), measured, losses, NAMED, count=True), expected)
    assert other.sample.draws == ours.sample.draws


def test_state_is_a_copy():
    calibration = Calibration(1, 8)
    losses = independent_losses()
    calibration.factors(FactorKey("m", False), torch.ones(2, 8).double(), losses, NAMED, count=True)
    kept = calibration.state_dict()
    before = kept["factors"][0]["values"].clone()
    calibration.advance()
    calibration.factors(FactorKey("m", False), torch.full((2, 8), 5.0).double(), losses, NAMED, count=True)
    assert torch.equal(kept["factors"][0]["values"], before)


class TestOnANetwork:
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(32, 4),
    ).double()

    def parts(self, n=32, **options):
        model = engm.GradNormModule(self.net, **options)
        losses = random_losses(model(tensor(n, 3, 8, 8)))
        graph = planned_losses(model, losses)
        return model, losses, graph, measure_graph(graph, losses, "corrected")

    def test_calibrated_tensors_have_the_exact_mean_share_over_the_probe(self):
        model, losses, traced, measured = self.parts(n=16)
        stacked, factors = calibrated_squared_norms(model, traced, losses, measured, borrowed=False, count=False)
        exact = exact_squared_norms(losses, list(trained(self.net).values()))
        bias_behind_batch_norm = list(measured.names).index("3.bias")
        assert exact[bias_behind_batch_norm].max() < 1e-20
        assert measured.stacked[bias_behind_batch_norm].max() < 1e-20, "the correction leaves nothing to calibrate"
        kept = [k for k in range(len(measured.names)) if k != bias_behind_batch_norm]
        whole = exact.sum(0)
        mapped = (stacked * factors.unsqueeze(1) / whole).sum(1)
        assert relative(mapped[kept], (exact / whole).sum(1)[kept]) <= 1e-9

    def test_nearer_to_the_exact_norms_than_raw_ones(self):
        model, losses, *_ = self.parts()
        exact = engm.naive_grad_norms(model, losses)
        raw = engm.measure(model, losses).norms
        error = [((found - exact).abs() / exact).mean() for found in (engm.per_example_grad_norms(model, losses), raw)]
        assert error[0] < 0.03 < error[1]

    @pytest.mark.parametrize("batch_norm", ["frozen", "exact"])
    def test_only_where_it_is_asked_for(self, batch_norm):
        model, losses, *_ = self.parts(batch_norm=batch_norm)
        engm.per_example_grad_norms(model, losses)
        assert model.calibration.sample.draws == 0

    def test_not_in_evaluation_mode(self):
        model = engm.GradNormModule(self.net.eval())
        try:
            engm.per_example_grad_norms(model, random_losses(model(tensor(4, 3, 8, 8))))
            assert model.calibration.sample.draws == 0
        finally:
            self.net.train()

    def test_the_probe_forwards_nothing(self):
        model, losses, *_ = self.parts()
        before = int(self.net[1].num_batches_tracked)
        engm.per_example_grad_norms(model, losses)
        assert model.calibration.sample.draws == 1
        assert int(self.net[1].num_batches_tracked) == before


def test_a_young_network_is_probed_more_often():
    calibration = Calibration(50, 4)
    parameters = [("w", torch.ones(3, requires_grad=True))]
    when = []
    for step in range(150):
        losses = parameters[0][1].sum() * torch.arange(1.0, 5.0)
        before = calibration.sample.draws
        calibration.factors(FactorKey("frozen", False), torch.ones(1, 4), losses, parameters, count=True)
        when += [step] * (calibration.sample.draws - before)
        calibration.advance()
    assert when == [0, 6, 18, 42, 90, 140]


@pytest.mark.parametrize(("own", "shared", "expected"), [(3, 5, 2.0), (5, 3, 1.0), (4, 4, 2.0)])
def test_who_only_looks_gets_the_latest_factors_of_this_rank_or_of_all(own, shared, expected):
    names, losses, measured = ["a", "b"], independent_losses(), torch.ones(2, 8).double()
    calibration = Calibration(50, 4)
    key = {"mode": "m", "borrowed": False, "names": names, "good_for": 50}
    factors = [
        {**key, "all_ranks": False, "values": torch.ones(2).double(), "taken": own},
        {**key, "all_ranks": True, "values": torch.full((2,), 2.0).double(), "taken": shared},
    ]
    calibration.load_state_dict({"draws": 1, "shared_draws": 1, "steps": 6, "factors": factors})
    assert bool((calibration.factors(FactorKey("m", False), measured, losses, NAMED, count=False) == expected).all())
    assert bool((calibration.factors(FactorKey("m", False), measured, losses, NAMED, count=True) == 1).all()), (
        "a step without DDP"
    )
    factors[1]["names"] = ["b", "c"]
    calibration.load_state_dict({"draws": 1, "shared_draws": 1, "steps": 6, "factors": factors})
    assert bool((calibration.factors(FactorKey("m", False), measured, losses, NAMED, count=False) == 1).all()), (
        "of other parameters"
    )
    assert calibration.sample.draws == calibration.shared_sample.draws == 1


def test_of_a_tensor_that_few_examples_reach_one_is_drawn():
    """Else the next step would have to calibrate again, until one is drawn by chance."""
    (_, a), (_, b) = NAMED
    for seed in range(20):
        rare = torch.zeros(500).double()
        rare[torch.randperm(500, generator=torch.Generator().manual_seed(seed))[0]] = 1
        losses = a.sum() * torch.arange(1.0, 501.0).double() + b.sum() * rare
        measured = torch.stack([torch.arange(1.0, 501.0).double().square(), 4 * rare])
        calibration, key = Calibration(50, 4), FactorKey("m", False)
        factors = calibration.factors(key, measured, losses, NAMED, count=True)
        assert factors.tolist() == pytest.approx([3, 0.5])
        assert calibration.missing() == ((key, ()),)
        calibration.factors(key, measured, losses, NAMED, count=True)
        assert calibration.sample.draws == 1


@pytest.mark.parametrize("examples", [1, 2, 4])
def test_rare_tensors_do_not_draw_an_example_twice(examples):
    generator = torch.Generator().manual_seed(examples)
    losses = independent_losses(30)
    for _ in range(50):
        covered = torch.rand(6, 30, generator=generator) < 0.1
        found = ExactSample(examples).draw(losses, [NAMED[0][1]], covered=covered)[0].tolist()
        assert len(set(found)) == len(found) == examples
        if examples == 4:
            several = ExactSample(6).draw(losses, [NAMED[0][1]], covered=covered)[0]
            assert all(bool(row[several].any()) for row in covered if bool(row.any()))
