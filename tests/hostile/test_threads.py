"""Threads that forward, measure and pause at the same time."""

from __future__ import annotations

import copy
import sys
import threading
from collections.abc import Callable, Iterator

import pytest
from hostile.observers import assert_same, hooks_of
from hostile.right_or_refused import assert_right, network
from oracle import random_losses, tensor
from torch import nn

import engm


@pytest.fixture
def hasty_threads() -> Iterator[None]:
    """Threads take turns as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def in_threads(count: int, work: Callable[[int], None]) -> None:
    """Run ``work(0)``, ``work(1)``, ... at the same time and raise what one of them raised."""
    failures: list[BaseException] = []

    def guarded(number: int) -> None:
        try:
            work(number)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=guarded, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


@pytest.mark.usefixtures("hasty_threads")
def test_pauses_of_several_threads():
    model = engm.GradNormModule(network())

    def work(number: int) -> None:
        for _ in range(2000):
            with model.paused():
                pass

    in_threads(3, work)
    assert_right(model, random_losses(model(tensor(4, 3))))


def test_a_pause_is_of_its_thread_alone():
    model = engm.GradNormModule(network())
    with model.paused():
        in_threads(1, lambda _: assert_right(model, random_losses(model(tensor(4, 3)))))
        with pytest.raises(RuntimeError, match="captured forward pass"):
            engm.measure(model, random_losses(model(tensor(4, 3))))


def test_a_copy_made_in_a_pause_is_not_paused():
    model = engm.GradNormModule(network())
    with model.paused():
        twin = copy.deepcopy(model)
    assert_right(twin, random_losses(twin(tensor(4, 3))))


@pytest.mark.usefixtures("hasty_threads")
def test_threads_that_train_and_call_one_network():
    net = network(nn.LayerNorm(2))
    model, wanted, before = engm.GradNormModule(net), net(tensor(4, 3)), hooks_of(net)

    def work(number: int) -> None:
        for seed in range(20):
            if number:
                assert_right(model, random_losses(model(tensor(4, 3, seed=seed))))
            else:
                assert_same(net(tensor(4, 3)).detach(), wanted.detach())

    in_threads(3, work)
    assert hooks_of(net) == before
