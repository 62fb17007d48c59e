"""Tables that are measured and kept: the fit, the file, and what happens to either when it is no good."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import engm
from engm import _C
from engm.cost import table as cost_table
from engm.cost import tuning

TABLE = {
    "tile_steps": 20.0,
    "direct_element": 30.0,
    "direct_last_element": 45.0,
    "gram_flop": 1.5,
    "gram_element": 100.0,
    "gram_last_element": 70.0,
    "tap_flop": 40.0,
    "gram_block": 1e4,
    "product_flop": 0.0,
    "product_element": 0.0,
    "product_example": 0.0,
}
PRODUCTS = {"product_flop": 0.4, "product_element": 70.0, "product_example": 1e6}  # which linear layers on CUDA have
LAYERS = tuning.LAYERS
SMALL = (
    *(tuning.Layer(16, 16, t) for t in (2, 4, 8, 16)),
    *(
        tuning.Layer(c, 16, side, 3, channels_last=last)
        for c in (4, 16)
        for side in (3, 4, 6)
        for last in (False, True)
    ),
    tuning.Layer(8, 8, 6, 1, 2),
)


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path):
    """Neither the user's tables nor those of another test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("ENGM_COST_TABLE", raising=False)
    monkeypatch.setattr(tuning, "LAYERS", SMALL)
    _C.reset_cost_tables()
    yield
    _C.reset_cost_tables()


def pretend(monkeypatch, constants, scale=1e-9):
    """Times as if the model with these constants were true."""
    current = {}

    def call(self, n, device, dtype):
        cost = self.cost(device, "float32")
        direct = cost.direct_parts[0] + sum(
            constants[k] * v for k, v in zip(tuning.DIRECT, cost.direct_parts[1:], strict=True)
        )
        gram = sum(constants[k] * v for k, v in zip(tuning.GRAM, cost.gram_parts, strict=True))
        return lambda form: current.update(seconds=n * scale * (direct if form == "direct" else gram))

    def seconds(device, call, form):
        call(form)
        return current["seconds"]

    monkeypatch.setattr(tuning.Layer, "call", call)
    monkeypatch.setattr(tuning, "_seconds", seconds)


def test_measures_this_machine(tmp_path):
    result = engm.tune(seconds=0.1)
    assert isinstance(result, engm.CostTable)
    assert (result.device, result.name) == ("cpu", cost_table.processor_name("cpu"))
    (fit,) = result.fits
    assert fit.layers == len(SMALL)
    assert all(0 <= share <= 1 for share in fit.right)
    assert all(lost >= 0 for lost in (*fit.regret, *fit.held_out_regret))
    assert result.constants["any"] == _C.cost_table("cpu")
    saved = list((tmp_path / "cache").rglob("*.json"))
    assert len(saved) == result.accepted
    assert result.source == (str(saved[0]) if saved else "built-in")
    assert "faster form taken in" in str(result)


@pytest.mark.parametrize("times", [1e-12, 1.0])
def test_the_fit_finds_true_constants(monkeypatch, times):
    pretend(monkeypatch, TABLE, times)
    timings, _ = tuning.measure_layers("cpu", "any", 0.01)
    found = tuning.fit_constants(timings)
    assert found == pytest.approx(TABLE, rel=1e-4)
    assert all(timing.regret(found) == 0 for timing in timings)


def test_the_fit_finds_the_constants_of_products(monkeypatch):
    """On CUDA the Gram form of linear layers has constants of its own, beside those of convolutions."""
    table = {**TABLE, **PRODUCTS}
    monkeypatch.setattr(tuning, "LAYERS", LAYERS)
    pretend(monkeypatch, table)
    timings, _ = tuning.measure_layers("cuda:0", "tf32", 0.01)
    assert tuning.fit_constants(timings) == pytest.approx(table, rel=1e-3)


def test_the_fit_stays_above_zero():
    timings = [
        tuning.Timing(
            {"direct": [k, 1.0, 50.0 - k, 0.0], "gram": [k, k * k, 0.0, 1.0, 2.0, 0.0, 0.0, 0.0]},
            {"direct": k, "gram": 2.0 * k},
        )
        for k in (1.0, 2.0, 5.0, 9.0)
    ]
    found = tuning.fit_constants(timings)
    assert all(value >= 0 for value in found.values())
    assert found["gram_flop"] == pytest.approx(2)
    no_products = tuning.Timing({"direct": [0.0, 1.0, 1.0, 0.0], "gram": [1.0] * 8}, {"direct": 1.0, "gram": 1.0})
    assert tuning.fit_constants([no_products]) is None


def test_saved_and_read_again(monkeypatch, tmp_path):
    pretend(monkeypatch, {**TABLE, "gram_block": 1e7})
    _C.set_cost_table("cpu", {"gram_block": 0})
    result = engm.tune(seconds=0.01)
    assert result.accepted
    assert _C.cost_table() == result.constants["any"]
    (saved,) = (tmp_path / "cache" / "engm" / "cost").iterdir()
    document = json.loads(saved.read_text())
    assert (document["version"], document["device"], document["name"]) == (cost_table.VERSION, "cpu", result.name)
    _C.reset_cost_tables()
    assert _C.cost_table() == result.constants["any"]
    assert engm.explain(nn.Sequential(nn.Linear(2, 2)), torch.randn(2, 2)).cost_table == f"{saved} (cpu)"
    monkeypatch.setenv("ENGM_COST_TABLE", "built-in")
    _C.reset_cost_tables()
    assert _C.cost_table_source() == "built-in"


@pytest.mark.parametrize("by", ["argument", "environment"])
def test_the_file_may_be_chosen(monkeypatch, tmp_path, by):
    pretend(monkeypatch, TABLE)
    wanted = tmp_path / "somewhere" / "table.json"
    if by == "environment":
        cost_table.save(wanted, "cpu", {"any": TABLE})
        monkeypatch.setenv("ENGM_COST_TABLE", str(wanted))
        assert _C.cost_table_source() == str(wanted)
        assert _C.cost_table() == TABLE
    result = engm.tune(path=wanted if by == "argument" else None, seconds=0.01)
    assert result.source == str(wanted)
    assert [path.name for path in wanted.parent.iterdir()] == ["table.json"]


def test_a_worse_table_is_refused(monkeypatch, tmp_path):
    pretend(monkeypatch, TABLE)
    _C.set_cost_table("cpu", TABLE, source="before")
    monkeypatch.setattr(tuning, "fit_constants", lambda timings: {**TABLE, "gram_block": 1e12})
    result = engm.tune(seconds=0.01)
    assert not result.accepted
    assert result.fits[0].regret[1] > result.fits[0].regret[0] == 0
    assert "refused" in str(result)
    assert result.constants["any"] == _C.cost_table() == TABLE
    assert result.source == "before"
    assert not (tmp_path / "cache").exists()


def document(**changes):
    return {"version": cost_table.VERSION, "device": "cpu", "name": "x", "tables": {"any": TABLE}, **changes}


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{", "Expecting"),
        (b"\xff\xfe", "utf-8"),
        ("[]", "version None"),
        (json.dumps(document(version=1)), f"version {cost_table.VERSION}, found version 1"),
        (json.dumps(document(tables={})), "no tables"),
        (json.dumps(document(tables={"any": {"gram_flop": 1}})), "must hold tile_steps, direct_element"),
        (json.dumps(document(tables={"any": {**TABLE, "gram_flop": -1}})), "'gram_flop' of table 'any' must be finite"),
        (json.dumps(document(tables={"any": {**TABLE, "gram_flop": float("nan")}})), "must be finite"),
        (json.dumps(document(tables={"any": {**TABLE, "gram_flop": "fast"}})), "found 'fast'"),
        (json.dumps(document(tables={"int8": TABLE})), "precision must be"),
        (None, "No such file"),
    ],
)
def test_a_broken_file_is_named_and_left_out(monkeypatch, tmp_path, text, problem):
    path = tmp_path / "broken.json"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    monkeypatch.setenv("ENGM_COST_TABLE", str(path))
    a = torch.randn(2, 3, 4)
    with pytest.warns(RuntimeWarning, match="built-in cost table on cpu") as caught:
        engm.ops.linear_norm_sq(a, a)
    assert str(path) in str(caught[0].message)
    assert problem in str(caught[0].message)
    assert _C.cost_table() == _C.cost_table(builtin=True)
    assert len(caught) == 1  # once, not at every call


def test_a_file_for_other_devices_is_left_alone(monkeypatch, tmp_path, recwarn):
    path = tmp_path / "gpu.json"
    path.write_text(json.dumps(document(device="cuda")))
    monkeypatch.setenv("ENGM_COST_TABLE", str(path))
    assert _C.cost_table_source() == "built-in"
    assert not recwarn


def test_a_table_set_by_hand_stays_on_top_of_a_saved_one(monkeypatch, tmp_path):
    path = tmp_path / "table.json"
    cost_table.save(path, "cpu", {"any": TABLE})
    monkeypatch.setenv("ENGM_COST_TABLE", str(path))
    _C.set_cost_table("cpu", {"gram_flop": 9})
    assert _C.cost_table() == {**TABLE, "gram_flop": 9}
    assert _C.cost_table_source() == "set by hand"


def test_nothing_is_read_before_first_use(tmp_path):
    """Importing reads no table; the first operator does, and a warning made an error is the caller's to see."""
    path = tmp_path / "broken.json"
    path.write_text("{")
    code = (
        "import warnings, torch, engm; print('imported'); warnings.simplefilter('error')\n"
        "a = torch.randn(2, 3, 4)\n"
        "try: engm.ops.linear_norm_sq(a, a)\n"
        "except RuntimeWarning as e: print('warned', e)\n"
        "print(engm.ops.linear_norm_sq(a, a).shape)\n"
    )
    environment = {
        **os.environ,
        "ENGM_COST_TABLE": str(path),
        "PYTHONPATH": os.pathsep.join([str(Path(engm.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]),
    }
    out = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    lines = out.stdout.splitlines()
    assert lines[0] == "imported"
    assert lines[1].startswith("warned engm chooses by its built-in cost table")
    assert lines[2] == "torch.Size([2])"
    assert "Warning" not in out.stderr


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"device": "meta"}, ValueError, "CPU or CUDA"),
        ({"seconds": 0}, ValueError, "positive"),
        ({"seconds": float("nan")}, ValueError, "positive"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        engm.tune(**arguments)


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a CUDA device")
def test_wants_the_device_that_it_measures():
    with pytest.raises(RuntimeError, match="CUDA device"):
        engm.tune("cuda")


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or "conv_norm_sq" not in _C.build_info()["cuda_kernels"], reason="no CUDA norms here"
)
def test_measures_a_gpu(tmp_path):
    flags = torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision
    result = engm.tune("cuda", seconds=1, path=tmp_path / "gpu.json")
    assert {fit.precision for fit in result.fits} == {"tf32", "float32", "bfloat16", "float16", "float64"}
    assert (torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision) == flags
    assert all(_C.cost_table(result.device, name) == values for name, values in result.constants.items())
