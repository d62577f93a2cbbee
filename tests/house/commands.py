"""Command lines in the documents, held against the programs that they name."""

import importlib.util
import re
import shlex
from pathlib import Path

import typer

from zokernels.lab.cli import app
from zokernels.lab.runs import checks
from zokernels.lab.runs.presets import get
from zokernels.lab.runs.settings import Settings

ROOT = Path(__file__).resolve().parents[2]
# What the system or another package has; the names after them are not ours to check.
FOREIGN = ("cd", "git", "source", "nvidia-smi", "tensorboard")
PLACEHOLDER = re.compile(r"[A-Z]+(\.yaml)?|\$\w+")


def lines(block):
    """A block's commands as lists of words, without variables set before them."""
    for line in block.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
            words.pop(0)
        for part in split(words, "&&"):
            if part:
                yield part


def split(words, separator):
    """The words between separators."""
    parts = [[]]
    for word in words:
        if word == separator:
            parts.append([])
        else:
            parts[-1].append(word)
    return parts


def check(words):
    """Raise AssertionError unless the command exists and takes these words."""
    name, rest = Path(words[0]).name, words[1:]
    kind = next((k for k in CHECKS if re.fullmatch(k, name)), None)
    assert kind or name in FOREIGN, f"{name}: no check knows this command; add one to CHECKS"
    if kind:
        CHECKS[kind](rest)


def parse(words):
    """What the command line makes of the words of ``zokernels``: the command's name and values."""
    command = typer.main.get_command(app)
    context = command.make_context("zokernels", [], resilient_parsing=True)
    names = []
    while hasattr(command, "commands"):
        assert words and words[0] in command.commands, f"zokernels has no command {words[:1]}"
        command, name, words = command.commands[words[0]], words[0], words[1:]
        names.append(name)
    context = command.make_context(name, list(words), parent=context)
    return " ".join(names), context


def _zokernels(words):
    if words in ([], ["--help"]):
        return
    if words[-1] == "--help":
        words = words[:-1]
    name, context = parse(words)
    values = context.params
    if name in ("finetune", "tune"):
        _settings(values, words)
    if name == "sweep":
        file = values["sweep"]
        assert PLACEHOLDER.fullmatch(str(file)) or (ROOT / file).is_file(), f"there is no {file}"
    if name == "verify":
        from zokernels.lab import verification

        ids = [case.id for case in verification.plan(values["deep"]).cases]
        for pattern in values["only"] or []:
            assert any(verification.matches(i, [pattern]) for i in ids), f"no case: {pattern}"


def _settings(values, words):
    known = {n: v for n, v in values.items() if n in Settings.__dataclass_fields__}
    preset = values["preset"]
    if values.get("resume") or preset == "list":
        return
    if preset:
        known |= {k: v for k, v in get(preset).settings.items() if f"--{k}" not in words}
    assert known["model"], "a model is missing: --model or --preset"
    checks.check(Settings(**{**known, "out": known.get("out") or Path("runs/x")}))


def _python(words):
    if words[:1] == ["-m"]:
        module, rest = words[1], words[2:]
        if module == "zokernels.lab.cli":
            return _zokernels(rest)
        if module in ("pytest", "venv", "pip"):
            return check([module, *rest])
        found = importlib.util.find_spec(module)
        assert found, f"there is no module {module}"
        if found.submodule_search_locations:
            found = importlib.util.find_spec(f"{module}.__main__")
        source = Path(found.origin).read_text(encoding="utf-8")
        for word in rest:
            assert not word.startswith("--") or f'"{word}"' in source, f"{module} has no {word}"
    else:
        assert (ROOT / words[0]).is_file(), f"there is no script {words[0]}"


def _make(words):
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for word in words:
        variable, is_set, _ = word.partition("=")
        pattern = rf"\b{variable}\b" if is_set else rf"^{re.escape(word)}:"
        assert re.search(pattern, makefile, re.M), f"the Makefile has no {variable}"


def _pip(words):
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert words[0] == "install"
    for word in words[1:]:
        if extras := re.fullmatch(r"\.\[(.+)\]", word):
            for extra in extras[1].split(","):
                assert re.search(rf"^{extra} = \[", project, re.M), f"there is no extra {extra}"


def _pytest(words):
    for word in words:
        if word.startswith(("tests", "bench")):
            assert list(ROOT.glob(word.partition("::")[0])), f"there is no {word}"


def _torchrun(words):
    from torch.distributed.run import get_args_parser

    try:
        get_args_parser().parse_args(words)
    except SystemExit:
        raise AssertionError(f"torchrun takes no {words}") from None


def _script(words):
    assert (ROOT / words[0]).is_file(), f"there is no script {words[0]}"


CHECKS = {
    "zokernels": _zokernels,
    "python3?": _python,
    "make": _make,
    "pip": _pip,
    "pytest": _pytest,
    "torchrun": _torchrun,
    "accelerate": lambda words: None,
    "bash": _script,
    "venv": lambda words: None,
    "pre-commit": lambda words: None,
}
