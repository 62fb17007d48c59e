"""A trained network out of its run folder, for people who do not have engm; every file is read back and compared."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Callable
from contextlib import redirect_stdout
from enum import StrEnum
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor, nn

from ..config import RunConfig
from ..data import Dataset, Split
from ..data.extras import import_extra
from ..storage.atomic_files import make_folder, replaced_when_whole
from ..training.building import build_network, load_dataset, load_weights
from .files import RunFolder, Which

_TRIED = (1, 7)  # images of the batches that an exported network is compared on; the program was traced with two
_ROUNDING = 1e-4  # relative to the largest logit: other libraries add up in another order


class ExportFormat(StrEnum):
    """The formats of an export."""

    SAFETENSORS = "safetensors"
    PT = "pt"
    PT2 = "pt2"
    ONNX = "onnx"


def export(
    folder: RunFolder, out: Path, kind: ExportFormat, which: Which = "best", data_root: Path | None = None
) -> int:
    """Writes weights (``safetensors``, or ``pt``: a ``state_dict``) or a program (``pt2``: ``torch.export``, ``onnx``).

    A program takes float32 images ``[n, C, H, W]`` in [0, 1], any n, and returns logits; in ONNX these are called
    ``images`` and ``logits``. What was written is read back, and its outputs are compared with the network's on random
    images, before the file gets its name.

    Args:
        folder: folder of the run.
        out: file to write.
        kind: format of the file.
        which: checkpoint whose weights are written.
        data_root: where a named data set lies, if not where it lay in training; for runs that do not say the shape of
            their images themselves, which are those that are not over.

    Returns:
        The number of finished epochs of the weights.

    Raises:
        FileNotFoundError, CheckpointError: no run, no such checkpoint, or a damaged one.
        ModuleNotFoundError: a package that the format needs is not installed.
        ValueError: the network cannot be exported, or the file gives other outputs; there is no file then.
    """
    config = folder.config(data_root)
    kept = folder.weights(which)
    images = _images(folder, config)
    net = build_network(config, images)
    load_weights(net, kept.weights, images)
    net.eval()
    make_folder(out.absolute().parent)
    again: Callable[[Tensor], Tensor]
    with replaced_when_whole(out) as temporary:
        if kind is ExportFormat.SAFETENSORS:
            from safetensors.torch import load_file, save

            metadata = {"model": config.model, "epoch": str(kept.epoch), "checkpoint": which}
            temporary.write_bytes(save({name: t.contiguous() for name, t in kept.weights.items()}, metadata))
            again = _with_weights(build_network(config, images), load_file(temporary))
        elif kind is ExportFormat.PT:
            _write(temporary, lambda file: torch.save(kept.weights, file))
            again = _with_weights(build_network(config, images), torch.load(temporary, weights_only=True))
        else:
            write = _write_program if kind is ExportFormat.PT2 else _write_onnx
            again = write(net, images.train.shape, temporary)
        _check_alike(net, again, images.train.shape, out)
    return kept.epoch


def _images(folder: RunFolder, config: RunConfig) -> Dataset:
    """A data set without images, of the run's classes and shape, for which its network is built."""
    about = folder.results()["data"] if folder.results_file.is_file() else {}
    if "shape" not in about:  # the run is not over, or from before results said it
        return load_dataset(config, torch.device("cpu"))
    none = Split(torch.empty(0, *about["shape"]), torch.empty(0, dtype=torch.int64))
    return Dataset(about["name"], about["classes"], none, none, none)


def _with_weights(net: nn.Module, weights: dict[str, Tensor]) -> nn.Module:
    net.load_state_dict(weights)
    return net.eval()


def _write(path: Path, save: Callable[[IO[bytes]], None]) -> None:
    """Writes what torch saves by way of memory: torch's own errors of writing are no ``OSError`` and name no file."""
    content = io.BytesIO()
    save(content)
    path.write_bytes(content.getbuffer())


def _write_program(net: nn.Module, shape: tuple[int, int, int], path: Path) -> Callable[[Tensor], Tensor]:
    """Writes a program of ``torch.export``, and reads it."""
    example, dynamic = torch.zeros(2, *shape), ({0: torch.export.Dim("n", min=1)},)
    try:
        program = torch.export.export(net, (example,), dynamic_shapes=dynamic)
    except Exception as error:
        raise ValueError(f"torch.export cannot make a program of this network: {_first_line(error)}") from error
    _write(path, lambda file: torch.export.save(program, file))
    return torch.export.load(path).module()


def _write_onnx(net: nn.Module, shape: tuple[int, int, int], path: Path) -> Callable[[Tensor], Tensor]:
    """Writes a program in ONNX's format, and reads it by its runtime."""
    for name in ("onnx", "onnxscript"):
        import_extra(name, "files of ONNX", extra="onnx")
    runtime = import_extra("onnxruntime", "files of ONNX, which are tried before they are kept,", extra="onnx")
    example, dynamic = torch.zeros(2, *shape), ({0: torch.export.Dim("n", min=1)},)
    talkative = logging.getLogger("torch.onnx")
    level = talkative.level
    talkative.setLevel(logging.ERROR)
    try:
        with redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                net,
                (example,),
                dynamo=True,
                dynamic_shapes=dynamic,
                input_names=["images"],
                output_names=["logits"],
                verbose=False,
            )
    except Exception as error:
        raise ValueError(f"torch.onnx cannot make a program of this network: {_first_line(error)}") from error
    finally:
        talkative.setLevel(level)
    if program is None:
        raise ValueError("torch.onnx made no program of this network")
    path.write_bytes(program.model_proto.SerializeToString())
    session: Any = runtime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])

    def run(x: Tensor) -> Tensor:
        (logits,) = session.run(["logits"], {"images": x.numpy()})
        return torch.from_numpy(logits)

    return run


@torch.no_grad()
def _check_alike(net: nn.Module, again: Callable[[Tensor], Tensor], shape: tuple[int, int, int], out: Path) -> None:
    """Compares what was read back with the network.

    Raises:
        ValueError: they give different outputs.
    """
    for count in _TRIED:
        x = torch.rand(count, *shape, generator=torch.Generator().manual_seed(count))
        expected, found = net(x), again(x)
        if found.shape != expected.shape:
            raise ValueError(
                f"{out}: what was written gives outputs {list(found.shape)} for {count} images, and the network "
                f"{list(expected.shape)}: nothing is kept"
            )
        difference = float((found - expected).abs().max())
        if not difference <= _ROUNDING * max(1.0, float(expected.abs().max())):
            raise ValueError(
                f"{out}: what was written gives other outputs than the network, by up to {difference:.3g}: nothing is "
                "kept"
            )


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip() or 'no reason given').splitlines()[0]}"
