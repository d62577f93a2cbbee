"""The house as DESIGN has it: imports point down, in no circle, and the lab knocks at the door."""

import ast
from functools import cache
from pathlib import Path

import pytest

import zokernels as zk

PACKAGE = Path(zk.__file__).parent
# From the ground up; a room may use what stands before it. What a line holds is on one floor.
FLOORS = (
    {"noise", "masks"}, {"backends"}, {"ops"}, {"passes"}, {"estimators"}, {"trajectory"},
    {"perturb", "distributed"}, {"optim"}, {"graphs", "hf", "probing"}, {""}, {"lab"}, {"__main__"},
)  # fmt: skip
# The same within the lab.
LAB_FLOORS = (
    {"errors", "files", "hub", "yaml_file"}, {"tasks"}, {"models"}, {"scoring"}, {"runs"},
    {"sweeps", "benchmarks", "verification"}, {"cli"},
)  # fmt: skip
# Public without being in `zokernels.__all__`: what a user imports by its module.
MODULES = {
    "zokernels.noise",
    "zokernels.masks",
    "zokernels.ops",
    "zokernels.estimators",
    "zokernels.hf",
}
# The lab's instruments look at the engine from inside, as no user would.
INSTRUMENTS = "zokernels.lab.benchmarks.instruments"


def names():
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        found[".".join(parts).removesuffix(".__init__")] = path
    return found


@cache
def imports():
    """Of each module, what it imports of the package, anywhere in it: (module, name or None)."""
    modules, found = names(), {}
    for module, path in modules.items():
        found[module] = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found[module] |= {(a.name, None) for a in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{module} imports relatively"
                for a in node.names:
                    whole = f"{node.module}.{a.name}"
                    found[module].add((whole, None) if whole in modules else (node.module, a.name))
        found[module] = {(m, n) for m, n in found[module] if m.split(".")[0] == "zokernels"}
    return found


def floor(module):
    _, room, inner, *_ = [*module.split("."), "", ""]
    above = next(n for n, rooms in enumerate(FLOORS) if room in rooms)
    if room != "lab" or not inner:
        return above, 0
    return above, next(n for n, rooms in enumerate(LAB_FLOORS) if inner in rooms)


@pytest.mark.parametrize("module", sorted(names()))
def test_imports_point_down(module):
    up = [m for m, _ in imports()[module] if floor(m) > floor(module)]
    assert not up, f"{module} imports {up}, which stands above it"


def test_there_is_no_circle():
    graph = {module: {m for m, _ in found} for module, found in imports().items()}
    while True:
        done = {m for m, needed in graph.items() if not needed & graph.keys() - {m}}
        if not done:
            break
        graph = {m: needed for m, needed in graph.items() if m not in done}
    # What is left imports something that is left: a circle, and what leads to it.
    assert not graph


LAB = sorted(m for m in names() if m.startswith("zokernels.lab"))


@pytest.mark.parametrize("module", [m for m in LAB if not m.startswith(INSTRUMENTS)])
def test_the_lab_uses_public_names(module):
    for used, name in imports()[module]:
        if used.startswith("zokernels.lab") or used in MODULES:
            continue
        assert used == "zokernels" and (name is None or name in zk.__all__), f"{used}.{name}"


def test_no_file_is_longer_than_400_lines():
    lines = {m: len(p.read_text(encoding="utf-8").splitlines()) for m, p in names().items()}
    for path in Path(__file__).parents[1].rglob("*.py"):
        lines[path.name] = len(path.read_text(encoding="utf-8").splitlines())
    assert {m: n for m, n in lines.items() if n > 400} == {}
