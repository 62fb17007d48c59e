"""Random training loops: whatever happens between forward and backward, right norms or an error without effects."""

from __future__ import annotations

import copy
import io
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hostile.loops import (
    NORMS,
    AddedGradients,
    Graph,
    Interrupted,
    Network,
    assert_close,
    clip_weights,
    clipped_mean,
    optimizer_of,
)
from hostile.observers import REFUSALS, assert_same, hooks_of, outcome, state_of
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, precondition, rule
from oracle import Truth, random_losses, tensor
from torch import Tensor, nn

import engm

LAYERS = ("first", "norm", "middle", "last")
EXCEPTIONS = (KeyboardInterrupt, StopIteration, ValueError, RuntimeError)


class HostileLoop(RuleBasedStateMachine):
    graphs = Bundle("graphs")

    # -- beginnings ------------------------------------------------------------------------------------------

    @initialize(norm=st.sampled_from(list(NORMS)), seed=st.integers(0, 3))
    def start(self, norm: str, seed: int) -> None:
        torch.manual_seed(seed)
        net = Network(norm).double()
        self.adopt(engm.GradNormModule(net, batch_norm="exact"))
        self.pending: list[Graph] = []
        self.user_hooks: list[Any] = []
        self.hooks = hooks_of(net)

    def adopt(self, model: engm.GradNormModule) -> None:
        self.model = model
        sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        self.opt = engm.ENGM(model, sgd, alpha=1.0)

    @property
    def net(self) -> Network:
        return self.model.unwrap()

    def spoil(self) -> None:
        """Something was changed that pending graphs may have saved."""
        for graph in self.pending:
            graph.intact = False

    def keep(self, losses: Tensor, **options: bool) -> Graph:
        graph = Graph(losses, self.model, **options)
        self.pending.append(graph)
        return graph

    # -- forward passes --------------------------------------------------------------------------------------

    @rule(target=graphs, n=st.integers(2, 5), seed=st.integers(0, 9), skip=st.booleans())
    def forward(self, n: int, seed: int, skip: bool) -> Graph:
        self.net.skip = skip
        return self.keep(random_losses(self.model(tensor(n, 3, seed=seed))))

    @rule(target=graphs, n=st.integers(2, 5), seed=st.integers(0, 9))
    def forward_twice(self, n: int, seed: int) -> Graph:
        one, other = (random_losses(self.model(tensor(n, 3, seed=seed + k)), seed=k) for k in range(2))
        return self.keep(one + other.square())

    @rule(target=graphs, n=st.integers(2, 5), direct=st.booleans())
    def forward_uncaptured(self, n: int, direct: bool) -> Graph:
        with self.model.paused(), self.model.paused():
            out = (self.net if direct else self.model)(tensor(n, 3))
        return self.keep(random_losses(out), captured=False)

    @rule(target=graphs, n=st.integers(2, 5))
    def forward_in_another_thread(self, n: int) -> Graph:
        found: list[Tensor] = []
        thread = threading.Thread(target=lambda: found.append(random_losses(self.model(tensor(n, 3)))))
        with self.model.paused():  # here, not there
            thread.start()
            thread.join()
        return self.keep(found[0])

    @rule(n=st.integers(2, 5), context=st.sampled_from([torch.no_grad, torch.inference_mode]))
    def forward_without_gradients(self, n: int, context: Any) -> None:
        if context is torch.inference_mode:
            self.model.eval()  # torch does not notice there that running statistics change which a graph has saved
        twin = copy.deepcopy(self.net)
        with context():
            assert_same(self.model(tensor(n, 3)), twin(tensor(n, 3)))
        assert_same(state_of(self.net)["buffers"], state_of(twin)["buffers"])
        self.spoil()  # running statistics

    @rule(name=st.sampled_from(LAYERS), exception=st.sampled_from(EXCEPTIONS), before=st.booleans())
    def forward_interrupted(self, name: str, exception: type[BaseException], before: bool) -> None:
        """The same exception comes out, and the same state is left, as of the plain network."""
        self.net.skip = False
        twin, found = copy.deepcopy(self.net), []
        for model, net in ((self.model, self.net), (twin, twin)):
            layer, hook = getattr(net, name), Interrupted(exception)
            handle = layer.register_forward_pre_hook(hook) if before else layer.register_forward_hook(hook)
            with pytest.raises(exception, match="on purpose"):
                model(tensor(3, 3))
            handle.remove()
            found.append({**state_of(net), "gradients": None})  # which are not copied
        assert_same(*found)
        self.spoil()

    # -- backward passes -------------------------------------------------------------------------------------

    @rule(graph=graphs, whole=st.booleans())
    def measure(self, graph: Graph, whole: bool) -> None:
        ask = (lambda m, losses: engm.measure(m, losses).norms) if whole else engm.per_example_grad_norms
        before = state_of(graph.model.unwrap(), self.opt)
        self.expect(graph, lambda: ask(graph.model, graph.losses), lambda expected: expected.norms)
        assert_same(state_of(graph.model.unwrap(), self.opt), before)

    @rule(graph=consumes(graphs))
    def backward(self, graph: Graph) -> None:
        """Adds to what lies in ``p.grad``; the graph is used up."""
        opt = optimizer_of(graph.model)
        added = AddedGradients(graph.model.unwrap())
        self.expect(graph, lambda: opt.backward(graph.losses) and added.now(), clipped_mean)
        graph.captured = graph.intact = False

    @rule(graph=consumes(graphs))
    def reweight_and_backward(self, graph: Graph) -> None:
        opt = optimizer_of(graph.model)
        added = AddedGradients(graph.model.unwrap())
        found = self.expect(graph, lambda: opt.reweight(graph.losses), lambda t: graph.losses * clip_weights(t))
        if found is not None and graph.intact:
            found.mean().backward()
            assert_close(added.now(), clipped_mean(graph.truth_before))
        graph.captured = graph.intact = False

    def expect(self, graph: Graph, ask: Callable[[], Tensor], wanted: Callable[[Truth], Tensor]) -> Tensor | None:
        """An answer is right; a refusal changes nothing, and has a reason that plain torch or the rules know."""
        expected = outcome(graph.truth)
        before = state_of(graph.model.unwrap(), self.opt)
        found = outcome(ask)
        if isinstance(found, Exception):
            assert_same(state_of(graph.model.unwrap(), self.opt), before)
            assert isinstance(expected, Exception) or not graph.captured, found
            if graph.intact and not graph.captured:
                assert "captured forward pass" in str(found) or "another GradNormModule" in str(found)
            return None
        assert not isinstance(expected, Exception), expected
        graph.truth_before = expected
        assert_close(found, wanted(expected))
        return found

    @rule(graph=graphs, retain=st.booleans())
    def plain_backward(self, graph: Graph, retain: bool) -> None:
        """The user's own backward pass may free the graph; the engine must not go on with what is gone."""
        if not isinstance(outcome(lambda: graph.losses.sum().backward(retain_graph=retain)), Exception) and not retain:
            graph.captured = graph.intact = False

    @rule(name=st.sampled_from(LAYERS), exception=st.sampled_from(EXCEPTIONS), count=st.integers(1, 3))
    def backward_interrupted(self, name: str, exception: type[BaseException], count: int) -> None:
        """A hook on an activation raises; afterwards the graph is measured as if nothing had been."""
        self.net.skip = False
        hook = Interrupted(exception, count)
        layer = getattr(self.net, name)
        handle = layer.register_forward_hook(
            lambda module, args, out: out.register_hook(hook) and None if out.requires_grad else None
        )
        losses = random_losses(self.model(tensor(4, 3)))
        handle.remove()
        before = state_of(self.net, self.opt)
        try:
            engm.measure(self.model, losses)
        except exception as error:
            if "on purpose" not in str(error):
                raise
        assert_same(state_of(self.net, self.opt), before)
        hook.left = 0
        graph = Graph(losses, self.model)
        self.expect(graph, lambda: engm.measure(self.model, losses).norms, lambda expected: expected.norms)

    @rule(graph=graphs, how=st.sampled_from(["sum", "column", "detached", "list", "none", "nan"]))
    def losses_that_are_none(self, graph: Graph, how: str) -> None:
        losses = graph.losses
        wrong = {
            "sum": losses.sum(),
            "column": losses.unsqueeze(1),
            "detached": losses.detach(),
            "list": list(losses),
            "none": losses[:0],
            "nan": losses * torch.nan,
        }[how]
        before = state_of(graph.model.unwrap(), self.opt)
        for function in (engm.measure, engm.per_example_grad_norms, lambda model, given: self.opt.backward(given)):
            with pytest.raises(REFUSALS):
                function(graph.model, wrong)
        assert_same(state_of(graph.model.unwrap(), self.opt), before)

    @rule(graph=graphs, how=st.sampled_from(["fewer", "twice"]))
    def other_numbers_of_losses(self, graph: Graph, how: str) -> None:
        """They are refused, unless every loss is backpropagated by itself, as through a batch norm's statistics."""
        losses = graph.losses[:-1] if how == "fewer" else torch.cat([graph.losses, graph.losses])
        other = Graph(losses, graph.model, captured=False, intact=False)
        self.expect(other, lambda: engm.measure(graph.model, losses).norms, lambda expected: expected.norms)

    @rule(graph=graphs)
    def two_models_in_one_loss(self, graph: Graph) -> None:
        other = engm.GradNormModule(copy.deepcopy(self.net), batch_norm="exact")
        added = random_losses(other(tensor(len(graph.losses), 3, seed=7)))
        both = Graph(graph.losses + added, graph.model, graph.captured, graph.intact)
        self.expect(both, lambda: engm.measure(graph.model, both.losses).norms, lambda expected: expected.norms)
        with pytest.raises(RuntimeError, match=r"another GradNormModule|captured forward pass"):
            engm.measure(engm.GradNormModule(self.net, batch_norm="exact"), graph.losses)

    # -- what goes on between forward and backward ------------------------------------------------------------

    @rule()
    def step(self) -> None:
        self.opt.step()
        self.spoil()

    @rule(to_none=st.booleans())
    def zero_grad(self, to_none: bool) -> None:
        self.opt.zero_grad(to_none)

    @rule(name=st.sampled_from(LAYERS), on=st.booleans())
    def freeze(self, name: str, on: bool) -> None:
        getattr(self.net, name).requires_grad_(not on)

    @rule(mode=st.booleans())
    def switch_mode(self, mode: bool) -> None:
        self.model.train(mode)

    @rule()
    def load_weights(self) -> None:
        state = {
            name: value * 1.1 if value.is_floating_point() else value for name, value in self.net.state_dict().items()
        }
        self.model.load_state_dict(state)
        self.spoil()

    @rule(name=st.sampled_from(["first", "middle", "last"]))
    def replace_parameter(self, name: str) -> None:
        """The optimizer goes on with the old one, as it would in plain torch."""
        layer = getattr(self.net, name)
        layer.weight = nn.Parameter(layer.weight.detach() * 0.9)

    @rule()
    def replace_layer(self) -> None:
        self.remove_hooks()
        self.net.last = nn.Linear(4, 2).double()
        self.hooks = hooks_of(self.net)

    @rule(name=st.sampled_from(LAYERS), kind=st.sampled_from(["replaces", "tensor", "full backward", "parameter"]))
    def add_hook(self, name: str, kind: str) -> None:
        layer = getattr(self.net, name)
        if kind == "replaces":
            handle = layer.register_forward_hook(lambda module, args, out: out * 1.5)
        elif kind == "tensor":
            handle = layer.register_forward_hook(_halve_backprops)
        elif kind == "full backward":  # torch refuses them where the output is changed in place
            handle = self.net.middle.register_full_backward_hook(lambda module, before, after: None)
        else:
            self.net.last.requires_grad_()
            handle = self.net.last.weight.register_post_accumulate_grad_hook(lambda parameter: None)
        self.user_hooks.append(handle)
        self.hooks = hooks_of(self.net)

    @precondition(lambda self: self.user_hooks)
    @rule()
    def remove_hooks(self) -> None:
        while self.user_hooks:
            self.user_hooks.pop().remove()
        self.hooks = hooks_of(self.net)

    @rule(exception=st.sampled_from(EXCEPTIONS))
    def exception_in_pause(self, exception: type[BaseException]) -> None:
        with pytest.raises(exception), self.model.paused(), self.model.paused():
            raise exception

    @rule()
    def wrap_again(self) -> None:
        self.adopt(engm.GradNormModule(self.model.unwrap(), batch_norm="exact"))

    @precondition(lambda self: not self.user_hooks)  # lambdas cannot be pickled, and a copied layer keeps its hooks
    @rule(how=st.sampled_from(["deepcopy", "pickle", "save"]), paused=st.booleans())
    def go_on_with_a_copy(self, how: str, paused: bool) -> None:
        for parameter in self.net.parameters():
            parameter.grad = None
        with self.model.paused() if paused else torch.enable_grad():
            model = _copied(self.model, how)
        assert_same(dict(model.state_dict()), dict(self.model.state_dict()))
        self.adopt(model)

    # -- always ----------------------------------------------------------------------------------------------

    @invariant()
    def nothing_is_left_on_the_network(self) -> None:
        if hasattr(self, "model"):
            assert hooks_of(self.net) == self.hooks

    def teardown(self) -> None:
        """A new forward pass is measured as on the first day."""
        if not hasattr(self, "model") or not any(p.requires_grad for p in self.net.parameters()):
            return
        graph = Graph(random_losses(self.model(tensor(4, 3))), self.model)
        self.expect(graph, lambda: engm.measure(self.model, graph.losses).norms, lambda expected: expected.norms)


def _halve_backprops(module: nn.Module, args: Any, out: Tensor) -> None:
    if out.requires_grad:
        out.register_hook(lambda gradient: gradient * 0.5)


def _copied(model: engm.GradNormModule, how: str) -> engm.GradNormModule:
    if how == "deepcopy":
        return copy.deepcopy(model)
    if how == "pickle":
        return pickle.loads(pickle.dumps(model))
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


TestRandomLoops = HostileLoop.TestCase
TestRandomLoops.settings = settings(max_examples=settings.default.max_examples, stateful_step_count=40)
