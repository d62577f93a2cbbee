"""The picture of a sweep's part: how many seeds a point stands for can be seen."""

import pytest

pytest.importorskip("matplotlib", reason="needs matplotlib: pip install '.[hf]'")

from matplotlib import colors, image

from zokernels.lab.sweeps import plots
from zokernels.lab.sweeps.table import Cell


def blue(path, seeds):
    """Pixels in the colour of the points."""
    cells = [Cell("part", {"lr": lr}, seeds, before=0.5, after=0.7, spread=0.0) for lr in (1, 2)]
    assert plots.draw(cells, path, "A part")
    found = image.imread(path)[..., :3]
    return int((abs(found - colors.to_rgb("C0")).max(axis=-1) < 0.1).sum())


def test_a_point_of_one_seed_is_hollow(tmp_path):
    filled, hollow = blue(tmp_path / "two.png", 2), blue(tmp_path / "one.png", 1)
    # At 120 dots an inch the inside of a point of 6/72 inch has some forty of them.
    assert filled - hollow > 2 * 20
