"""Mapping frozen norms to the exact ones, parameter tensor by parameter tensor (design section 2.5).

Every ``every`` training steps the exact gradients of a few examples are computed through the training graph itself,
and one factor per parameter tensor is taken, ``sum exact^2 / sum measured^2`` with every example counting alike. A
fresh factor replaces the old one whole: averaged factors were measured to be worse. A tensor that got no gradient then
keeps what it had; if it never had a factor, one is taken as soon as it gets a gradient.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..distributed import said_by_each
from ..terms.loss_scale import UNSCALED, LossScale
from ..torch_internals import is_recorded
from .factors import Among, FactorKey, Factors, by_tensor
from .probe import ExactSample, error_of, error_of_halves, ratio

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


MOST_ERROR = 0.08  # the default of Calibration.most_error
WORTH = 0.75  # a pass of one's own is taken where its judged error is at most this share of that of borrowed norms


@dataclass(frozen=True)
class _Vote:
    """What one rank says when factors may be due.

    Attributes:
        key: how its norms were measured.
        missing: whether tensors of which there are no factors have gradients.
        due: whether tensors whose factors are due have.
        overdue: whether tensors whose factors are twice as old as they should get have.
        probes: examples that it can probe, where the others take part in that.
        batch: examples in its batch.
    """

    key: FactorKey
    missing: bool
    due: bool
    overdue: bool
    probes: int
    batch: int


class DueError(RuntimeError):
    """Factors would be taken afresh in a step that is recorded, which has to read none of their numbers."""


class Calibration:
    """Factors per parameter tensor, one set for each way of measuring.

    Factors age with the training steps, whether or not a step asks for norms: A-ENGM, which measures every ``tau``
    steps, finds those due that ENGM would. A tensor's factor is taken from examples in which it has a gradient: where a
    calibrating step did not reach it (another branch was taken, the last scale of a residual block begins at 0), the
    next step that does calibrates. A batch that is less than half as large as the one before, as the last of an epoch,
    leaves factors that are due to the next, once.

    A network changes fastest at first, so where ``every`` is 16 or more the first factors are good for an eighth of
    it, the next for a quarter, and so on: three probes more in a whole run. With factors of step 0 the weights were
    7 % off at step 20 of a CIFAR-10 run, with fresh ones 2 %.

    Under ``DistributedDataParallel`` every rank probes examples of its own, and the factors of training steps are taken
    from all of them. All ranks have the same factors then, and know when the next may be due, whatever graphs they have
    themselves; at that step they tell one another what they measured, and those where nothing couples the examples (a
    single one, a branch without batch norm) answer without probes. Factors are kept apart, draws included, from those
    that a rank takes by itself (for a norm to be logged, say), which others may not take. Under ``no_sync``, where
    ranks may have unequally many micro-batches, none are taken together, and steps do not count.

    Factors are judged when they are taken, in two ways, of which the larger error counts: fitted on one half of the
    probed examples and held against the exact norms of the other, both ways; and those that they replace are held
    against the exact norms of today, as they served until now. Borrowed norms of another statistics mode than the
    training step's may be far off while running statistics lag behind the weights: no factor a tensor can mend what
    differs from example to example, and none keeps while the statistics run away, so that such norms are not used
    before factors of theirs have been seen to keep. Steps take a pass of their own then; where its norms, which are
    judged as well, are hardly better, borrowed ones are used all the same. Only examples that have a gradient are drawn
    and judged, as far as there are any.

    Args:
        every: training steps after which factors are taken afresh, once the network has settled.
        examples: examples in a probe, on every rank.

    Attributes:
        sample: the :class:`ExactSample` behind factors that are this process's own.
        shared_sample: the one behind the factors of all ranks.
        steps: training steps so far.
        most_error: judged error of weights from borrowed norms up to which a step uses them; with more it takes norms
            of its own, if these are better by a quarter. Factors are judged by it when they are taken.
        asked: the ways of measuring whose factors were asked for since it was last emptied, and the tensors whose.
    """

    def __init__(self, every: int, examples: int) -> None:
        self.every = every
        self._first = every // 8 if every >= 16 else every
        self.sample = ExactSample(examples)
        self.shared_sample = ExactSample(examples)
        self.steps = 0
        self.most_error = MOST_ERROR
        self.asked: dict[FactorKey, tuple[str, ...]] = {}
        self._factors: dict[FactorKey, Factors] = {}
        self._latest_rows: dict[FactorKey, Among] = {}  # that were asked for

    def faithful(
        self, key: FactorKey, group: ProcessGroup | None = None, *, count: bool = True, couples: bool = True
    ) -> bool:
        """Whether norms that were borrowed as ``key`` says may be used, by their latest judgement.

        True where there is none: of norms that were not borrowed, or of a single probed example.

        Args:
            key: how the norms were measured.
            group: as in :meth:`factors`.
            count: as in :meth:`factors`.
            couples: as in :meth:`factors`.
        """
        if group is not None:
            key = key._replace(all_ranks=True)
            key = key if couples else self._latest_of_all(key)
        elif not count:
            key = self._latest(key)
        known = self._factors.get(key)
        return known is None or known.faithful

    def would_borrow(self) -> bool:
        """Whether a step has a use for norms that are lent to it: it takes them for its own, or judges them anew.

        False where all that were borrowed are judged to be too far off, until their factors are due.

        Raises:
            DueError: factors are due in a step that is recorded.
        """
        borrowed = [key for key in self._factors if key.borrowed]
        names = {key: self._latest_rows[key].names if key in self._latest_rows else None for key in borrowed}
        wanted = {key: self._factors[key].names if of is None else of for key, of in names.items()}
        self.asked.update(wanted)  # a program that does without them ends when they are due
        due = self.due(wanted)
        if due and is_recorded():
            raise DueError("a calibration is due")
        return due or not borrowed or any(self._factors[key].faithful for key in borrowed)

    def verdicts(self) -> tuple[tuple[FactorKey, bool], ...]:
        """Of all borrowed norms that were judged, whether they may be used."""
        judged = [key for key, known in self._factors.items() if key.borrowed and known.error is not None]
        return tuple((key, self._factors[key].faithful) for key in judged)

    def judged_errors(self) -> dict[FactorKey, Tensor]:
        """The judged errors of weights, 0-dimensional, as shares of the exact weights, by how norms were measured.

        They are of examples that are clipped; the weight of one that is not is 1 whatever its norm.
        """
        return {key: known.error for key, known in self._factors.items() if known.error is not None}

    @property
    def is_shared(self) -> bool:
        """Whether factors were taken with other ranks."""
        return any(key.all_ranks for key in self._factors)

    def due(self, keys: Mapping[FactorKey, tuple[str, ...]]) -> bool:
        """Whether factors of any of these tensors may have to be taken afresh in a training step.

        Args:
            keys: by way of measuring, of which there are factors, the tensors.
        """
        return any(self.steps >= self._among(key, names).soonest for key, names in keys.items())

    def missing(self) -> tuple[tuple[FactorKey, tuple[str, ...]], ...]:
        """By way of measuring, the parameter tensors that got no gradient so far, so that they have no factor."""
        return tuple((key, known.missing) for key, known in self._factors.items())

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
        couples: bool = True,
        leaves: Collection[int] | None = None,
        surprises: list[Tensor] | None = None,
    ) -> Tensor | None:
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
            in_step: with a group, all of its ranks take part in every backward pass of each, as under ``fully_shard``.
            couples: whether this rank's examples are coupled; if not there is nothing to probe and None is returned.
            leaves: ids of the tensors that gradients may come to; None: any.
            surprises: where a recorded step notes whether a tensor without a factor got a gradient.

        Raises:
            DueError: factors are due in a step that is recorded.
        """
        names = tuple(name for name, _ in parameters)
        if group is not None:
            key = key._replace(all_ranks=True)
            key = key if couples else self._latest_of_all(key)
        elif not count:
            key = self._latest(key, names, squared_norms)
        rows = self._among(key, names, squared_norms.device)
        if is_recorded():
            reached = [row for row, (_, p) in enumerate(parameters) if leaves is None or id(p) in leaves]
            self._check_recorded(key, rows, reached, squared_norms, group, surprises)
        elif rows.missing or (count and self.steps >= rows.soonest):
            aged, overdue = (rows.aged(self.steps), rows.aged(self.steps, 2)) if count else ([], [])
            vote = _Vote(
                key,
                missing=_any_gradient(squared_norms, rows.missing, parameters, leaves),
                due=_any_gradient(squared_norms, aged, parameters, leaves),
                overdue=_any_gradient(squared_norms, overdue, parameters, leaves),
                probes=int((squared_norms != 0).any(0).sum()) if couples and in_step else 0,
                batch=losses.shape[0],
            )
            said = [vote] if group is None else said_by_each(group, vote if couples else None)
            votes = [each for each in said if each is not None]
            if votes and votes[0].key != key:
                key = votes[0].key
                rows = self._among(key, names, squared_norms.device)
            if _is_time(rows.known, votes):
                self._take(key, rows, squared_norms, losses, parameters, votes, scale, group, in_step, couples)
                rows = self._among(key, names, squared_norms.device)
        return rows.values().to(squared_norms) if couples else None

    def _among(self, key: FactorKey, names: tuple[str, ...], device: torch.device | None = None) -> Among:
        """Where these tensors are among the factors of a way of measuring, which there may be none of yet."""
        known, latest = self._factors.get(key), self._latest_rows.get(key)
        if known is None:
            known = Factors((), torch.ones(0, dtype=torch.float64, device=device), (), ())
        if device is not None and known.values.device != device:  # loaded from elsewhere: copied once, not every step
            known = replace(known, values=known.values.to(device))
        if latest is not None and latest.known is known and latest.names == names:
            return latest
        found = known.among(names)
        if key in self._factors and not is_recorded():
            self._factors[key], self._latest_rows[key] = found.known, found
        return found

    def _check_recorded(
        self,
        key: FactorKey,
        rows: Among,
        reached: Sequence[int],
        squared_norms: Tensor,
        group: ProcessGroup | None,
        surprises: list[Tensor] | None,
    ) -> None:
        """Notes for a step that is recorded what it depends on.

        Raises:
            DueError: factors are due.
        """
        self.asked[key] = names = tuple(rows.names[row] for row in reached)
        missing = sorted(set(rows.missing).intersection(reached))
        if self.steps >= rows.known.among(names).soonest or (missing and group is not None):
            raise DueError("a calibration is due")
        if missing and surprises is not None:
            surprises.append(torch.stack([squared_norms[row] for row in missing]).any())

    def _take(
        self,
        key: FactorKey,
        rows: Among,
        squared_norms: Tensor,
        losses: Tensor,
        parameters: Sequence[tuple[str, Tensor]],
        votes: Sequence[_Vote],
        scale: LossScale,
        group: ProcessGroup | None,
        in_step: bool,
        couples: bool,
    ) -> None:
        """Take factors afresh, with all ranks that voted; the arguments are those of :meth:`factors`."""
        sample = self.sample if group is None else self.shared_sample
        passes = min(max(vote.probes for vote in votes), sample.examples) if in_step else 0
        present = (squared_norms != 0).cpu()
        wanted = sorted({*rows.missing, *rows.aged(self.steps)})
        tensors = [tensor for _, tensor in parameters]
        indices, exact = sample.draw(losses, tensors, scale, present.any(0) & couples, passes, present[wanted])
        known = self._renewed(rows, exact, squared_norms.index_select(1, indices), group)
        self._factors[key] = replace(known, batch=sum(vote.batch for vote in votes))
        self._judge()

    def _renewed(self, rows: Among, exact: Tensor, measured: Tensor, group: ProcessGroup | None) -> Factors:
        """Factors in which those of tensors that have gradients are of today, and judged.

        Args:
            rows: the ``L`` tensors among the factors before.
            exact: squared norms ``[L, k]`` of the probed examples.
            measured: ``[L, k]``, theirs as they were measured.
            group: the ranks to take the factors with.
        """
        known = rows.known
        places = torch.tensor(rows.places, device=exact.device)
        old = known.values.index_select(0, places)
        had = torch.tensor([known.good_for[place] > 0 for place in rows.places], device=old.device)
        fresh, sound = ratio(exact, measured, group)
        values = torch.where(sound, fresh, old.to(fresh))
        error = error_of_halves(exact, measured, values, group)
        aged = {rows.places[row] for row in rows.aged(self.steps)}
        if error is None:
            error = known.error
        elif len(rows.missing) < len(rows.places):
            served = error_of(torch.where(had, old.to(fresh), values), exact, measured, group)
            error = error if served is None else torch.maximum(error, served)
        taken, good_for = list(known.taken), list(known.good_for)
        for place, is_sound in zip(rows.places, sound.tolist(), strict=True):
            if is_sound:
                again = min(2 * good_for[place], self.every) if place in aged else good_for[place]
                taken[place], good_for[place] = self.steps, again or self._first
        return replace(
            known,
            values=known.values.to(fresh).index_copy(0, places, values),
            taken=tuple(taken),
            good_for=tuple(good_for),
            error=error,
            kept=known.kept or bool(aged),
        )

    def _judge(self) -> None:
        """Says of all borrowed norms whether they may be used, after factors were taken: of these, or of one's own."""
        for key, known in self._factors.items():
            if not key.borrowed:
                continue
            if known.error is None:  # it could not be judged; states of versions that judged nothing have none either
                self._factors[key] = replace(known, faithful=known.kept or self.sample.examples == 1)
                continue
            most = self.most_error
            for own_key, own in self._factors.items():
                of_today = max(own.taken, default=0) >= max(known.taken, default=0)
                if not own_key.borrowed and own_key.all_ranks == key.all_ranks and of_today and own.error is not None:
                    most = max(most, float(own.error) / WORTH)
            # A plain measurement took running statistics; nothing is known of it before factors have aged.
            error = float(known.error) if known.kept or key.mode != "plain" else inf
            self._factors[key] = replace(known, faithful=error <= most)

    def _latest_of_all(self, key: FactorKey) -> FactorKey:
        """The key of the latest factors of all ranks for norms that are borrowed, or not, as those of ``key`` are."""
        alike = [other for other in self._factors if other[1:] == key[1:]]
        return max(alike, key=lambda other: max(self._factors[other].taken, default=0), default=key)

    def _latest(self, key: FactorKey, names: tuple[str, ...] = (), squared_norms: Tensor | None = None) -> FactorKey:
        """The key of the latest factors for a way of measuring, of this process or of all ranks.

        Args:
            key: the way of measuring.
            names: the tensors that there have to be factors of,
            squared_norms: if they have gradients by these, ``[L, n]``.
        """
        own_key, shared_key = key._replace(all_ranks=False), key._replace(all_ranks=True)
        shared, own = self._factors.get(shared_key), self._factors.get(own_key)
        if shared is None or (own is not None and max(own.taken, default=0) > max(shared.taken, default=0)):
            return own_key
        if squared_norms is not None and _any_gradient(squared_norms, shared.among(names).missing):
            return own_key
        return shared_key

    def forget(self) -> None:
        """Drop all factors, so that the next request probes afresh (the weights were replaced, say).

        In a distributed run all ranks have to: those that still had factors would not probe.
        """
        self._factors.clear()
        self._latest_rows.clear()

    def state_dict(self) -> dict[str, Any]:
        """Factors, steps and the number of draws; plain containers and tensors."""
        factors = [
            {
                **key._asdict(),
                "names": list(known.names),
                "values": known.values,
                "taken": list(known.taken),
                "good_for": list(known.good_for),
                "batch": known.batch,
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
                by_tensor(entry["taken"], len(entry["names"])),
                by_tensor(entry["good_for"], len(entry["names"])),
                int(entry.get("batch", 0)),
                error=entry.get("error"),  # states of versions that judged nothing have none
                kept=bool(entry.get("kept", True)),  # those of versions that did not look had used them
            )
            for entry in state["factors"]
        }
        self.sample.draws, self.shared_sample.draws = draws, shared
        self.steps, self._factors = steps, factors
        self._judge()


def _is_time(known: Factors, votes: Sequence[_Vote]) -> bool:
    """Whether factors are taken afresh, by what all ranks say of which the examples are coupled."""
    few = 2 * sum(vote.batch for vote in votes) < known.batch
    return any(vote.missing or vote.overdue or (vote.due and not few) for vote in votes)


def _any_gradient(
    squared_norms: Tensor,
    rows: Sequence[int],
    parameters: Sequence[tuple[str, Tensor]] = (),
    leaves: Collection[int] | None = None,
) -> bool:
    """Whether any of some rows of squared norms ``[L, n]`` is not 0; the host waits for the answer.

    Args:
        squared_norms: the norms.
        rows: which of them.
        parameters: whose they are.
        leaves: ids of the tensors that gradients may come to; None: any.
    """
    rows = rows if leaves is None else [row for row in rows if id(parameters[row][1]) in leaves]
    if not rows:
        return False
    return bool((squared_norms if len(rows) == len(squared_norms) else squared_norms[rows]).any())
