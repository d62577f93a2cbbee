"""A newcomer who follows CONTRIBUTING.md gets an optimizer and a distribution that work."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import zokernels

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"```python\n# (zokernels/\S+)\n(.*?)```", re.S)

TRY_BOTH = """
import torch
import zokernels as zk
from zokernels.optim.clipped import ZOSGDClipped

def made(bound, **options):
    torch.manual_seed(0)
    model = torch.nn.Linear(5, 3)
    opt = ZOSGDClipped(model, lr=0.1, bound=bound, seed=3, **options)
    log = opt.record(f"{bound}.zkt") if not options else None
    for _ in range(3):
        opt.step(lambda: 1e3 * model(torch.ones(2, 5)).square().mean())
    if log is not None:
        log.close()
    return model, opt

model, opt = made(0.5)
assert max(map(abs, opt.projected_gradients)) > 0.5
torch.manual_seed(0)
base = torch.nn.Linear(5, 3)
zk.replay(base, "0.5.zkt")
assert all(map(torch.equal, base.parameters(), model.parameters()))
free, _ = made(1e9)
assert not torch.equal(free.weight, model.weight)

made(1e9, dist="uniform")
w = torch.zeros(1000)
zk.ops.add_noise_([w], [7], [1.0], dist="uniform")
assert torch.equal(w, zk.noise.uniform(1000, seed=7)) and w.abs().max() < 3**0.5
assert abs(w.var() - 1) < 0.1
try:
    zk.ops.add_noise_([w], [7], [1.0], dist="uniform", backend="native")
except (ValueError, RuntimeError) as error:
    assert "native" in str(error)
else:
    raise AssertionError("the native backend ran a distribution that it has not")
"""


def test_the_blocks_of_the_page_make_an_optimizer_and_a_distribution(tmp_path):
    package = Path(zokernels.__file__).parent
    shutil.copytree(package, tmp_path / "zokernels", ignore=shutil.ignore_patterns("__pycache__"))
    blocks = BLOCK.findall((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"))
    assert [path for path, _ in blocks] == ["zokernels/optim/clipped.py", "zokernels/noise.py"]
    for path, code in blocks:
        with (tmp_path / path).open("a", encoding="utf-8") as file:
            file.write("\n\n" + code)
    run = subprocess.run(
        [sys.executable, "-c", TRY_BOTH], cwd=tmp_path, capture_output=True, text=True,
        env={"PYTHONPATH": str(tmp_path), "PATH": ""}, timeout=120,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("path", sorted(set(re.findall(
    r"`((?:zokernels|tests|bench|docs)/[\w./]+\.(?:py|md))`",
    (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"),
))))  # fmt: skip
def test_a_file_that_the_page_names_is_there(path):
    made_by_the_reader = path == "zokernels/optim/clipped.py"
    assert made_by_the_reader or (ROOT / path).is_file()
