"""Batches as they come: of other lengths, masks and numbers of examples at every step."""

import pytest
import torch
from oracle import per_example_gradients, relative, trained
from torch import nn

import engm
from engm.backward import prepare
from engm.graph.plan import RESTLESS, STEADY


class Reader(nn.Module):
    """A transformer that reads sequences with padding, by their mean or by their first word."""

    def __init__(self, by_first_word):
        super().__init__()
        self.words, self.last = nn.Embedding(9, 4), nn.Linear(4, 3)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True, norm_first=True) for _ in range(2)
        )
        self.by_first_word = by_first_word

    def forward(self, words, padding):
        h = self.words(words)
        for layer in self.layers:
            h = layer(h, src_key_padding_mask=padding)
        if self.by_first_word:
            return self.last(h[:, 0])
        return self.last((h * ~padding[:, :, None]).sum(1) / (~padding).sum(1, keepdim=True))


class Stream:
    """Steps on batches of any sizes, each compared with one backpropagation an example.

    Attributes:
        made: how many plans were made.
        told: how many times rows were told in the norm pass.
    """

    def __init__(self, monkeypatch, by_first_word=False):
        torch.manual_seed(0)
        self.made = self.told = 0
        self.model = engm.GradNormModule(Reader(by_first_word).double())
        make, tell = prepare.make_plan, prepare.plan_to_be_told

        def making(*args):
            self.made += 1
            return make(*args)

        def telling(*args):
            self.told += 1
            return tell(*args)

        monkeypatch.setattr(prepare, "make_plan", making)
        monkeypatch.setattr(prepare, "plan_to_be_told", telling)

    def step(self, n, length, shortest=1):
        padding = torch.arange(length) >= torch.randint(shortest, length + 1, (n, 1))
        losses = self.model(torch.randint(9, (n, length)), padding).square().sum(1)
        truth = per_example_gradients(losses, trained(self.model))
        assert relative(engm.per_example_grad_norms(self.model, losses), truth.norms) < 1e-9


@pytest.mark.parametrize("by_first_word", [False, True])
@pytest.mark.parametrize("n", [6, 9])
def test_padding_that_is_another_at_every_step(by_first_word, n, monkeypatch):
    stream = Stream(monkeypatch, by_first_word)
    for _ in range(12):
        stream.step(n, 7)
    settled = stream.made
    for _ in range(12):
        stream.step(n, 7)
    assert stream.made == settled <= 4
    assert not stream.told


def test_as_many_words_as_sequences_may_lie_either_way(monkeypatch):
    """What is measured and holds for one batch after all is told by and by, and not measured at every step."""
    stream = Stream(monkeypatch, by_first_word=True)
    for _ in range(40):
        stream.step(7, 7)
    assert stream.made <= STEADY + RESTLESS + 1


def test_sizes_that_no_two_batches_have(monkeypatch):
    stream = Stream(monkeypatch)
    sizes = [(n, length) for n in range(2, 7) for length in range(3, 9)]
    for n, length in sizes:
        stream.step(n, length)
    assert stream.made == RESTLESS
    assert stream.told == len(sizes) - RESTLESS


def test_sizes_that_are_met_often_are_measured_in_the_end(monkeypatch):
    stream = Stream(monkeypatch)
    for length in range(3, 3 + RESTLESS):
        stream.step(5, length)
    for _ in range(STEADY):
        stream.step(5, 11, shortest=11)
    assert (stream.made, stream.told) == (RESTLESS, STEADY)
    for _ in range(3):
        stream.step(5, 11, shortest=11)
    assert (stream.made, stream.told) == (RESTLESS + 1, STEADY)


def test_batches_of_one_example_among_others(monkeypatch):
    stream = Stream(monkeypatch)
    for n, length in [(1, 4), (3, 5), (1, 6), (4, 4), (5, 6), (1, 7), (6, 3), (1, 3), (2, 8)]:
        stream.step(n, length)
