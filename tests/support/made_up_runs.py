"""Folders of runs that nobody trained."""

from __future__ import annotations

import json
from pathlib import Path

from engm.recipes.config import RunConfig
from engm.recipes.config_files import to_toml


def made_up(
    folder: Path,
    *,
    best: float = 0.5,
    processes: int = 1,
    evaluations: list[dict[str, object]] | None = None,
    **config: object,
) -> Path:
    folder.mkdir(parents=True)
    whole = RunConfig(**config).resolved()  # type: ignore[arg-type]
    (folder / "config.toml").write_text(to_toml(whole))
    accuracy = {"natural": 0.9, "robust": best, "examples": 100}
    results = {
        "method": whole.optimizer.upper(),
        "config": whole.as_dict(),
        "data": {"test": 100},
        "test": {"best": accuracy, "last": accuracy},
        "overfit": 0.0,
        "best_epoch": 3,
        "step_seconds": 0.1,
        "machine": {"processes": processes},
        "history": [{"epoch": 1, "loss": "nan", "robust": best, "natural": "inf", "weight_mean": 1.0}],
    }
    (folder / "results.json").write_text(json.dumps(results))
    if evaluations is not None:
        (folder / "evaluation.json").write_text(json.dumps({"best": {"autoattack": evaluations}}))
    return folder
