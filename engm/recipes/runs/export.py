"""A trained network out of its run folder, for people who do not have engm."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path

import torch

from ..storage.atomic_files import make_folder, replaced_when_whole
from ..training.building import build_network, load_dataset, load_weights
from .files import RunFolder, Which


class ExportFormat(StrEnum):
    """The formats of an export."""

    SAFETENSORS = "safetensors"
    PT = "pt"
    PT2 = "pt2"


def export(
    folder: RunFolder, out: Path, kind: ExportFormat, which: Which = "best", data_root: Path | None = None
) -> int:
    """Writes the weights (``safetensors``, or ``pt``: a ``state_dict``) or the program (``pt2``: ``torch.export``).

    A program takes float32 images ``[n, C, H, W]`` in [0, 1], any n, and returns logits.

    Args:
        folder: folder of the run.
        out: file to write.
        kind: format of the file.
        which: checkpoint whose weights are written.
        data_root: where a named data set lies, if not where it lay in training; a program needs its shapes.

    Returns:
        The number of finished epochs of the weights.

    Raises:
        FileNotFoundError, CheckpointError: no run, no such checkpoint, or a damaged one.
    """
    config = folder.config(data_root)
    kept = folder.weights(which)
    if kind is ExportFormat.PT2:
        dataset = load_dataset(config, torch.device("cpu"))
        net = build_network(config, dataset)
        load_weights(net, kept.weights, dataset)
        batch = torch.export.Dim("n", min=1)
        example = torch.zeros(2, *dataset.train.shape)
        program = torch.export.export(net.eval(), (example,), dynamic_shapes=({0: batch},))
    make_folder(out.absolute().parent)
    with replaced_when_whole(out) as temporary:
        if kind is ExportFormat.SAFETENSORS:
            from safetensors.torch import save

            metadata = {"model": config.model, "epoch": str(kept.epoch), "checkpoint": which}
            temporary.write_bytes(save({name: t.contiguous() for name, t in kept.weights.items()}, metadata))
        elif kind is ExportFormat.PT:
            torch.save(kept.weights, temporary)
        else:
            torch.export.save(program, temporary)
    return kept.epoch
