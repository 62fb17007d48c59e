"""Mapping frozen norms to the exact ones, parameter tensor by parameter tensor (design section 2.5).

Every ``every`` training steps the exact gradients of a few examples are computed through the training graph itself,
and one factor per parameter tensor is taken, ``sum exact^2 / sum measured^2`` with every example counting alike. A
fresh factor replaces the old one whole: averaged factors were measured to be worse.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..distributed import fewest, total
from ..exact import exact_squared_norms
from ..terms.loss_scale import UNSCALED, LossScale
from ..torch_internals import is_recorded, unrecorded

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class FactorKey(NamedTuple):
    """How norms were measured; each way of measuring has calibration factors of its own.

    Attributes:
        mode: the measurement's (:class:`engm.Measurement`).
        borrowed: whether the measurement was of another graph than the training step's.
        all_ranks: whether the factors are taken from the examples of all ranks together.
    """

    mode: str
    borrowed: bool
    all_ranks: bool = False


class ExactSample:
    """Draws a few examples and computes their exact squared norms.

    Args:
        examples: how many are drawn (all, if the batch is smaller).
        seed: what the draws come from. The k-th draw is a function of ``seed`` and ``k`` alone, so that a resumed run
            repeats it.
    """

    def __init__(self, examples: int, seed: int = 0) -> None:
        self.examples = examples
        self.seed = seed
        self.draws = 0

    def draw(
        self,
        losses: Tensor,
        parameters: Sequence[Tensor],
        scale: LossScale = UNSCALED,
        most: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Returns ``(indices [k], exact squared norms [L, k])``; ``scale`` is on the losses inside the passes.

        ``k`` is ``examples``, or fewer where the batch has fewer or only ``most`` are allowed.
        """
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.draws)  # only 32 bits of it count
        self.draws += 1
        indices = torch.randperm(losses.shape[0], generator=generator, device="cpu")
        indices = indices[: self.examples if most is None else min(most, self.examples)].sort().values
        exact = exact_squared_norms(losses, parameters, indices.tolist(), scale)
        return indices.to(losses.device, non_blocking=True), exact


class DeviceFlag:
    """A truth value computed on the device, which the host reads once it has arrived.

    Args:
        value: boolean, 0-dimensional.
        wait: wait for it when it is asked for. Where several processes must draw the same conclusion at the same step,
            its arrival, which no two devices time alike, must not decide.
    """

    def __init__(self, value: Tensor, *, wait: bool = False) -> None:
        self._wait = wait
        self._arrived: torch.cuda.Event | None = None
        if not value.is_cuda:
            self._value = value
            return
        self._value = torch.empty((), dtype=torch.bool, device="cpu", pin_memory=True).copy_(value, non_blocking=True)
        self._arrived = torch.cuda.Event()
        self._arrived.record(torch.cuda.current_stream(value.device))

    def known_false(self) -> bool:
        """Whether the value has arrived and is false."""
        if self._arrived is not None:
            # Asking an event is not allowed while a graph is captured.
            if torch.cuda.is_current_stream_capturing():
                return False
            if self._wait:
                self._arrived.synchronize()
            elif not self._arrived.query():
                return False
            self._arrived = None
        with unrecorded():  # steps that are replayed ask before they are
            return not bool(self._value)

    def __getstate__(self) -> dict[str, Any]:  # an event can neither be copied nor pickled
        if self._arrived is not None:
            self._arrived.synchronize()
        return {"_arrived": None, "_value": self._value, "_wait": self._wait}


MOST_ERROR = 0.08  # the default of Calibration.most_error
ROUNDING = 30  # epsilons of a type that a gradient of rounding alone may have, as a share of the whole gradient
WORTH = 0.75  # a pass of one's own is taken where its judged error is at most this share of that of borrowed norms


@dataclass(frozen=True)
class Factors:
    """Calibration factors of one way of measuring.

    Attributes:
        names: the parameter tensors.
        values: ``[L]``, one factor a parameter tensor.
        taken: the training step at which they were taken.
        good_for: training steps after which they are due to be replaced; 0 if they could not be taken.
        sound: whether all of them could be taken, where that is not known yet.
        error: 0-dimensional, the judged error of weights; None where that was not judged.
        kept: whether the judgement is of factors that had aged, too.
        faithful: of borrowed norms, whether they may be used, where they were judged.
    """

    names: tuple[str, ...]
    values: Tensor
    taken: int
    good_for: int
    sound: DeviceFlag | None = None
    error: Tensor | None = None
    kept: bool = False
    faithful: DeviceFlag | None = None

    def lifetime(self) -> int:
        """``good_for``, or 0 once it is known that they could not be taken."""
        return 0 if self.sound is not None and self.sound.known_false() else self.good_for


class DueError(RuntimeError):
    """Factors would be taken afresh in a step that is recorded, which has to read none of their numbers."""


class Calibration:
    """Factors per parameter tensor, one set for each way of measuring.

    Factors age with the training steps, whether or not a step asks for norms: A-ENGM, which measures every ``tau``
    steps, finds those due that ENGM would.

    A network changes fastest at first, so where ``every`` is 16 or more the first factors are good for an eighth of
    it, the next for a quarter, and so on: three probes more in a whole run. With factors of step 0 the weights were
    7 % off at step 20 of a CIFAR-10 run, with fresh ones 2 %.

    Under ``DistributedDataParallel`` every rank probes examples of its own, and the factors of training steps are taken
    from all of them. All ranks have the same factors then, and agree on when the next are due. They are kept apart,
    draws included, from those that a rank takes by itself (for a norm to be logged, say), which others may not take.

    Factors are judged when they are taken, in two ways, of which the larger error counts: fitted on one half of the
    probed examples and held against the exact norms of the other, both ways; and those that they replace are held
    against the exact norms of today, as they served until now. Borrowed norms of another statistics mode than the
    training step's may be far off while running statistics lag behind the weights: no factor a tensor can mend what
    differs from example to example, and none keeps while the statistics run away, so that such norms are not used
    before factors of theirs have been seen to keep. Steps take a pass of their own then; where its norms, which are
    judged as well, are hardly better, borrowed ones are used all the same.

    Args:
        every: training steps after which factors are taken afresh, once the network has settled.
        examples: examples in a probe, on every rank.

    Attributes:
        sample: the :class:`ExactSample` behind factors that are this process's own.
        shared_sample: the one behind the factors of all ranks.
        steps: training steps so far.
        most_error: judged error of weights from borrowed norms up to which a step uses them; with more it takes norms
            of its own, if these are better by a quarter. Factors are judged by it when they are taken.
        asked: the ways of measuring whose factors were asked for since it was last emptied.
    """

    def __init__(self, every: int, examples: int) -> None:
        self.every = every
        self._first = every // 8 if every >= 16 else every
        self.sample = ExactSample(examples)
        self.shared_sample = ExactSample(examples)
        self.steps = 0
        self.most_error = MOST_ERROR
        self.asked: set[FactorKey] = set()
        self._factors: dict[FactorKey, Factors] = {}

    def faithful(self, key: FactorKey, group: ProcessGroup | None = None) -> bool:
        """Whether norms that were borrowed as ``key`` says may be used, by their latest judgement.

        True where there is none: of norms that were not borrowed, or of a single probed example. Waits for the device
        when it is asked for the first time after factors were taken.

        Args:
            key: how the norms were measured.
            group: the ranks that the factors were taken with.
        """
        known = self._factors.get(key if group is None else key._replace(all_ranks=True))
        return known is None or known.faithful is None or not known.faithful.known_false()

    def would_borrow(self) -> bool:
        """Whether a step has a use for norms that are lent to it: it takes them for its own, or judges them anew.

        False where all that were borrowed are judged to be too far off, until their factors are due.

        Raises:
            DueError: factors are due in a step that is recorded.
        """
        borrowed = [key for key in self._factors if key.borrowed]
        self.asked.update(borrowed)  # a program that does without them ends when they are due
        due = self.due(borrowed)
        if due and is_recorded():
            raise DueError("a calibration is due")
        return due or not borrowed or any(map(self.faithful, borrowed))

    def verdicts(self) -> tuple[tuple[FactorKey, bool], ...]:
        """What :meth:`faithful` says of every way of measuring that was judged."""
        judged = [key for key, known in self._factors.items() if known.faithful is not None]
        return tuple((key, self.faithful(key)) for key in judged)

    def judged_errors(self) -> dict[FactorKey, Tensor]:
        """The judged errors of weights, 0-dimensional, as shares of the exact weights, by how norms were measured.

        They are of examples that are clipped; the weight of one that is not is 1 whatever its norm.
        """
        return {key: known.error for key, known in self._factors.items() if known.error is not None}

    def due(self, keys: Iterable[FactorKey]) -> bool:
        """Whether any of these factors, which there are, would be taken afresh in a training step."""
        return any(self.steps - known.taken >= known.lifetime() for known in map(self._factors.__getitem__, keys))

    def carried(self) -> dict[FactorKey, Tensor]:
        """The factors that there are, which a step reads."""
        return {key: known.values for key, known in self._factors.items()}

    def carry(self, values: Mapping[FactorKey, Tensor]) -> None:
        """Put other tensors in the place of those of :meth:`carried`."""
        self._factors = {
            key: replace(known, values=values.get(key, known.values)) for key, known in self._factors.items()
        }

    def advance(self) -> None:
        """One training step is over."""
        self.steps += 1

    def factors(
        self,
        key: FactorKey,
        squared_norms: Tensor,
        losses: Tensor,
        parameters: Sequence[tuple[str, Tensor]],
        *,
        count: bool,
        scale: LossScale = UNSCALED,
        group: ProcessGroup | None = None,
        in_step: bool = False,
    ) -> Tensor:
        """The factors ``[L]`` for norms that were measured as ``key`` says, taken afresh when they are due.

        With a ``group`` all of its ranks have to call it: those that probe do so together.

        Args:
            key: how the norms were measured.
            squared_norms: ``[L, n]``, measured.
            losses: ``[n]``, the same examples' losses on the training graph.
            parameters: names and tensors of the ``L`` rows.
            count: whether this is a training step, which replaces factors that are too old; if not, any will do, the
                latest of this rank's and of all ranks'.
            scale: on the losses inside the exact passes.
            group: the ranks to take the factors with; None: by itself.
            in_step: with a group, all of its ranks take part in every backward pass of each, as under ``fully_shard``:
                each then probes as many examples as the rank with the fewest can.

        Raises:
            DueError: factors are due in a step that is recorded.
        """
        names = tuple(name for name, _ in parameters)
        if group is not None:
            key = key._replace(all_ranks=True)
        elif not count:
            key = self._latest(key, names)
        self.asked.add(key)
        known = self._factors.get(key)
        if known is not None and known.names != names:
            known = None
        if known is None or (count and self.steps - known.taken >= known.lifetime()):
            if is_recorded():
                raise DueError("a calibration is due")
            old = None if known is None else known.values
            lifetime = 0 if known is None else known.lifetime()
            good_for = min(2 * lifetime, self.every) if lifetime else self._first
            most = fewest(group, losses.shape[0], losses.device) if in_step and group is not None else None
            sample = self.sample if group is None else self.shared_sample
            indices, exact = sample.draw(losses, [parameter for _, parameter in parameters], scale, most)
            measured = squared_norms.index_select(1, indices)
            values, sound = _ratio(exact, measured, old, group)
            flag = DeviceFlag(sound, wait=group is not None)
            error = _error_of_halves(exact, measured, group)
            aged = old if lifetime else None
            if error is not None and aged is not None:
                error = torch.maximum(error, _error_of(aged, exact, measured, group))
            known = Factors(names, values, self.steps, good_for, flag, error, kept=aged is not None)
            self._factors[key] = known
            self._judge()
        if known.values.device != squared_norms.device:  # loaded from elsewhere: copied once, not every step
            known = self._factors[key] = replace(known, values=known.values.to(squared_norms.device))
        return known.values.to(squared_norms)

    def _judge(self) -> None:
        """Says of all borrowed norms whether they may be used, after factors were taken: of these, or of one's own."""
        for key, known in self._factors.items():
            if not key.borrowed or known.error is None:
                continue
            most = torch.full_like(known.error, self.most_error)
            for own_key, own in self._factors.items():
                if not own_key.borrowed and own_key.all_ranks == key.all_ranks and own.taken >= known.taken:
                    most = most if own.error is None else torch.maximum(most, own.error.to(most) / WORTH)
            # A plain measurement took running statistics; nothing is known of it before factors have aged.
            error = known.error if known.kept or key.mode != "plain" else torch.full_like(known.error, inf)
            self._factors[key] = replace(known, faithful=DeviceFlag(error <= most, wait=True))

    def _latest(self, key: FactorKey, names: tuple[str, ...]) -> FactorKey:
        """The key of the latest factors for a way of measuring, of this process or of all ranks."""
        own_key, shared_key = key._replace(all_ranks=False), key._replace(all_ranks=True)
        shared, own = self._factors.get(shared_key), self._factors.get(own_key)
        if shared is None or shared.names != names:
            return own_key
        older = own is None or own.names != names or own.taken <= shared.taken
        return shared_key if older else own_key

    def forget(self) -> None:
        """Drop all factors, so that the next request probes afresh (the weights were replaced, say).

        In a distributed run all ranks have to: those that still had factors would not probe.
        """
        self._factors.clear()

    def state_dict(self) -> dict[str, Any]:
        """Factors, steps and the number of draws; plain containers and tensors."""
        factors = [
            {
                **key._asdict(),
                "names": list(known.names),
                "values": known.values,
                "taken": known.taken,
                "good_for": known.lifetime(),
                "error": known.error,
                "kept": known.kept,
            }
            for key, known in self._factors.items()
        ]
        draws = {"draws": self.sample.draws, "shared_draws": self.shared_sample.draws}
        return {**draws, "steps": self.steps, "factors": factors}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`; nothing is changed if ``state`` is no such dict.

        Raises:
            ValueError: the state was written by an engm that named factors by texts.
        """
        if isinstance(state["factors"], Mapping):
            raise ValueError(
                "this calibration state was written by an older engm, which named its factors otherwise. Set its entry "
                "'factors' to [] to go on with factors that are taken afresh at the next step."
            )
        draws, shared, steps = int(state["draws"]), int(state["shared_draws"]), int(state["steps"])
        factors = {
            FactorKey(entry["mode"], bool(entry["borrowed"]), bool(entry["all_ranks"])): Factors(
                tuple(entry["names"]),
                entry["values"],
                int(entry["taken"]),
                int(entry["good_for"]),
                error=entry.get("error"),  # states of versions that judged nothing have none
                kept=bool(entry.get("kept", True)),  # those of versions that did not look had used them
            )
            for entry in state["factors"]
        }
        self.sample.draws, self.shared_sample.draws = draws, shared
        self.steps, self._factors = steps, factors
        self._judge()


def _ratio(exact: Tensor, measured: Tensor, old: Tensor | None, group: ProcessGroup | None) -> tuple[Tensor, Tensor]:
    """Factors ``[L]`` from squared norms ``[L, k]``, and whether all are sound (boolean, 0-dimensional).

    Each example's squares are divided by its whole exact squared norm first, so that every example counts alike. Plain
    sums follow the few with the largest gradients, and 16 examples are few: over a CIFAR-10 run the mean error of the
    weights was 4.0 % this way against 6.1 % (frozen) and 3.3 % against 4.0 % (with the local correction); on digits
    there was no difference (benchmarks/results/cpu/fidelity_*.json).
    The sums run over the probes of all ranks of the ``group``, in one all-reduce of ``2 L`` numbers.
    Where a sum is not finite the old factor stays (without one: 1), and the caller should try again soon.
    """
    exact_sum, measured_sum = total(group, *_even_sums(exact, measured))
    sound = torch.isfinite(exact_sum) & torch.isfinite(measured_sum)
    fresh = _quotients(exact_sum, measured_sum, exact.dtype)
    return torch.where(sound, fresh, torch.ones_like(fresh) if old is None else old.to(fresh)), sound.all()


def _error_of_halves(exact: Tensor, measured: Tensor, group: ProcessGroup | None) -> Tensor | None:
    """Mean error of the weights of probed examples by factors from others, 0-dimensional; None for a single example.

    Every second example of each rank's probe, squared norms ``[L, k]``, is one half. It is an estimate for factors from
    half as many examples as are used, so a little too large.
    """
    if exact.shape[1] < 2 and group is None:
        return None
    halves = [(exact[:, first::2], measured[:, first::2]) for first in (0, 1)]
    sums = total(group, *(part for half in halves for part in _even_sums(*half)))
    factors = [_quotients(sums[0], sums[1], exact.dtype), _quotients(sums[2], sums[3], exact.dtype)]
    errors = [_errors(others, *half).sum() for half, others in zip(halves, reversed(factors), strict=True)]
    return _mean(errors[0] + errors[1], exact.shape[1], group)


def _error_of(factors: Tensor, exact: Tensor, measured: Tensor, group: ProcessGroup | None) -> Tensor:
    """Mean error of the weights of probed examples by these factors, 0-dimensional, from squared norms ``[L, k]``."""
    return _mean(_errors(factors.to(exact.device), exact, measured).sum(), exact.shape[1], group)


def _errors(factors: Tensor, exact: Tensor, measured: Tensor) -> Tensor:
    """Errors ``[k]`` of weights as shares of the exact ones: ``|exact norm / mapped norm - 1|``, as of alpha / norm."""
    exact = exact.double().sum(0)
    ratios = exact / (measured.double() * factors.double().unsqueeze(1)).sum(0)
    return torch.where(exact > 0, (ratios.sqrt() - 1).abs(), torch.zeros_like(ratios))


def _mean(errors: Tensor, examples: int, group: ProcessGroup | None) -> Tensor:
    """The mean over the examples of all ranks from this one's sum."""
    errors, count = total(group, errors, torch.full_like(errors, examples))
    return errors / count


def _even_sums(exact: Tensor, measured: Tensor) -> tuple[Tensor, Tensor]:
    """Sums ``[L]`` of both over the examples, each of which counts alike."""
    exact, measured = exact.double(), measured.double()
    whole = exact.sum(0)
    share = torch.where(whole > 0, 1 / whole, torch.zeros_like(whole))
    return (exact * share).sum(1), (measured * share).sum(1)


def _quotients(exact: Tensor, measured: Tensor, dtype: torch.dtype) -> Tensor:
    """Factors from even sums of squares that were formed in ``dtype``; 1 where there is nothing to map.

    Nor is there where both are rounding, as of a bias in front of a batch norm: their quotient would be any number.
    """
    rounding = torch.maximum(exact, measured) <= (ROUNDING * torch.finfo(dtype).eps) ** 2
    return torch.where((measured == 0) | rounding, torch.ones_like(exact), exact / measured)
