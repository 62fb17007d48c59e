"""Hugging Face's Trainer with every sequence's gradient clipped: a small language model on a text with bad lines.

python examples/hugging_face_trainer.py [PICTURE.svg]
"""

import random
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

import engm
from engm.recipes.pictures import picture

LENGTH, LINES, BAD = 40, 512, 0.1  # characters a line, lines, and the share of them that repeat one letter
NO_ENDS = {"bos_token_id": None, "eos_token_id": None}  # the vocabulary is the letters alone


class ClippingTrainer(Trainer):
    """A Trainer that clips the gradient of every sequence to a norm of ``alpha``; the rest is Trainer's own."""

    loss_is_scaled_for_ga = False  # what compute_loss returns is a mean over the sequences of a micro-batch

    def __init__(self, *args: Any, alpha: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.alpha = alpha
        self.measured = engm.GradNormModule(self.model)  # the model itself stays what Trainer saves and evaluates

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            self.optimizer = engm.ENGM(self.measured, super().create_optimizer(model), alpha=self.alpha)
        return self.optimizer

    def compute_loss(self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, **_: Any) -> Any:
        outputs = self.measured(input_ids=inputs["input_ids"])
        logits, targets = outputs.logits[:, :-1], inputs["labels"][:, 1:]
        losses = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none").mean(1)  # one of every sequence
        if model.training:  # self.optimizer is Accelerate's wrapper, which steps; .optimizer is ours
            losses = self.optimizer.optimizer.reweight(losses)
        return (losses.mean(), outputs) if return_outputs else losses.mean()


def text(lines: int, bad: float, seed: int) -> list[dict[str, list[int]]]:
    """Lines as characters' codes: sentences, and a share of lines that repeat one letter, as those of torn files do."""
    draw = random.Random(seed)
    people, verbs, things = (
        ["the cat", "a child", "my aunt", "one owl"],
        ["sees", "eats", "draws"],
        ["fish", "stars", "bread"],
    )
    rows = []
    for _ in range(lines):
        line = f"{draw.choice(people)} {draw.choice(verbs)} {draw.choice(things)} and {draw.choice(things)}. "
        line = (2 * line)[:LENGTH]
        if draw.random() < bad:
            line = chr(draw.randrange(33, 127)) * LENGTH
        codes = [ord(letter) for letter in line]
        rows.append({"input_ids": codes, "labels": codes})
    return rows


def train(folder: str, alpha: float, *, epochs: float = 6, seed: int = 0, **settings: Any) -> ClippingTrainer:
    """A finished Trainer of a two-layer GPT-2; its ``state.log_history`` has the loss on clean lines by epoch."""
    torch.manual_seed(seed)
    net = GPT2LMHeadModel(GPT2Config(vocab_size=128, n_positions=LENGTH, n_embd=32, n_layer=2, n_head=2, **NO_ENDS))
    arguments = TrainingArguments(
        folder, num_train_epochs=epochs, per_device_train_batch_size=16, learning_rate=3e-3, seed=seed, use_cpu=True,
        max_grad_norm=0, report_to=[], save_strategy="no", eval_strategy="epoch", disable_tqdm=True, **settings,
    )  # fmt: skip
    trainer = ClippingTrainer(
        net, arguments, train_dataset=text(LINES, BAD, 1), eval_dataset=text(128, 0, 2), alpha=alpha
    )
    trainer.train()
    return trainer


def main(out: Path | None = None, seeds: int = 3) -> None:
    """Trains with and without a threshold, prints the loss on clean lines, and draws it."""
    curves: dict[float, list[list[float]]] = {}
    for alpha in (float("inf"), 2.0):
        for seed in range(seeds):
            with tempfile.TemporaryDirectory() as folder:
                history = train(folder, alpha, seed=seed).state.log_history
            curves.setdefault(alpha, []).append([row["eval_loss"] for row in history if "eval_loss" in row])
        last = torch.tensor(curves[alpha])[:, -1]
        print(f"alpha {alpha:3g}: loss on clean lines {last.mean():.3f} ± {last.std():.3f} nats a letter")
    if out is not None:
        with picture(out, (5.5, 3.4)) as figure:
            axes = figure.subplots()
            for (alpha, several), style, colour in zip(curves.items(), ("s--", "o-"), ("k", "#D55E00"), strict=True):
                deviation, mean = torch.std_mean(torch.tensor(several), 0)
                epochs = range(1, len(mean) + 1)
                name = "not clipped" if alpha == float("inf") else f"every sequence clipped to {alpha:g}"
                axes.plot(epochs, mean, style, color=colour, label=name)
                axes.fill_between(epochs, mean - deviation, mean + deviation, color=colour, alpha=0.2, linewidth=0)
            axes.set(xlabel="epoch", ylabel="loss on clean lines, nats a letter", ylim=(0, None))
            figure.legend(loc="outside lower center", ncols=2)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:2]))
