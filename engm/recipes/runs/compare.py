"""Several optimizers, several seeds, everything else alike: a run folder each, and one table."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from engm.checks import NonFiniteError

from ..addresses import is_address, short_name
from ..config import RunConfig
from ..config_files import from_values
from ..methods import canonical_method
from ..processes import Processes
from ..storage.atomic_files import make_folder, read_object, write_json, write_text_atomic
from ..training.building import load_extra, load_in_turn
from .curves import draw
from .folder import RunFolder, train
from .going_on import of_the_same_run
from .refused import Before
from .report import collect, markdown
from .view import View

PLAN = "comparison-plan.json"


@dataclass(frozen=True)
class Plan:
    """What a comparison is of, as its folder keeps it.

    Attributes:
        config: settings of all runs.
        optimizers: names of the optimizers.
        seeds: seeds of the runs.
    """

    config: RunConfig
    optimizers: Sequence[str]
    seeds: Sequence[int]

    @staticmethod
    def is_in(out: Path) -> bool:
        """Whether a folder keeps a plan, so that its comparison can go on without being described again."""
        return (out / PLAN).is_file()

    @classmethod
    def of(cls, out: Path) -> Plan | None:
        """The plan of the comparison in a folder; None where there is none.

        Raises:
            ValueError: it cannot be read.
        """
        path = out / PLAN
        if not cls.is_in(out):
            return None
        found = read_object(path, "settings", "optimizers", "seeds")
        return cls(from_values(found["settings"], source=str(path)), found["optimizers"], found["seeds"])

    def was_trained(self, out: Path) -> bool:
        """Whether some run of this comparison came to anything in its folder, finished or not."""
        names = cells_of(self.config, self.optimizers, self.seeds)
        return any(RunFolder(out / name).was_trained for name in names)

    def going_on(self, config: RunConfig, out: Path) -> RunConfig:
        """The resolved settings with which this comparison goes on in its folder, with other optimizers or seeds maybe.

        Args:
            config: the settings that it is asked to go on with; they are its own, but for its length.
            out: the folder. Where nothing was trained there, settings may still be mended.

        Raises:
            ValueError: they are others, so that one table would compare what cannot be compared.
        """
        if not self.was_trained(out):
            return config.resolved()
        config = replace(config, optimizer=self.config.optimizer, seed=self.config.seed)
        return of_the_same_run(self.config, config, out, lambda: (0, 0), what="comparison")

    def write(self, out: Path) -> None:
        """Keeps the plan in a folder, which is made."""
        make_folder(out)
        settings = self.config.resolved().as_dict()
        found = {"optimizers": list(self.optimizers), "seeds": list(self.seeds), "settings": settings}
        write_json(out / PLAN, found)


def cells_of(config: RunConfig, optimizers: Sequence[str], seeds: Sequence[int]) -> dict[str, RunConfig]:
    """The runs of a comparison by the name of their folder.

    One ``alpha`` is ENGM's and A-ENGM's. N-ENGM, whose threshold is on another quantity, takes a tenth of it, as the
    paper's 0.5 is of 5; F-ENGM goes on normalising to 1.

    Raises:
        ValueError: no optimizer or seed, an unknown one, or one twice.
    """
    names = [canonical_method(name) for name in optimizers]
    folders = [short_name(name) if is_address(name) else name for name in names]
    if not names or not seeds or len(set(folders)) < len(folders) or len(set(seeds)) < len(seeds):
        raise ValueError(f"expected different optimizers and seeds, got {list(optimizers)} and {list(seeds)}")
    if config.alpha == "auto" and set(names) & {"a-engm", "n-engm"}:
        raise ValueError("--alpha auto has no counterpart for A-ENGM and N-ENGM: give a number, or leave it out")
    cells = {}
    for seed in seeds:
        for name, folder in zip(names, folders, strict=True):
            alpha = config.alpha
            if name == "n-engm" and alpha not in ("paper", "scaled"):
                alpha = str(float(alpha) / 10)
            elif name not in ("engm", "a-engm", "n-engm"):
                alpha = "paper"
            cells[f"{folder}-seed{seed}"] = replace(config, optimizer=name, seed=seed, alpha=alpha)
    return cells


def compare(
    config: RunConfig,
    optimizers: Sequence[str],
    seeds: Sequence[int],
    out: Path,
    processes: Processes,
    *,
    view: Callable[[str], AbstractContextManager[View]],
) -> list[dict[str, Any]]:
    """Trains every run in turn (finished ones are not touched), then writes table, figures and curves.

    Args:
        config: settings of all runs; its optimizer and seed do not matter.
        optimizers: names of the optimizers.
        seeds: seeds of the runs; the same for every optimizer, so that runs are paired.
        out: folder of the run folders; gets its plan (:class:`Plan`), ``comparison.md``, ``comparison.json`` and a
            picture, ``comparison.png``, ``.svg`` and ``.pdf``.
        processes: the processes that train a run together.
        view: makes a view of the run with the given name.

    Returns:
        The results of all runs; in other processes than the first, none.

    Raises:
        NonFiniteError: runs diverged; the others were trained and compared.
        ValueError, FileNotFoundError: as :func:`engm.recipes.runs.folder.train`; before anything is trained.
    """
    cells = cells_of(config, optimizers, seeds)
    for name, cell in cells.items():
        RunFolder(out / name).check_free_for(cell)
    shared = config.resolved()
    dataset = load_in_turn(shared, processes)
    for name, cell in cells.items():  # while the plan still says where they lay
        RunFolder(out / name).check_moved(cell.resolved(), lambda: load_extra(shared, dataset, processes.device))
    began, diverged = time.monotonic(), []
    with ExitStack() as stack:
        if processes.first:
            begun: Callable[[], bool] = lambda: any(RunFolder(out / name).exists for name in cells)  # noqa: E731
            stack.enter_context(Before.of(out).again_if_refused(begun))
            Plan(config, optimizers, seeds).write(out)
        for name, cell in cells.items():
            try:
                with view(name) as watching:
                    train(cell, out / name, processes, view=watching, dataset=dataset, began=began)
            except NonFiniteError:
                if processes.world > 1:  # the others may not have noticed
                    raise
                diverged.append(name)
    results, _ = collect([out / name for name in cells if name not in diverged]) if processes.first else ([], [])
    if results:
        write_text_atomic(out / "comparison.md", markdown(results))
        write_json(out / "comparison.json", results)
        draw(results, out / "comparison")
    if diverged:
        raise NonFiniteError(f"{', '.join(diverged)} diverged; the others are in {out}")
    return results
