"""Cells: which runs analyses share, what their folders are called, what is read instead of computed again."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_runs
import torch

from engm.recipes.config import RunConfig
from engm.recipes.processes import Processes
from engm.recipes.reproduce import ANALYSES, Request, analysis, budget
from engm.recipes.reproduce.cells import Cell, fingerprint
from engm.recipes.reproduce.measures import Correlation, Gradients, LossLandscape, measured
from engm.recipes.runs.folder import RunFolder, train

from .conftest import request as smoke

CPU = torch.device("cpu")


def folders(name: str, budget_name: str) -> set[str]:
    return {cell.folder_name for cell in analysis(name).cells(Request(budget(budget_name), {}, (0, 1)))}


def test_a_fingerprint_follows_results_and_kept_weights_only() -> None:
    config = RunConfig(data="digits", epochs=3)
    assert fingerprint(config) == fingerprint(replace(config, threads=2, save_every=7, decay_epochs=(2,)))
    for other in ({"lr": 0.2}, {"seed": 1}, {"keep_epochs": (1,)}, {"alpha": "3"}, {"data": "cifar10"}):
        assert fingerprint(replace(config, **other)) != fingerprint(config)


@pytest.mark.parametrize("budget_name", ["smoke", "small"])
def test_small_budgets_share_their_runs(budget_name: str) -> None:
    assert folders("fig4", budget_name) < folders("table2", budget_name)
    assert folders("fig3", budget_name) == folders("fig2", budget_name)
    assert folders("fig5a", budget_name) < folders("fig5", budget_name)
    assert folders("fig1", budget_name) == folders("table3", budget_name)
    assert folders("fig5h", budget_name) == folders("table2", budget_name)


def test_full_size_runs_keep_weights_only_where_they_are_looked_at() -> None:
    asked = Request(budget("paper"), {}, (0,))
    kept = {name: any(cell.config.keep_epochs for cell in a.cells(asked)) for name, a in ANALYSES.items()}
    assert {name for name, keeps in kept.items() if keeps} == {"fig2", "fig3", "table5"}
    assert {cell.config.data for cell in ANALYSES["fig2"].cells(asked)} == {"cifar10", "svhn"}


def test_the_papers_budget_is_the_papers() -> None:
    asked = Request(budget("paper"), {}, (0, 1, 2))
    (first, *_) = analysis("table2").cells(asked)
    config = first.config.resolved()
    assert (config.model, config.epochs, config.decay_epochs, config.batch_size) == ("resnet18", 120, (75, 90), 128)
    assert (config.attack_steps, config.eps, config.step_size) == (10, 8 / 255, 2 / 255)
    assert len(analysis("table2").cells(asked)) == 21
    for cell in (analysis("table3").cells(asked)[0], analysis("table4").cells(asked)[-1]):
        longer = cell.config.resolved()
        assert (longer.epochs, longer.decay_epochs) == (200, (100, 150))
    assert {cell.config.model for cell in analysis("table4").cells(asked)} == {"wrn-34-10"}
    assert {cell.labels["eps"] for cell in analysis("table5").cells(asked)} == {0, 2, 4, 6, 8, 10}
    for name in ("table3", "table3-l2"):
        assert len(analysis(name).cells(Request(budget("paper"), {}, (0,)))) == 3 * 4 * 2


def test_choices_go_before_the_budget_but_not_before_what_is_varied() -> None:
    cell = analysis("table2").cells(smoke(width=3, epochs=1))[0]
    assert (cell.config.width, cell.config.epochs) == (3, 1)
    assert analysis("table3").cells(Request(budget("paper"), {"epochs": 5}, (0,)))[0].config.epochs == 5
    short = analysis("table2").cells(Request(budget("small"), {"epochs": 8}, (0,)))[0].config.resolved()
    assert short.decay_epochs == (5, 6)
    with pytest.raises(ValueError, match=r"--eps is what this analysis varies"):
        analysis("table5").cells(smoke(eps=0.1))
    with pytest.raises(ValueError, match="n-engm"):
        Request(budget("smoke"), {}, (0,), ("nenngm",))
    with pytest.raises(ValueError, match="small"):
        budget("smal")
    with pytest.raises(ValueError, match="table2"):
        analysis("tabel2")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    path = tmp_path_factory.mktemp("trained") / "run"
    config = replace(tiny_runs.PLAIN, optimizer="msgd", keep_epochs=(1, 3))
    train(config, path, Processes(torch.device("cpu")), dataset=tiny_runs.tiny_dataset())
    return RunFolder(path)


def test_kept_epochs_are_the_weights_of_those_epochs(trained: RunFolder) -> None:
    first, last = trained.weights_after(1), trained.weights_after(3)
    assert (first.epoch, last.epoch) == (1, 3)
    for name, tensor in trained.weights("last").weights.items():
        assert torch.equal(last.weights[name], tensor)
    assert any(not torch.equal(first.weights[name], tensor) for name, tensor in last.weights.items())
    with pytest.raises(RuntimeError, match="epoch-000002"):
        trained.weights_after(2)


def test_measures_are_computed_once_for_their_settings(trained: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    config, dataset = trained.config(), tiny_runs.tiny_dataset()
    measure = Gradients(examples=32, batch_size=16, epochs=(1, 3))
    found = measured(measure, trained, config, dataset, CPU)
    assert [row["epoch"] for row in found] == [1, 3]
    assert all(row["variance"] >= 0 and row["examples"] == 32 for row in found)
    other = measured(replace(measure, epochs=(3,)), trained, config, dataset, CPU)
    assert other == found[1:]

    def never(*_: object) -> None:
        raise AssertionError("computed again")

    monkeypatch.setattr(Gradients, "compute", never)
    assert measured(measure, trained, config, dataset, CPU) == found
    with pytest.raises(AssertionError, match="computed again"):
        measured(replace(measure, examples=16), trained, config, dataset, CPU)


def test_measures_of_another_training_are_not_believed(tmp_path: Path) -> None:
    measure = Gradients(examples=16, batch_size=16, epochs=(1,))
    found = {}
    for seed in (0, 1):
        folder = RunFolder(tmp_path / str(seed))
        config = replace(tiny_runs.PLAIN, optimizer="msgd", epochs=1, decay_epochs=(), keep_epochs=(1,), seed=seed)
        train(config, folder.path, Processes(torch.device("cpu")), dataset=tiny_runs.tiny_dataset())
        if seed:  # as if the folder had held the other run before
            (tmp_path / "0" / "measures").rename(folder.path / "measures")
        found[seed] = measured(measure, folder, folder.config(), tiny_runs.tiny_dataset(), CPU)
    assert found[0] != found[1]


def test_correlation_and_landscape_read_the_kept_weights(trained: RunFolder) -> None:
    config, dataset = trained.config(), tiny_runs.tiny_dataset()
    rows = Correlation(examples=40, batch_size=16, epochs=(1,)).compute(trained, config, dataset, CPU)
    assert [(row["epoch"], row["statistics"]) for row in rows] == [(1, "training"), (1, "evaluation")]
    assert rows[1]["pearson"]["engine"] == pytest.approx(1.0, abs=1e-5)
    plane = LossLandscape(examples=2, points=3, rough=4).compute(trained, config, dataset, CPU)
    assert len(plane["roughness"]) == 4
    assert torch.tensor(plane["losses"]).shape == (2, 3, 3)
    with pytest.raises(ValueError, match="radius above 0"):
        LossLandscape(2, 3, 4).compute(trained, replace(config, eps=0.0), dataset, CPU)


def test_a_run_that_diverges_is_told_and_not_an_error(tmp_path: Path) -> None:
    cell = analysis("table2").cells(smoke(lr=1e30))[0]
    record = Cell(cell.name, cell.labels, cell.config).run(tmp_path, torch.device("cpu"), lambda: nullcontext(None))
    assert "not finite" in record["diverged"]
    assert "test" not in record
