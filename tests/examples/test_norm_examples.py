"""The examples for those who come for norms: what they compute is right, and they draw their pictures."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from accelerators import no_accelerator_stays
from sklearn.metrics import average_precision_score
from torch import nn

import engm

ROOT = Path(__file__).resolve().parents[2]


def example(name: str) -> ModuleType:
    specification = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["mislabelled", "noise_scale", "hugging_face_trainer"])
def test_the_pictures_are_there_and_shown(name: str) -> None:
    picture = ROOT / "docs" / "pictures" / f"{name}.svg"
    assert "<svg" in picture.read_text(encoding="utf-8")
    page = (ROOT / "docs" / "norms.md").read_text(encoding="utf-8")
    assert f"](pictures/{name}.svg)" in page
    assert f"examples/{name}.py docs/pictures/{name}.svg" in page


def test_wrong_labels_are_found_by_either_score(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mislabelled = example("mislabelled")
    wrong, scores = mislabelled.scores(0)
    assert 0.05 < wrong.float().mean() < 0.15
    found = {name: average_precision_score(wrong, score) for name, score in scores.items()}
    assert found["gradient norm"] > 0.8
    assert found["loss"] > 0.8
    monkeypatch.setattr(mislabelled, "SEEDS", 2)
    values = mislabelled.main(tmp_path / "picture.svg")
    assert {name: len(of_seeds) for name, of_seeds in values.items()} == {"gradient norm": 2, "loss": 2}
    assert values["loss"][0] == pytest.approx(found["loss"])
    assert (tmp_path / "picture.svg").is_file()


def test_terms_of_the_noise_scale_are_those_of_the_gradients_themselves() -> None:
    noise_scale = example("noise_scale")
    net = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()
    x, y = torch.randn(9, 5, dtype=torch.float64), torch.randint(3, (9,))
    model = engm.GradNormModule(net)
    losses = F.cross_entropy(model(x), y, reduction="none")
    parameters = list(model.parameters())
    each = torch.stack(
        [torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters, retain_graph=True)]) for loss in losses]
    )
    norms = engm.per_example_grad_norms(model, losses)
    trace, signal = noise_scale.terms(norms, torch.autograd.grad(losses.mean(), parameters))
    direct = each.var(0).sum()  # over n - 1, which is unbiased
    assert trace == pytest.approx(float(direct), rel=1e-12)
    assert signal == pytest.approx(float(each.mean(0).square().sum() - direct / 9), rel=1e-12)
    opt = engm.ENGM(model, torch.optim.SGD(parameters, lr=0.1), alpha=float("inf"))
    opt.backward(F.cross_entropy(model(x), y, reduction="none"))
    assert float(opt.gradient_noise_scale()) == pytest.approx(trace / signal, rel=1e-9)


def test_the_noise_scale_of_batches_is_that_of_all_examples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    noise_scale = example("noise_scale")
    loss, scale, exact = noise_scale.train(301)
    assert loss[-1] < loss[0] / 2
    for step in (50, 100, 150):  # later the running mean lags behind what grows
        assert 0.75 < scale[step] / exact[step] < 1.33, (step, scale[step], exact[step])
    assert scale[-1] > 1.5 * scale[100]
    monkeypatch.setattr(noise_scale, "train", lambda: (loss, scale, exact))
    noise_scale.main(tmp_path / "picture.svg")
    assert (tmp_path / "picture.svg").is_file()


@pytest.fixture
def trainers() -> Iterator[ModuleType]:
    pytest.importorskip("accelerate")
    with no_accelerator_stays():
        yield example("hugging_face_trainer")


def plain_loop(trainers: ModuleType, net: nn.Module, batches: list[torch.Tensor], alpha: float) -> float:
    """Trains as the Trainer should, with its AdamW and its linear schedule; the share of sequences that is clipped."""
    model = engm.GradNormModule(net)
    decayed = [p for name, p in net.named_parameters() if "ln_" not in name and not name.endswith("bias")]
    others = [p for name, p in net.named_parameters() if "ln_" in name or name.endswith("bias")]
    groups = [{"params": decayed, "weight_decay": 0.0}, {"params": others, "weight_decay": 0.0}]
    opt = engm.ENGM(model, torch.optim.AdamW(groups, lr=3e-3), alpha=alpha)
    schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda step: 1 - step / len(batches))
    clipped = []
    for x in batches:
        logits = model(input_ids=x).logits
        losses = F.cross_entropy(logits[:, :-1].transpose(1, 2), x[:, 1:], reduction="none").mean(1)
        opt.reweight(losses).mean().backward()
        clipped.append(float(opt.stats.clipped_fraction))
        opt.step()
        schedule.step()
        opt.zero_grad()
    return sum(clipped) / len(clipped)


def run(trainers: ModuleType, folder: Path, net: nn.Module, rows: list, alpha: float, **settings: object) -> nn.Module:
    from transformers import TrainingArguments

    arguments = TrainingArguments(
        str(folder), num_train_epochs=1, learning_rate=3e-3, use_cpu=True, max_grad_norm=0, report_to=[],
        save_strategy="no", disable_tqdm=True, train_sampling_strategy="sequential", **settings,
    )  # fmt: skip
    trainer = trainers.ClippingTrainer(net, arguments, train_dataset=rows, eval_dataset=rows, alpha=alpha)
    trainer.train()
    trainer.evaluate()
    return trainer


def test_trainer_clips_as_a_plain_loop_does(trainers: ModuleType, tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    size = {"n_positions": trainers.LENGTH, "n_embd": 8, "n_layer": 1, "n_head": 2}
    dropped = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    net = GPT2LMHeadModel(GPT2Config(vocab_size=128, **size, **dropped, **trainers.NO_ENDS))
    rows = trainers.text(32, 0.2, 0)
    codes = torch.tensor([row["input_ids"] for row in rows])
    by_hand, whole, parts, free = (copy.deepcopy(net) for _ in range(4))
    clipped = plain_loop(trainers, by_hand, list(codes.split(16)), 1.0)
    assert clipped > 0
    trainer = run(trainers, tmp_path, whole, rows, 1.0, per_device_train_batch_size=16)
    run(trainers, tmp_path, parts, rows, 1.0, per_device_train_batch_size=4, gradient_accumulation_steps=4)
    run(trainers, tmp_path, free, rows, 1e-3, per_device_train_batch_size=16)
    for name, tensor in by_hand.state_dict().items():
        torch.testing.assert_close(whole.state_dict()[name], tensor, rtol=0, atol=1e-6, msg=name)
        torch.testing.assert_close(parts.state_dict()[name], tensor, rtol=0, atol=1e-4, msg=name)
    assert any((free.state_dict()[name] - tensor).abs().max() > 1e-4 for name, tensor in by_hand.state_dict().items())
    with torch.no_grad():
        logits = whole(input_ids=codes).logits
        mean = F.cross_entropy(logits[:, :-1].transpose(1, 2), codes[:, 1:])
    (told,) = [row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row]
    assert told == pytest.approx(float(mean), rel=1e-4)


@pytest.mark.slow
def test_the_trainer_draws_its_picture(trainers: ModuleType, tmp_path: Path) -> None:
    trainers.main(tmp_path / "picture.svg", seeds=2)
    assert (tmp_path / "picture.svg").is_file()
