"""`python -m bench.report`: documents are those of the rows, and what is out of date is named."""

import builtins
import csv
import io
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from made_up import steps_on_a_gpu, whole_study

from bench.report import catalog, document, png, renewal
from bench.report.__main__ import main
from bench.report.parts import Figure
from bench.report.tables import ops as passes
from bench.report.tables import study as tables
from zokernels.lab.benchmarks import results, style

ROOT = Path(__file__).parents[2]
# One of rows that nobody has measured yet is not there.
FIGURES = [
    part
    for part in catalog.PARTS
    if isinstance(part, Figure) and any(results.read(results.FOLDER / s) for s in part.sources)
]


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A copy of the documents and results, to spoil; the command stands in it."""
    root = tmp_path / "checkout"
    for folder in ("docs", "bench/results"):
        shutil.copytree(ROOT / folder, root / folder)
    shutil.copy(ROOT / "README.md", root)
    monkeypatch.chdir(root)
    return root


def report(*options):
    return main(options)


def contents(folder):
    return {p: p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def csv_of(rows):
    file = io.StringIO()
    writer = csv.DictWriter(file, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def change(root, source, column, value, line=0):
    """Another value in one row of a result."""
    path = root / "bench" / "results" / source
    rows = results.read(path)
    rows[line][column] = value
    path.write_text(csv_of(rows), encoding="utf-8")


def test_the_committed_documents_are_up_to_date(capsys):
    assert report("--root", str(ROOT), "--check") == 0, capsys.readouterr().err


def test_the_package_imports_nothing_of_the_checkouts_bench():
    for path in (ROOT / "zokernels").rglob("*.py"):
        assert not re.search(r"^\s*(from|import) bench\b", path.read_text("utf-8"), re.M), path


def test_every_marker_has_a_part_and_every_figure_a_place():
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    texts = {page.relative_to(ROOT).as_posix(): page.read_text(encoding="utf-8") for page in pages}
    found = {(page, name) for page, text in texts.items() for name in document.markers(text)}
    assert found == {(p.page, p.name) for p in catalog.PARTS if not isinstance(p, Figure)}
    shown = set(re.findall(r"figures/([\w-]+\.png)\)", "".join(texts.values())))
    drawn = {p.name for p in (ROOT / "docs").rglob("*.png")}
    # The picture of another program is no figure of rows.
    assert shown == drawn == {f"{part.name}.png" for part in FIGURES} | {"tensorboard.png"}


def test_a_changed_row_is_told_by_every_part_made_of_it_and_then_written(checkout, capsys):
    change(checkout, "replay.csv", "replay_ns", "0.5")
    change(checkout, "quickstart.csv", "dev_after", "0.9")
    before = contents(checkout)
    out = checkout.parent / "out.json"
    assert report("--check", "--json", str(out)) == 1
    assert contents(checkout) == before
    told = capsys.readouterr().err.splitlines()
    stale = [
        "quickstart (docs/finetune.md)", "replay (docs/reliability.md)",
        "accuracy (docs/figures/accuracy.png)",
    ]  # fmt: skip
    assert told == [f"{what} is out of date; run `make report`." for what in stale]
    found = json.loads(out.read_text())["report"]
    assert [p["name"] for p in found if p["state"] == "stale"] == [w.split()[0] for w in stale]

    pytest.importorskip("matplotlib", reason="needs matplotlib: pip install '.[bench]'")
    assert report() == 0
    assert "| 90.0 / " in (checkout / "docs/finetune.md").read_text(encoding="utf-8")
    changed = {
        p.relative_to(checkout).as_posix() for p, b in contents(checkout).items() if b != before[p]
    }
    assert changed == {"docs/finetune.md", "docs/reliability.md", "docs/figures/accuracy.png"}
    assert report("--check") == 0


SPOILED = {
    "empty": lambda data: b"",
    "cut": lambda data: data[:60],
    "of other rows": lambda data: data.replace(b"zokernels-digest\0", b"zokernels-digest\0x"),
    "no picture": lambda data: b"a text",
}


@pytest.mark.parametrize("how", ["gone", *SPOILED])
def test_a_figure_that_is_not_of_these_rows_is_stale(checkout, how, capsys):
    path = checkout / "docs/figures/step.png"
    data = path.read_bytes()
    path.unlink()
    if how in SPOILED:
        path.write_bytes(SPOILED[how](data))
    assert report("--check") == 1
    assert capsys.readouterr().err.startswith("step (docs/figures/step.png) is out of date")


@pytest.mark.parametrize("which", ["version", "style"])
def test_other_drawing_code_makes_a_figure_stale(which, monkeypatch, checkout, capsys):
    if which == "style":
        monkeypatch.setattr(style, "VERSION", style.VERSION + 1)
    else:
        for part in FIGURES:
            monkeypatch.setitem(part.__dict__, "version", part.version + 1)
    assert report("--check") == 1
    assert len(capsys.readouterr().err.splitlines()) == len(FIGURES)


SUMMARY = "<!-- bench:step-summary -->"
BAD = {
    "marker missing": (
        lambda root: edit(root / "docs/performance.md", "<!-- bench:ops -->\n", ""),
        "docs/performance.md needs the lines <!-- bench:ops --> and <!-- /bench:ops -->, once",
    ),
    "marker twice": (
        lambda root: edit(root / "README.md", SUMMARY, 2 * SUMMARY),
        "once each and in this order",
    ),
    "page missing": (lambda root: (root / "docs/study.md").unlink(), "docs/study.md is missing"),
    "rows missing": (
        lambda root: (root / "bench/results/step.csv").unlink(),
        "step (docs/figures/step.png): bench/results/step.csv is missing or has no rows",
    ),
    "only a head": (
        lambda root: (root / "bench/results/hybrid.csv").write_text("split,share\n"),
        "hybrid (docs/optimizers.md): bench/results/hybrid.csv is missing or has no rows",
    ),
    "column missing": (
        lambda root: (root / "bench/results/hybrid.csv").write_text("split,share\n0,1\n"),
        "hybrid can't be made from hybrid.csv: there is no 'reuse_forward'; measure again",
    ),
    "cells missing": (
        lambda root: edit(root / "bench/results/hybrid.csv", "0,False,3,", "0,False,"),
        "bench/results/hybrid.csv can't be read: row 2 has more or fewer cells than the head",
    ),
    "no text": (
        lambda root: (root / "bench/results/hybrid.csv").write_bytes(b"\xff\xfe"),
        "bench/results/hybrid.csv can't be read: 'utf-8' codec",
    ),
    "other rows": (
        lambda root: edit_all(root / "bench/results/study.csv", "minilm", "stories"),
        "accuracy can't be made from study.csv, quickstart.csv: no row is of the parts",
    ),
    "other architectures": (
        lambda root: edit_all(root / "bench/results/codegen.csv", ",90,", to=",70,"),
        "there are no rows of sm_90; measure again",
    ),
    "no number": (
        lambda root: change(root, "ops.csv", "ns_per_weight", "fast", line=1),
        "could not convert string to float: 'fast'; measure again",
    ),
}  # fmt: skip


def edit(path, old, new):
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new, 1), encoding="utf-8")


def edit_all(path, *old, to="other"):
    text = path.read_text(encoding="utf-8")
    for one in old:
        text = text.replace(one, to)
    path.write_text(text, encoding="utf-8")


@pytest.mark.parametrize("case", BAD)
def test_what_cant_be_made_is_refused_and_all_else_is_made(case, checkout, capsys):
    spoil, sentence = BAD[case]
    spoil(checkout)
    change(checkout, "replay.csv", "replay_ns", "0.5")
    assert report() == 2
    assert sentence in capsys.readouterr().err
    assert "0.500 (1.12 × floor)" in (checkout / "docs/reliability.md").read_text(encoding="utf-8")


def test_outside_a_checkout_it_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for options in ([], ["--root", str(tmp_path)], ["--root", str(ROOT / "docs")]):
        assert report(*options) == 2
        told = capsys.readouterr().err
        assert "is no checkout of zokernels" in told and len(told.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_inside_a_folder_of_a_checkout_it_finds_the_root(checkout, monkeypatch):
    monkeypatch.chdir(checkout / "docs" / "figures")
    assert report("--check") == 0


def test_without_matplotlib_tables_are_made_and_figures_refused(checkout, monkeypatch, capsys):
    original = builtins.__import__

    def without(name, *arguments, **options):
        if name.startswith("matplotlib"):
            raise ImportError("No module named 'matplotlib'")
        return original(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    assert report() == 0
    change(checkout, "quickstart.csv", "dev_after", "0.9")
    assert report("--check") == 1
    capsys.readouterr()
    assert report() == 2
    assert "accuracy.png needs matplotlib" in capsys.readouterr().err
    assert "| 90.0 / " in (checkout / "docs/finetune.md").read_text(encoding="utf-8")


def rows_of(part):
    return [results.read(results.FOLDER / source) for source in part.sources]


def test_another_process_draws_the_same_bytes_opaque_and_with_their_digest(checkout):
    pytest.importorskip("matplotlib", reason="needs matplotlib: pip install '.[bench]'")
    from PIL import Image

    shutil.rmtree(checkout / "docs/figures")
    assert report() == 0
    drawn = contents(checkout / "docs/figures")
    shutil.rmtree(checkout / "docs/figures")
    # Sets of names have another order there.
    environment = {**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "bench.report"]
    subprocess.run(command, env=environment, check=True, capture_output=True)
    assert contents(checkout / "docs/figures") == drawn
    for part in FIGURES:
        path = checkout / part.page
        assert png.note(path, style.KEYWORD) == part.digest(rows_of(part), style.VERSION)
        image = Image.open(path)
        assert image.width == style.WIDTH * style.DPI
        # A transparent ground would be black on a dark page.
        assert image.convert("RGBA").getextrema()[3] == (255, 255)


def test_line_ends_of_a_page_stay(checkout):
    page = checkout / "docs/reliability.md"
    page.write_bytes(page.read_bytes() + b"\r\nA line of another editor.\r\n")
    change(checkout, "replay.csv", "replay_ns", "0.5")
    assert report() == 0
    assert page.read_bytes().endswith(b"\r\nA line of another editor.\r\n")


(GPU_FIGURE,) = (part for part in catalog.PARTS if part.name == "gpu-step")
CASES = [pytest.param(GPU_FIGURE, [steps_on_a_gpu], id="gpu-step, all sizes")]
CASES += [pytest.param(part, rows_of(part), id=part.name) for part in FIGURES]
CASES += [
    pytest.param(part, [whole_study, *rows_of(part)[1:]], id=f"{part.name}, whole study")
    for part in FIGURES
    if part.sources[0] == "study.csv"
]


@pytest.mark.parametrize(("part", "rows"), CASES)
def test_no_text_of_a_figure_is_cut_or_covers_another(part, rows):
    pytest.importorskip("matplotlib", reason="needs matplotlib: pip install '.[bench]'")
    from matplotlib.text import Text

    rows = [source() if callable(source) else source for source in rows]
    with style.drawn(part.draw, rows) as figure:
        figure.draw_without_rendering()
        texts = [t for t in figure.findobj(Text) if t.get_visible() and t.get_text().strip()]
        shown = [t for t in texts if t not in _not_drawn(figure)]
        # A pixel less on each side: boxes that touch do not cover.
        boxes = [(t.get_text(), t.get_window_extent().padded(-1)) for t in shown]
        for text, box in boxes:
            assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1, text
            assert figure.bbox.y0 <= box.y0 and box.y1 <= figure.bbox.y1, text
        for (one, a), (other, b) in itertools.combinations(boxes, 2):
            assert not a.overlaps(b), f"{one!r} covers {other!r}"
        assert len(boxes) > 10


@pytest.mark.parametrize(("part", "rows"), [c for c in CASES if c.values[0].name == "study"])
def test_a_panel_of_a_model_has_a_title_of_its_own(part, rows):
    pytest.importorskip("matplotlib", reason="needs matplotlib: pip install '.[bench]'")
    rows = [source() if callable(source) else source for source in rows]
    with style.drawn(part.draw, rows) as figure:
        for column in figure.subfigs:
            titles = [t for axes in column.axes if axes.axison if (t := axes.get_title("left"))]
            assert len(set(titles)) == len(titles) > 2, titles


def _not_drawn(figure):
    """Labels of axes that are off, and of ticks beyond an axis, which are made but not drawn."""
    return [
        label
        for axes in figure.axes
        for axis in (axes.xaxis, axes.yaxis)
        for tick in axis.get_major_ticks() + axis.get_minor_ticks()
        for label in (tick.label1, tick.label2)
        if not axes.axison
        or not min(axis.get_view_interval()) <= tick.get_loc() <= max(axis.get_view_interval())
    ]


def test_a_whole_study_has_a_line_for_every_optimizer_and_a_column_for_every_scheme():
    text = tables.tables(whole_study())
    for scheme in ("full", "lora", "prompt", "bitfit", "full, 16 shots"):
        assert re.search(rf"\| {scheme} \|", text)
    for optimizer in style.OPTIMIZERS:
        assert f"\n| {optimizer} | " in text
    assert "| zo-sgd, 0.0003 | " in text and " ± " in text and "¹" in text


def test_updates_have_a_table_of_their_own_and_a_pass_measured_again_its_last_row():
    rows = [row | {"op": "add_noise_", "variant": ""} for row in rows_of_ops()]
    column = {"speedup_over_fastest_peer": "6.54"}
    again = rows[1] | {"ns_per_weight": "9.8765"}
    update = rows[1] | {"op": "adam", "variant": "stochastic", "ns_per_weight": "5.5"}
    peer = update | {"case": "torch-optim", "variant": ""}
    text = passes.tables([row | column for row in [*rows, again, update, peer]])
    assert "| `add_noise_` gaussian, avx512 | 9.877 (" in text
    assert f"{float(rows[1]['ns_per_weight']):.3f}" not in text
    assert "| `apply_update_` adam gaussian, stochastic, avx512 | " in text
    assert "| `torch.optim`, adam | " in text and " | 6.5 |" in text
    # Rows of before there were updates have the same table.
    assert passes.tables(rows) == passes.tables(rows_of_ops())


def rows_of_ops():
    rows = results.read(results.FOLDER / "ops.csv")
    return [{k: v for k, v in row.items() if k not in ("op", "variant")} for row in rows]


def test_csv_rows_come_back_as_they_were(tmp_path):
    path = tmp_path / "rows.csv"
    results.write(path, ["a", "b"], [{"a": "1, 2", "b": 'say "no"'}])
    assert results.read(path) == [{"a": "1, 2", "b": 'say "no"'}]
    assert results.read(tmp_path / "none.csv") == []
    with path.open(newline="") as file:
        assert next(csv.reader(file)) == ["a", "b"]


def test_a_full_disk_is_told_and_the_page_stays(checkout, monkeypatch, capsys):
    def full(path, text):
        raise OSError(28, "No space left on device")

    change(checkout, "replay.csv", "replay_ns", "0.5")
    before = contents(checkout)
    monkeypatch.setattr(renewal.files, "write_text", full)
    assert report() == 2
    told = capsys.readouterr().err
    assert told == (
        "replay (docs/reliability.md): docs/reliability.md can't be written: "
        "No space left on device.\n"
    )
    assert contents(checkout) == before
