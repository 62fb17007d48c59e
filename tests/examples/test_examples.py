"""The examples run as they are, and the code in docs/ runs too."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import engm

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted((ROOT / "docs" / "optimizers").glob("*.md"))
SMALL = ["--epochs", "1", "--batch-size", "64", "--alpha", "inf"]


@pytest.mark.parametrize("name", ["plain_loop.py", "norms_only.py"])
def test_example(name: str) -> None:
    found = subprocess.run([sys.executable, ROOT / "examples" / name], capture_output=True, text=True, check=True)
    assert re.search(r"clipped \d+%|oracle", found.stdout), found.stdout


def drop_in(source: str, tmp_path: Path, *arguments: str) -> dict[str, torch.Tensor]:
    """Weights after a run of the training script."""
    script = tmp_path / "script.py"
    script.write_text(source)
    functions = runpy.run_path(str(script))
    args = functions["get_args_parser"]().parse_args([*SMALL, *arguments])
    return {name: tensor.clone() for name, tensor in functions["main"](args).state_dict().items()}


def test_drop_in_is_two_lines_and_without_them_the_script_it_was(tmp_path: Path) -> None:
    """With no bound on the norms both train alike; a resumed run goes on."""
    source = (ROOT / "examples" / "drop_in.py").read_text()
    marked = [line for line in source.splitlines() if re.search(r"# engm(; was: .*)?$", line)]
    assert len(marked) == 3, "an import, one line that is new, and one that changed"
    plain = re.sub(r"\S.*# engm; was: (.*)", r"\1", source)
    plain = "\n".join(line for line in plain.splitlines() if not line.endswith("# engm"))
    assert "engm." not in plain.split('"""', 2)[2]
    wrapped = drop_in(source, tmp_path, "--output-dir", str(tmp_path))
    for name, tensor in drop_in(plain, tmp_path).items():
        torch.testing.assert_close(wrapped[name], tensor, rtol=1e-4, atol=1e-5, msg=name)
    options = ["--epochs", "2", "--alpha", "100", "--clip-grad-norm", "1"]
    further = drop_in(source, tmp_path, "--resume", str(tmp_path / "checkpoint.pth"), *options)
    assert all(tensor.isfinite().all() for tensor in further.values())
    assert further["bn1.num_batches_tracked"] == 2 * wrapped["bn1.num_batches_tracked"]


def test_there_is_a_page_for_every_optimizer() -> None:
    names = {page.stem for page in PAGES}
    assert {"msgd", "gnc", "sngm", "fengm", "nengm", "aengm", "engm", "README", "loops"} == names
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+\.(?:md|py|json))\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_code_of_the_pages_runs(page: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 10))
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    assert blocks or page.stem == "README"
    for block in blocks:
        model = engm.GradNormModule(net)
        names = {
            "engm": engm, "torch": torch, "F": F, "net": net, "model": model,
            "x_adv": torch.rand(8, 3, 8, 8), "x": torch.rand(8, 3, 8, 8), "y": torch.randint(10, (8,)),
            "loader": [(torch.rand(4, 3, 8, 8), torch.randint(10, (4,))) for _ in range(4)],
            "sgd": torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4),
        }  # fmt: skip
        before = [p.detach().clone() for p in net.parameters()]
        exec(block, names)
        assert any(not torch.equal(b, p) for b, p in zip(before, net.parameters(), strict=True)), block
        assert all(p.isfinite().all() for p in net.parameters()), block
