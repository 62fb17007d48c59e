"""The benchmark scripts of the CPU, tiny: they run, their files hold what is drawn from them, and peers do the same."""

import json
import sys
from types import SimpleNamespace

import cost_constants
import fidelity
import host
import interleaved
import layers
import peers
import pytest
import routed
import scaling
import table1
import torch
import weights
import workloads
from interleaved import compare, runnable

from engm import _C


def outputs(main, folder, *options):
    path = folder / "figures.json"
    threads = torch.get_num_threads()
    try:
        main([*options, "--threads", "1", "--out", str(path), "--plot"])
    finally:
        torch.set_num_threads(threads)
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    document = json.loads(path.read_text())
    assert document["machine"]["torch"] == torch.__version__
    assert document["machine"]["processor"]
    return document


@pytest.mark.slow
def test_table1(tmp_path):
    sizes = ["--network", "vgg", "--width", "8", "--n", "2", "--attack-steps", "1", "--rounds", "1"]
    document = outputs(table1.main, tmp_path, *sizes, "--naive-rounds", "1")
    rows = document["adversarial"]["batch"]
    ways = {f"{name} ({way})" for name in table1.NORMED for way in table1.WAYS}
    again = {name + table1.REPLAY for name in table1.REPLAYED}
    assert rows.keys() == {"MSGD", "MSGD + GNC", "SNGM", "naive ENGM"} | ways | again
    assert rows["MSGD"]["ratio"] == 1
    assert rows["ENGM (own pass)"]["paper's ratio"] == rows["naive ENGM"]["paper's ratio"] == 8.433
    assert {name for name, row in rows.items() if row["ratio of a rare step"]} == {
        name for name in ways | again if not name.startswith(("N-ENGM", "MSGD"))
    }
    for setting in table1.PLAIN:
        found = document["plain"][setting]
        measured, reasons = set(found["contenders"]), set(found["cannot run"])
        assert measured | reasons == {"SGD", "ENGM", "naive ENGM", *peers.PEERS}
        assert not measured & reasons
    assert "Opacus ghost" in document["plain"]["group norm"]["contenders"]
    assert "BackPACK BatchGrad" in document["plain"]["batch norm, evaluation mode"]["contenders"]
    assert "GroupNorm" in document["plain"]["group norm"]["cannot run"]["BackPACK BatchGrad"]


@pytest.fixture
def threads_as_before():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads_as_before")
def test_layers(tmp_path, capsys):
    path = tmp_path / "layers.json"
    layers.main(["--threads", "2", "--rounds", "1", "--batch", "1", "--out", str(path)])
    document = json.loads(path.read_text())
    timed = {f"{layer}: {name}": row for layer, rows in document["layers"].items() for name, row in rows.items()}
    for row in timed.values():
        assert row["milliseconds"] > 0
        ratio = row["milliseconds on one thread"] / row["milliseconds"]
        assert row["speed-up"] == pytest.approx(ratio, rel=0.02)  # all three have three digits
    slow = {name for name, row in timed.items() if row["speed-up"] < layers.LEAST_GAIN_OF_TWO}
    assert {text.rpartition(" (")[0] for text in document["below 1.7"]} == slow
    assert bool(slow) == ("NOTE: 2 threads gain less than 1.7" in capsys.readouterr().out)


@pytest.mark.usefixtures("threads_as_before")
def test_cost_constants(capsys):
    cost_constants.main(["--threads", "1", "--seconds", "0.01", "--repeats", "2"])
    printed = capsys.readouterr().out
    settings = [line.split()[0] for line in printed.splitlines() if line.startswith("  table.")]
    assert settings
    assert set(settings) <= {f"table.{name}" for name in _C.cost_table(builtin=True)}
    assert "CostTable builtin_cpu() {" in printed


def test_group_norm_pays_for_no_calibration():
    net, (x, y) = workloads.network("vgg", 8, "group"), workloads.batch(2)
    steps = table1.adversarial_steps(net, x, y, "group", 1)
    assert [name for name in steps if name.endswith(table1.RARE)] == [
        "A-ENGM (borrowed), rare step",
        "A-ENGM (own pass), rare step",
    ]


@pytest.mark.usefixtures("threads_as_before")
def test_host(tmp_path):
    wanted = ["--only", "perceptron", "--rounds", "2", "--compiled", "none"]
    path, picture = tmp_path / "host.json", tmp_path / "host.svg"
    host.main([*wanted, "--out", str(path)])
    (row,) = json.loads(path.read_text())["steps"].values()
    assert row.keys() == {"SGD", "ENGM", "SGD, recorded", "ENGM, recorded", "both recorded"}
    host.main(["--out", str(path), "--draw", str(picture)])
    assert "<svg" in picture.read_text()


def test_scaling(tmp_path):
    sizes = ["--n", "2", "--side", "8", "--width", "4", "--blocks", "1", "--rounds", "1"]
    axes = outputs(scaling.main, tmp_path, *sizes)["axes"]
    assert [p["point"]["width"] for p in axes["width"]["points"]] == [2, 4, 8, 16]
    assert all(p["ratio"] > 0 for axis in axes.values() for p in axis["points"])
    assert not any(axis["passed over"] for axis in axes.values())


def test_scaling_names_what_the_budget_leaves_out(tmp_path):
    sizes = ["--n", "2", "--side", "8", "--width", "4", "--blocks", "1", "--rounds", "1", "--budget", "0"]
    axes = outputs(scaling.main, tmp_path, *sizes)["axes"]
    assert [p["point"]["width"] for p in axes["width"]["points"]] == [2]
    assert axes["width"]["passed over"] == [4, 8, 16]
    assert set(axes["width"]["exponents"].values()) == {None}


@pytest.mark.usefixtures("threads_as_before")
def test_routed(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(routed, "COMPARED_AT_FIRST", 1)
    path = tmp_path / "figures.json"
    routed.main(["--rounds", "1", "--threads", "1", "--calls", "3", "5", "--out", str(path)])
    document = json.loads(path.read_text())
    assert set(document["steps"]) == set(routed.NETWORKS)
    assert set(document["built_anew"]) == set(routed.BUILT_ANEW)
    assert [row["calls"] for row in document["first_step"]] == [3, 5]
    assert "a comparison with autograd's gradients" in capsys.readouterr().out


def test_exponent():
    assert scaling.exponent([1, 2, 4], [3, 12, 48]) == 2
    assert scaling.exponent([1], [3]) is None


def test_weights(tmp_path):
    sizes = ["--width", "4", "--batch", "8", "--steps", "3", "--at", "0", "3", "--attack-steps", "2", "--tau", "2"]
    settings = outputs(weights.main, tmp_path, *sizes)["settings"]
    assert settings.keys() == weights.SETTINGS.keys()
    for name, records in settings.items():
        assert [record["step"] for record in records] == [0, 3]
        for record in records:
            own = record["modes"]["ENGM, own pass"]
            assert own["weight_error"] < (0.1 if name == "batch norm, training mode" else 1e-4)
            assert own["cosine"] > (0.99 if name == "batch norm, training mode" else 1 - 1e-6)


def test_fidelity(tmp_path, monkeypatch):
    path, threads = tmp_path / "figures.json", torch.get_num_threads()
    sizes = ["--width", "4", "--batch", "8", "--steps", "3", "--at", "3", "--attack-steps", "1", "--threads", "1"]
    monkeypatch.setattr(sys, "argv", ["fidelity.py", *sizes, "--out", str(path)])
    try:
        fidelity.main()
    finally:
        torch.set_num_threads(threads)
    (record,) = json.loads(path.read_text())["records"]
    assert record["step"] == 3
    assert record["modes"]["default, own pass"]["cosine"] > 0.99
    assert record["modes"]["default, borrowed"]["cosine"] > 0.9


def test_a_contender_that_fails_is_named_with_the_reason():
    def absent():
        raise ImportError("no such peer")

    def broken():
        def step():
            raise RuntimeError("no such layer\nand more")

        return step

    steps, reasons = runnable({"absent": absent, "broken": broken, "good": lambda: lambda: None})
    assert list(steps) == ["good"]
    assert reasons == {"absent": "ImportError: no such peer", "broken": "RuntimeError: no such layer"}


@pytest.mark.parametrize(("turn", "inside"), [(0.0, 1), (0.002, 1), (0.01, 4)])
def test_slow_contenders_take_few_turns_and_short_steps_many_in_one(turn, inside, monkeypatch):
    calls, now = {"sgd": 0, "slow": 0}, 0.0

    def counting(name):
        def step():
            nonlocal now
            calls[name] += 1
            now += {"sgd": 0.003, "slow": 0.03}[name]

        return step

    monkeypatch.setattr(interleaved, "TURN", turn)
    monkeypatch.setattr(interleaved, "time", SimpleNamespace(perf_counter=lambda: now))
    timings = compare({name: counting(name) for name in calls}, reference="sgd", rounds=5, few=["slow"], few_rounds=2)
    assert calls["sgd"] == 2 + 3 + 5 * inside  # two to warm up, three to see how long it takes
    assert calls["slow"] == 1 + 2 * inside  # one to warm up
    assert timings["sgd"].ratio == 1
    assert timings["sgd"].seconds == pytest.approx(0.003)
    assert timings["slow"].ratio == pytest.approx(10)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("norm", ["group", "batch"])
def test_peers_take_the_step_that_engm_takes(norm, monkeypatch):
    """If peers took another step, their times would say nothing. Opacus and FastDP add 1e-6 to the norm."""
    seen = []

    class Recorder(torch.optim.SGD):
        def step(self, closure=None):
            seen.append([p.grad.clone() for group in self.param_groups for p in group["params"]])
            return super().step(closure)

    monkeypatch.setattr(workloads, "sgd", lambda model: Recorder(model.parameters(), lr=1e-6))
    net, (x, y) = workloads.network("resnet18", 4, norm).double(), workloads.batch(4)
    net.train(norm == "group")
    workloads.engm_step(net, x.double(), y, "engm")()
    want = seen.pop()
    compared = 0
    for name, make in peers.PEERS.items():
        steps, _ = runnable({name: lambda make=make: make(net, x.double(), y)})
        if steps:
            compared += 1
            for got, expected in zip(seen.pop(), want, strict=True):
                torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-9, msg=name)
        seen.clear()
    assert compared >= (2 if norm == "group" else 3)
