"""Input normalization inside the network: its numbers, its names, its place in checkpoints and exports."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
from tiny_runs import PLAIN, tiny_dataset
from torch import nn

import engm
from engm.recipes.config import RunConfig
from engm.recipes.data import StreamedSplit
from engm.recipes.models import small_resnet, with_normalization
from engm.recipes.processes import Processes
from engm.recipes.runs.export import ExportFormat, export
from engm.recipes.runs.folder import RunFolder, train
from engm.recipes.training.building import settle_normalization
from engm.recipes.training.initial import Initial
from engm.recipes.training.run import Run

CPU = Processes(torch.device("cpu"))
NUMBERS = "0.5/0.25"


def test_of_the_training_images() -> None:
    data = tiny_dataset()
    net = Run(replace(PLAIN, normalize="data"), CPU, data).net
    expected = data.train.inputs.double()  # type: ignore[attr-defined]
    torch.testing.assert_close(net.normalization.mean, expected.mean((0, 2, 3)).float())  # type: ignore[union-attr]
    torch.testing.assert_close(net.normalization.std, expected.std((0, 2, 3), correction=0).float())  # type: ignore[union-attr]


def test_of_streamed_bytes_with_several_channels() -> None:
    images = torch.randint(0, 256, (1100, 3, 2, 2), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    net = with_normalization(torch.nn.Identity(), torch.zeros(3), torch.ones(3))
    settle_normalization(net, StreamedSplit(images, torch.zeros(1100, dtype=torch.int64), (3, 2, 2), workers=0))
    scaled = images.double() / 255
    torch.testing.assert_close(net.normalization.mean, scaled.mean((0, 2, 3)).float())  # type: ignore[union-attr]
    torch.testing.assert_close(net.normalization.std, scaled.std((0, 2, 3), correction=0).float())  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="has the same value everywhere"):
        settle_normalization(net, StreamedSplit(images * 0, torch.zeros(1100, dtype=torch.int64), (3, 2, 2), workers=0))


def test_weights_keep_their_names_and_the_layer_is_in_front_of_all() -> None:
    run, plain = Run(replace(PLAIN, normalize=NUMBERS), CPU, tiny_dataset()), Run(PLAIN, CPU, tiny_dataset())
    own = plain.net.state_dict()
    assert run.net.state_dict().keys() - own.keys() == {"normalization.mean", "normalization.std"}
    x = torch.rand(5, 1, 8, 8)
    for net in (run.net, run.with_weights(run.net.state_dict())):
        assert torch.equal(net.eval()(x), plain.net.eval()((x - 0.5) / 0.25))
    assert torch.equal(run.trainer.model.eval()(x), plain.net((x - 0.5) / 0.25))


@pytest.mark.parametrize("kind", ["sequential", "loop"])
def test_networks_that_call_all_their_children_are_normalized_once(kind: str) -> None:
    class Loop(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for child in self.children():
                x = child(x)
            return x

    net: nn.Module = nn.Sequential() if kind == "sequential" else Loop()
    net.add_module("flat", nn.Flatten())
    net.add_module("head", nn.Linear(12, 3))
    x = torch.rand(5, 3, 2, 2)
    expected = net((x - 0.5) / 0.25)
    assert torch.equal(with_normalization(net, torch.full((3,), 0.5), torch.full((3,), 0.25))(x), expected)


def test_norms_through_it_are_exact() -> None:
    torch.manual_seed(0)
    net = with_normalization(
        small_resnet(classes=2, in_channels=1, norm="group", width=4), torch.tensor([0.5]), torch.tensor([0.2])
    )
    model = engm.GradNormModule(net.double())
    x, y = torch.rand(6, 1, 8, 8, dtype=torch.float64), torch.arange(6) % 2
    losses = torch.nn.functional.cross_entropy(model(x), y, reduction="none")
    torch.testing.assert_close(
        engm.per_example_grad_norms(model, losses), engm.naive_grad_norms(model, losses), rtol=1e-9, atol=0
    )


def test_it_is_part_of_the_run_its_evaluation_and_its_exports(tmp_path: Path) -> None:
    config = replace(PLAIN, normalize="data", epochs=1, attack_steps=1, ema=0.5, width=4)
    train(config, tmp_path / "run", CPU, dataset=tiny_dataset())
    folder = RunFolder(tmp_path / "run")
    kept = folder.weights("last").weights
    run = Run(config, CPU, tiny_dataset())
    assert torch.equal(kept["normalization.std"], run.net.state_dict()["normalization.std"])
    net = run.with_weights(kept).eval()
    x = torch.rand(4, 1, 8, 8)
    export(folder, tmp_path / "net.pt", ExportFormat.PT, "last")
    assert torch.load(tmp_path / "net.pt", weights_only=True).keys() == kept.keys()
    with mock.patch("engm.recipes.runs.export.load_dataset", return_value=tiny_dataset()):
        export(folder, tmp_path / "net.pt2", ExportFormat.PT2, "last")
    program = torch.export.load(str(tmp_path / "net.pt2")).module()
    torch.testing.assert_close(program(x), net(x))
    assert not torch.allclose(net(x), net((x - 0.1).clamp(0)))


def test_given_weights_need_none_and_other_numbers_do_not_fit() -> None:
    config = replace(PLAIN, normalize=NUMBERS)
    plain = Run(replace(PLAIN, seed=5), CPU, tiny_dataset()).net.state_dict()
    run = Run(config, CPU, tiny_dataset(), Initial("a file", plain))
    assert torch.equal(run.net.state_dict()["linear.weight"], plain["linear.weight"])
    assert run.net.state_dict()["normalization.std"] == 0.25
    same = run.net.state_dict()
    Run(config, CPU, tiny_dataset(), Initial("a file", same))
    with pytest.raises(ValueError, match=r"not in the network: normalization.std \[1\] \(the network's is \[0.5\]\)"):
        Run(replace(config, normalize="0.5/0.5"), CPU, tiny_dataset(), Initial("a file", same))


@pytest.mark.parametrize("text", ["half", "0.5", "0.5,0.5/0.2", "0.5/0", "nan/1", "/"])
def test_what_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="--normalize must be none, data, or means and deviations"):
        RunConfig(normalize=text)


def test_channels_have_to_be_those_of_the_images() -> None:
    with pytest.raises(ValueError, match="for each of the 1 channels, got 2 and 2"):
        Run(replace(PLAIN, normalize="0.5,0.4/0.2,0.2"), CPU, tiny_dataset())
