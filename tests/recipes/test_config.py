"""Settings: what is settled, what is refused, and that nothing is lost on the way through TOML and the command line."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engm.adversarial import OBJECTIVES
from engm.recipes.cli.options import config_from
from engm.recipes.config import RunConfig, parse_number
from engm.recipes.config_files import from_values, read_toml, to_toml
from engm.recipes.training.schedule import Schedule

floats = st.floats(1e-6, 0.9, allow_subnormal=False)
configs = st.builds(
    RunConfig,
    data=st.sampled_from(["digits", "cifar10", 'odd "name".npz', "ünïcode/päth"]),
    eps=st.none() | floats,
    lr=floats,
    awp=st.booleans(),
    patience=st.none() | st.integers(0, 5),
    epochs=st.integers(1, 300),
    decay_epochs=st.none() | st.lists(st.integers(1, 300), unique=True, max_size=4).map(lambda e: tuple(sorted(e))),
    loggers=st.lists(st.sampled_from(["csv", "json", "tensorboard"]), unique=True).map(tuple),
    optimizer=st.sampled_from(["engm", "a-engm", "mgnc"]),
    alpha=st.sampled_from(["paper", "5.0", "0.25"]),
    objective=st.sampled_from(OBJECTIVES),
    gap_epochs=st.none() | st.just((3, 9)),
    threat=st.sampled_from(["linf", "l2"]),
    fast=st.booleans(),
    width=st.none() | st.integers(1, 64),
)


@given(configs)
def test_toml_keeps_every_setting(config: RunConfig) -> None:
    import tomllib

    for one in (config, config.resolved()):
        assert from_values(tomllib.loads(to_toml(one)), source="a file") == one


@given(configs)
def test_resolving_twice_changes_nothing_and_leaves_nothing_open(config: RunConfig) -> None:
    resolved = config.resolved()
    assert resolved.resolved() == resolved
    assert not resolved.differences(config)
    assert resolved.eps is not None
    assert resolved.decay_epochs is not None
    assert "auto" not in (resolved.model, resolved.attack_mode)


def test_defaults_are_the_papers() -> None:
    config = RunConfig(data="cifar10").resolved()
    assert (config.epochs, config.decay_epochs, config.batch_size) == (120, (75, 90), 128)
    assert (config.lr, config.momentum, config.weight_decay) == (0.1, 0.9, 5e-4)
    assert config.eps == 8 / 255
    assert config.step_size == pytest.approx(2 / 255)
    assert config.attack_steps == 10
    assert config.model == "resnet18"
    assert (config.tau, config.beta_gamma, config.max_norm, config.beta, config.awp_gamma) == (50, 0.7, 25, 6, 5e-3)
    assert config.validation_examples == 1000
    assert RunConfig(data="cifar10", threat="l2").resolved().eps == 128 / 255
    assert RunConfig(epochs=200).resolved().decay_epochs == (100, 150)
    betas = {name: RunConfig(objective=name).resolved().beta for name in OBJECTIVES[4:]}
    assert betas == {"ates": 6, "backward-smoothing": 10, "lbgat": 0, "self-adaptive": 6}
    config = RunConfig(data="cifar10", objective="backward-smoothing").resolved()
    assert (config.attack_steps, config.step_size, config.bs_gamma) == (1, 8 / 255, 1)
    assert RunConfig(data="cifar10", objective="lbgat", model="wrn-34-10").resolved().guide == "resnet18"
    assert RunConfig(epochs=24).resolved().decay_epochs == (15, 18)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"objectiv": "pgd"}, "unknown setting in a file: 'objectiv'; did you mean objective"),
        ({"objective": "tradse"}, "unknown --objective: 'tradse'; did you mean trades"),
        ({"optimizer": "emgm"}, "unknown optimizer: 'emgm'; did you mean engm"),
        ({"threat": "l1"}, "unknown --threat: 'l1'.*known: linf, l2"),
        ({"epochs": 0}, "--epochs must be at least 1, got 0"),
        ({"epochs": "ten"}, "epochs must be int, got 'ten'"),
        ({"epochs": True}, "epochs must be int, got True"),
        ({"lr": -0.1}, "--lr must be positive, got -0.1"),
        ({"lr": float("nan")}, "--lr must be positive, got nan"),
        ({"eps": -1.0}, "--eps must be at least 0"),
        ({"eps": "8/0"}, "number or a fraction such as 8/255, got '8/0'"),
        ({"ema": 1.0}, r"--ema must lie in \[0, 1\), got 1.0"),
        ({"alpha": "-3"}, "--alpha must be a positive number, paper, scaled or auto, got '-3'"),
        ({"alpha": "auto", "optimizer": "n-engm"}, "--alpha auto is for --optimizer engm, not for n-engm"),
        ({"alpha": "scaled", "optimizer": "f-engm"}, "--alpha scaled is for --optimizer engm or a-engm or n-engm"),
        ({"decay_epochs": [9, 3]}, "--decay-epochs must be rising"),
        ({"loggers": ["csw"]}, "unknown --loggers: 'csw'; did you mean csv"),
        ({"loggers": "csv"}, "loggers must be a list of str"),
        ({"clip_fraction": 1.0}, "--clip-fraction must lie between 0 and 1"),
        ({"alpha": "inf"}, "--alpha must be a positive number, paper, scaled or auto, got 'inf'"),
        ({"seed": -1}, "--seed must be at least 0"),
        ({"seed": 2**63}, "--seed must be at least 0 and below"),
        ({"threads": 100_000}, "--threads must be at most 1024, got 100000"),
        ({"loggers": ["csv", "csv"]}, "--loggers names a format twice: csv,csv"),
        ({"gap_first": 0.5, "gap_last": 0.4}, "--gap-first and --gap-last must lie in .* and rise, got 0.5 and 0.4"),
        ({"gap_last": 1.5}, r"must lie in \[-1, 1\], between two probabilities"),
        ({"gap_epochs": [7]}, "--gap-epochs must be two rising numbers of epochs, as 30,70, got"),
        ({"gap_epochs": [7, 7]}, "--gap-epochs must be two rising"),
        ({"bs_gamma": 0.0}, "--bs-gamma must be positive"),
        ({"bs_steps": 0}, "--bs-steps must be at least 1"),
        ({"beta": -1.0}, "--beta must be at least 0"),
        ({"sat_momentum": 1.0}, r"--sat-momentum must lie in \[0, 1\), got 1.0"),
        ({"sat_start": 0}, "--sat-start must be at least 1"),
        ({"objective": "lbgat", "label_smoothing": 0.1}, "--label-smoothing is not for --objective lbgat: its robust"),
        ({"batch_norm": "exact", "attack_mode": "eval", "borrow": True}, "leave one of the three out"),
    ],
)
def test_what_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_values(values, source="a file")


def test_numbers() -> None:
    assert parse_number("8/255") == 8 / 255
    assert parse_number(" 1e-3 ") == 1e-3
    with pytest.raises(ValueError, match="got 'x'"):
        parse_number("x")


def test_options_override_the_file(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text('data = "cifar10"\neps = "4/255"\nlr = 1\nbatch-size = 32\nalpha = 2\n')
    config = config_from({"lr": "0.2", "decay_epochs": "5, 7", "loggers": "none"}, file)
    assert (config.data, config.eps, config.lr, config.batch_size) == ("cifar10", 4 / 255, 0.2, 32)
    assert (config.decay_epochs, config.loggers, config.alpha) == ((5, 7), (), "2.0")
    with pytest.raises(ValueError, match="--decay-epochs: expected numbers with commas between them, got '5;7'"):
        config_from({"decay_epochs": "5;7"}, file)
    with pytest.raises(ValueError, match="--lr: expected a number"):
        config_from({"lr": "fast"}, None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": "2"}, "--beta is for --objective trades, mart, .*, self-adaptive; as it is it would change nothing"),
        ({"gap_last": "0.5"}, "--gap-last is for --objective ates"),
        ({"bs_gamma": "2"}, "--bs-gamma is for --objective backward-smoothing"),
        ({"attack_steps": 2, "objective": "backward-smoothing"}, "--attack-steps is for other objectives"),
        ({"guide": "vgg8"}, "--guide is for --objective lbgat"),
        ({"sat_start": 9, "epochs": 8, "objective": "self-adaptive"}, "--sat-start is for --objective self-adaptive"),
        ({"tau": 7}, "--tau is for --optimizer a-engm"),
        ({"alpha": "3", "optimizer": "mgnc"}, "--alpha is for ENGM and its relatives"),
        ({"awp": True, "awp_warmup": 9, "epochs": 9}, "--awp-warmup is for --awp, and for fewer epochs"),
        ({"validation_examples": 10}, "--validation-examples is for other data than the digits"),
        ({"download": True}, "--download is for --data cifar10"),
    ],
)
def test_options_that_would_change_nothing_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config_from(options, None)


def test_options_of_several_optimizers_are_each_ones_own() -> None:
    assert config_from({"tau": 7, "max_norm": "3"}, None, compared=True).tau == 7
    with pytest.raises(ValueError, match="--beta is for"):
        config_from({"beta": "2"}, None, compared=True)


def test_spelling_does_not_make_another_run() -> None:
    assert RunConfig(alpha="5") == RunConfig(alpha="5.0")
    assert RunConfig(data="CIFAR10", objective="PGD", optimizer="A_ENGM") == RunConfig(
        data="cifar10", objective="pgd", optimizer="a-engm"
    )


def test_paths_are_found_again_from_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data.npz").write_text("")
    monkeypatch.chdir(tmp_path)
    resolved = RunConfig(data="data.npz", data_root="sets").resolved()
    assert (resolved.data, resolved.data_root) == (str(tmp_path / "data.npz"), str(tmp_path / "sets"))
    monkeypatch.chdir("/")
    assert resolved.resolved() == resolved


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no configuration file at"):
        read_toml(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("lr = = 1")
    with pytest.raises(ValueError, match=r"bad.toml is not a TOML file"):
        read_toml(tmp_path / "bad.toml")


def test_differences_are_of_what_can_change_the_outcome() -> None:
    one = RunConfig(lr=0.1, threads=1, loggers=("csv",), save_every=10)
    other = RunConfig(lr=0.2, threads=2, loggers=(), save_every=99, device="cpu")
    assert one.differences(other) == {"lr": (0.1, 0.2)}
    assert RunConfig(fast=True).differences(RunConfig(fast=False)).keys() == {
        "fast",
        "precision",
        "channels_last",
        "compile_attack",
    }


def test_every_setting_has_a_help_text() -> None:
    assert all(f.metadata["help"].endswith((".", ")")) for f in fields(RunConfig))


class TestSchedule:
    config = RunConfig(epochs=12, decay_epochs=(6, 9), lr=0.4, eps=0.3, eps_warmup=2.5, objective="fat").resolved()

    def test_learning_rate(self) -> None:
        rates = [Schedule(self.config, 4).lr(epoch) for epoch in range(12)]
        assert rates == pytest.approx([0.4] * 6 + [0.04] * 3 + [0.004] * 3)

    def test_radius_grows_linearly(self) -> None:
        schedule = Schedule(self.config, 4)
        assert [schedule.eps(step) for step in (0, 5, 10, 11)] == pytest.approx([0.0, 0.15, 0.3, 0.3])
        assert Schedule(replace(self.config, eps_warmup=0.0), 4).eps(0) == 0.3

    def test_patience_of_fat(self) -> None:
        assert [Schedule(self.config, 4).patience(epoch) for epoch in range(12)] == [0] * 5 + [1] * 4 + [2] * 3
        assert Schedule(replace(self.config, patience=3), 4).patience(0) == 3

    def test_gap_of_ates(self) -> None:
        config = replace(self.config, objective="ates", epochs=20)
        gaps = [Schedule(config, 4).gap(epoch) for epoch in range(20)]
        assert gaps == pytest.approx([0.0] * 6 + [0.05 * k for k in range(1, 9)] + [0.4] * 6)
        config = replace(config, gap_first=-0.5, gap_last=0.5, gap_epochs=(0, 4))
        assert [Schedule(config, 4).gap(epoch) for epoch in range(5)] == pytest.approx([-0.25, 0.0, 0.25, 0.5, 0.5])

    def test_labels_move_late(self) -> None:
        config = replace(self.config, objective="self-adaptive", epochs=10)
        assert [Schedule(config, 4).labels_move(epoch) for epoch in range(10)] == [False] * 6 + [True] * 4
        assert Schedule(replace(config, sat_start=1), 4).labels_move(0)

    def test_awp_waits(self) -> None:
        schedule = Schedule(replace(self.config, awp=True, awp_warmup=2), 4)
        assert [schedule.awp(epoch) for epoch in range(4)] == [False, False, True, True]
        assert not Schedule(self.config, 4).awp(11)


def test_label_smoothing_is_refused_where_it_has_no_meaning() -> None:
    with pytest.raises(ValueError, match="--label-smoothing is not for --objective mart: its boosted cross-entropy"):
        RunConfig(objective="mart", label_smoothing=0.1)
