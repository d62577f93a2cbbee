"""Every public name has a docstring and a place in the API reference."""

import importlib
import inspect
import re
from pathlib import Path

import pytest

import zokernels as zk

REFERENCE = Path(__file__).resolve().parents[2] / "docs/reference"
MODULES = ["zokernels", "zokernels.ops", "zokernels.noise", "zokernels.masks"]
try:
    import transformers  # noqa: F401

    MODULES.append("zokernels.hf")
except ImportError:
    pass
NAMES = [f"{m}.{name}" for m in MODULES for name in importlib.import_module(m).__all__]
PAGES = {path: path.read_text(encoding="utf-8") for path in REFERENCE.glob("*.md")}
SHOWN = {name: p for p, text in PAGES.items() for name in re.findall(r"^::: (\S+)", text, re.M)}


def named(path):
    """The object of a dotted name."""
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


@pytest.mark.parametrize("name", NAMES)
def test_a_public_name_has_a_docstring_of_its_own(name):
    doc = vars(named(name)).get("__doc__") if inspect.isclass(named(name)) else named(name).__doc__
    assert doc and len(doc.splitlines()[0].split()) > 2, name


@pytest.mark.parametrize("name", [n for n in NAMES if not inspect.ismodule(named(n))])
def test_a_public_name_is_on_a_page_of_the_reference(name):
    assert any(named(shown) is named(name) for shown in SHOWN)
    short = name.replace("zokernels.", "zk.", 1) if ".hf." not in name else name
    assert f"`{short}`" in PAGES[REFERENCE / "index.md"], name


@pytest.mark.parametrize("name", SHOWN)
def test_the_reference_shows_nothing_that_is_not_there(name):
    if name.startswith("zokernels.hf"):
        pytest.importorskip("transformers", reason="needs the extra hf: pip install '.[hf]'")
    assert inspect.getdoc(named(name))


@pytest.mark.parametrize("name", [n for n in NAMES if inspect.isfunction(named(n))])
def test_a_public_functions_docstring_names_its_arguments(name):
    function = named(name)
    doc = inspect.getdoc(function)
    if re.search(r"as for `|what `\w+` does", doc):
        return
    for parameter in inspect.signature(inspect.unwrap(function)).parameters:
        assert re.search(rf"\b{parameter}\b", doc), parameter


def test_modules_that_are_public_have_a_page():
    for name in zk.__all__:
        if inspect.ismodule(getattr(zk, name)):
            assert (REFERENCE / f"{name}.md").is_file()
