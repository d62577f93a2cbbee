"""Groups of other shapes to be timed: a file of them, and what is refused in it."""

import pytest

from bench.gpu import ops
from zokernels.lab.benchmarks import shapes
from zokernels.lab.cli import main
from zokernels.lab.errors import InputError


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("op,dist,rows\n", "must be a CSV with the columns op, dist, rows, warps, registers"),
        ("op,dist,rows,warps,registers\n", "with 0 lines"),
        ("op,dist,rows,warps,registers\nmul,gaussian,512,4,\n", "line 2: got 'mul' and 'gaussian'"),
        ("op,dist,rows,warps,registers\nsign,cauchy,512,4,\n", "dist one of gaussian, rademacher"),
        (
            "op,dist,rows,warps,registers\nsign,gaussian,500,4,\n",
            "rows is '500', but it must be a power",
        ),
        ("op,dist,rows,warps,registers\nsign,gaussian,512,32,\n", "warps is '32'.*from 1 to 16"),
        ("op,dist,rows,warps,registers\nsign,gaussian,64,4,\n", "4 warps are 128 threads"),
        ("op,dist,rows,warps,registers\nsign,gaussian,512\n", "warps is ''"),
        ("op,dist,rows,warps,registers\nsign,gaussian,512,4,8\n", "registers is '8'.*from 24"),
        (None, "cannot be read"),
    ],
)
def test_shapes_that_are_none_are_refused(tmp_path, text, message):
    path = tmp_path / "shapes.csv"
    if text is not None:
        path.write_text(text)
    with pytest.raises(InputError, match=message):
        shapes.read(path)


def test_the_shapes_that_are_tried_are_others_than_the_tables():
    pytest.importorskip("triton", reason="needs triton: pip install triton (Linux)")
    from zokernels.backends.triton import launch
    from zokernels.noise import KINDS

    tried = shapes.read(ops.SHAPES)
    assert len(set(tried)) == len(tried) >= 15
    for one in tried:
        kind, is_add = KINDS[one.dist], one.op.startswith("add_noise")
        own = (
            launch.shape_of_add_noise(kind, True)
            if is_add
            else launch.shape_of_update(kind, one.op, wide=False)
        )
        assert (one.rows, one.warps, one.registers) != own


def test_shapes_are_for_a_gpu(capsys):
    assert main(["bench", "ops", "--device", "cpu", "--shapes", str(ops.SHAPES)]) == 2
    assert "--shapes is for the Triton kernels, but --device is cpu" in capsys.readouterr().err
