"""How long captures live and what a step takes, counted in bytes by the CPU allocator's own reports."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.profiler import ProfilerActivity, profile
from training import batch, losses_of, network, sgd

import engm
from engm.capture.hooks import Call

MEGABYTE = 1 << 20


def peak_bytes(work: Callable[[], object]) -> int:
    """The most that ``work`` held at once beyond what was held before: every allocation and release, in order.

    ``work`` runs twice and the second run counts, because the allocator reports no release of a block that it did not
    see allocated (the last step's gradients).
    """
    for _ in range(2):
        gc.collect()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
            work()
    held = peak = 0
    events = [e for e in found.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    assert peak > 0
    return peak


def test_the_meter_counts():
    def work():
        a = torch.ones(MEGABYTE)
        del a
        return torch.ones(MEGABYTE // 2).mul(2).sum()

    assert 4 * MEGABYTE <= peak_bytes(work) < 4 * MEGABYTE + 4096


class Block(nn.Module):
    def __init__(self, channels, out, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False)
        self.norm1 = nn.GroupNorm(4, out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.norm2 = nn.GroupNorm(4, out)
        self.shortcut = nn.Conv2d(channels, out, 1, stride) if (channels, stride) != (out, 1) else nn.Identity()

    def forward(self, x):
        h = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(h + self.shortcut(x))


def resnet(width: int) -> nn.Sequential:
    """ResNet-18's shape. Below 32 channels oneDNN pads its copies, and they outweigh what is looked for."""
    torch.manual_seed(0)
    stages = [(1, 1, 1), (1, 2, 2), (2, 4, 2), (4, 8, 2)]
    blocks = [block for a, b, s in stages for block in (Block(a * width, b * width, s), Block(b * width, b * width, 1))]
    stem = [nn.Conv2d(3, width, 3, padding=1), nn.GroupNorm(4, width), nn.ReLU()]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8 * width, 10))


def images(n, size):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, 3, size, size, generator=generator), torch.arange(n) % 10


def step_peak(make: Callable[[nn.Module], tuple], width: int = 32, n: int = 16) -> int:
    """Peak of a plain training step; ``make`` wraps the network and returns it with optimizer and backward."""
    net = resnet(width)
    model, opt, backward = make(net)
    x, y = images(n, 32)

    def step():
        opt.zero_grad()
        backward(losses_of(model, x, y))
        opt.step()

    step()
    return peak_bytes(step)


def plain(net):
    return net, sgd(net), lambda losses: losses.mean().backward()


def one_pass(net):
    model = engm.GradNormModule(net)
    opt = engm.ENGM(model, sgd(net), 1.0)
    return model, opt, opt.backward


def two_passes(net):
    model = engm.GradNormModule(net)
    opt = engm.ENGM(model, sgd(net), 1.0)
    return model, opt, lambda losses: opt.reweight(losses).mean().backward()


def unclipped(net):
    model = engm.GradNormModule(net)
    opt = engm.MSGD(model, sgd(net))
    return model, opt, opt.backward


class TestPeaks:
    @pytest.fixture(scope="class")
    def plain_peak(self):
        return step_peak(plain)

    @pytest.mark.parametrize(("make", "allowed"), [(one_pass, 0.15), (two_passes, 0.05), (unclipped, 0.01)])
    def test_extra_over_plain_sgd(self, plain_peak, make, allowed):
        """Design section 7: extra peak memory of a plain step."""
        extra = step_peak(make) / plain_peak - 1
        assert extra <= allowed, f"{extra:.1%}"

    @pytest.mark.xfail(strict=True, reason="known: 16 % and 23 % at width 16 (24 % and 21 % at width 32), n = 64")
    @pytest.mark.parametrize(("make", "allowed"), [(one_pass, 0.15), (two_passes, 0.05)])
    def test_extra_where_activations_outweigh_the_weights(self, make, allowed):
        """The same figure with a batch of 64, where feature maps and not parameters make the peak."""
        extra = step_peak(make, width=16, n=64) / step_peak(plain, width=16, n=64) - 1
        assert extra <= allowed, f"{extra:.1%}"

    @pytest.mark.parametrize("norm", ["group", "batch"])
    @pytest.mark.parametrize("measured", [False, True])
    def test_ten_attack_steps_raise_nothing(self, norm, measured):
        head = [nn.ReLU(), nn.Flatten(), nn.Linear(3136, 10)]
        net = resnet(8) if norm == "group" else nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), *head)
        model = engm.GradNormModule(net)
        opt = engm.ENGM(model, sgd(model), 1.0)
        x, y = images(16, 16)

        def attack(adversarial):
            leaf = adversarial.detach().requires_grad_()
            losses = losses_of(model, leaf, y)
            measurement = engm.measure(model, losses, leaf) if measured else None
            gradient = measurement.input_grads if measured else torch.autograd.grad(losses.sum(), leaf)[0]
            return (leaf + 0.01 * gradient.sign()).detach(), measurement

        def step(attack_steps):
            adversarial = x
            for _ in range(attack_steps):
                adversarial, measurement = attack(adversarial)
            opt.zero_grad()
            opt.backward(losses_of(model, adversarial, y), measurement=measurement)
            opt.step()

        step(1)
        step(1)
        assert peak_bytes(lambda: step(10)) <= peak_bytes(lambda: step(2)) + 4096


def live_calls() -> int:
    gc.collect()
    return sum(isinstance(o, Call) for o in gc.get_objects())


def watch(model: nn.Module) -> list[weakref.ref]:
    """Weak references to the inputs that the layers read in the next forward pass."""
    seen = []

    def note(module, args, output):
        seen.append(weakref.ref(args[0].untyped_storage()))

    handles = [m.register_forward_hook(note) for m in model.unwrap().modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    model.unwrap().watching = handles
    return seen


def alive(storages: list[weakref.ref]) -> int:
    gc.collect()
    return sum(ref() is not None for ref in storages)


class TestLifetimes:
    @pytest.mark.parametrize("norm", ["group", "batch"])
    def test_captures_die_with_the_losses(self, norm):
        model = engm.GradNormModule(network(norm))
        before = live_calls()
        x, y = batch()
        losses = losses_of(model, x, y)
        assert live_calls() > before
        engm.per_example_grad_norms(model, losses)
        assert live_calls() > before
        del losses
        assert live_calls() == before

    def test_without_the_cycle_collector(self):
        """Reference counting alone must free a forward pass: memory must not wait for the collector."""
        model = engm.GradNormModule(network("batch"))
        opt = engm.ENGM(model, sgd(model), 1.0)
        x, y = batch()
        opt.backward(losses_of(model, x, y))
        gc.collect()
        gc.disable()
        try:
            for use in (lambda losses: None, opt.backward, opt.reweight, lambda losses: engm.measure(model, losses)):
                seen = watch(model)
                losses = losses_of(model, x, y)
                use(losses)
                del losses
                left = [ref for ref in seen[1:] if ref() is not None]  # the first is the caller's x
                assert not left
                for handle in model.unwrap().watching:
                    handle.remove()
        finally:
            gc.enable()

    @pytest.mark.parametrize("norm", ["group", "batch"])
    @pytest.mark.parametrize("method", [engm.ENGM, engm.NENGM, engm.AENGM, engm.MSGD])
    def test_activations_die_in_backward_though_losses_are_held(self, norm, method):
        model = engm.GradNormModule(network(norm))
        opt = method(model, sgd(model), *([] if method is engm.MSGD else [1.0]))
        x, y = batch()
        opt.backward(losses_of(model, x, y), x)
        seen = watch(model)
        losses = losses_of(model, x, y)
        assert alive(seen) == 3
        opt.backward(losses, x)
        assert alive(seen[1:]) == 0
        assert losses.grad_fn is not None

    def test_activations_die_in_a_plain_backward_too(self):
        model = engm.GradNormModule(network("batch"))
        x, y = batch()
        seen = watch(model)
        losses = losses_of(model, x, y)
        losses.sum().backward()
        assert alive(seen[1:]) == 0
        assert losses.grad_fn is not None

    @pytest.mark.parametrize("method", [engm.ENGM, engm.AENGM])
    def test_three_hundred_steps_leak_nothing(self, method):
        model = engm.GradNormModule(network("batch"), calibrate_every=20)
        opt = method(model, sgd(model, lr=1e-3), 1.0)
        x, y = batch()

        def steps(count):
            for _ in range(count):
                opt.backward(losses_of(model, x, y), x)
                opt.step()
                opt.zero_grad()
            gc.collect()
            objects = gc.get_objects()
            tensors = [o for o in objects if isinstance(o, torch.Tensor) and o.layout == torch.strided]
            return len(objects), sum(tensor.untyped_storage().nbytes() for tensor in tensors)

        steps(30)
        counts = [steps(count) for count in (20, 300, 300, 300)]
        grown = [(after[0] - before[0], after[1] - before[1]) for before, after in pairwise(counts)]
        # What other tests left behind may go or come meanwhile, once; a leak is there every time.
        assert min(abs(objects) for objects, _ in grown) < 30, grown
        assert min(abs(size) for _, size in grown) == 0, grown
        assert len(model.plans) == 1
