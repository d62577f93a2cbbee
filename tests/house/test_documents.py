"""The documents do what they say: every block of code runs or is checked, every link leads on.

Python blocks run in the order of their page, in one namespace a page that begins with the names
that docs/index.md promises. Command lines are parsed by the program they name, and those that end
in seconds run, on a tiny model. A block that can't be run says why in a comment before it:
``<!-- skip: next "reason" -->``; `SKIPPED` counts them.
"""

import re
import shlex
from pathlib import Path

import commands
import pytest
import torch
from sybil import Sybil
from sybil.parsers.markdown import CodeBlockParser, PythonCodeBlockParser, SkipParser
from tiny import SPECIAL, WORDS, models

from zokernels.lab.cli import main
from zokernels.lab.tasks import get_task

pytestmark = [pytest.mark.hf, pytest.mark.usefixtures("one_thread")]
ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
LANGUAGES = {"python", "bash", "yaml", "text"}
SKIPPED = 1
# Of `zokernels`; what else a page shows is parsed.
RUN = ("env", "finetune", "tune", "replay", "verify --list", "sweep")


def yaml_block(example):
    """A sweep file in a page is one that `zokernels sweep` plans, and a task one that is read."""
    Path("page.yaml").write_text(example.parsed, encoding="utf-8")
    if re.search(r"^prompt:", example.parsed, re.MULTILINE):
        assert get_task("page.yaml").fields
        return
    assert main(["sweep", "page.yaml", "--out", "runs/page", "--dry-run"]) == 0


def bash_block(example):
    """Every command exists and takes its words; the quick ones end with 0."""
    for words in commands.lines(example.parsed):
        commands.check(words)
        if words[0] == "zokernels" and (small := shortened(words[1:])):
            print("$", shlex.join(["zokernels", *small]))
            assert main(small) == 0, shlex.join(words)


def text_block(example):
    """A usage line, an output or an equation; a whole command line belongs in a bash block."""
    for line in example.parsed.splitlines():
        is_command = line.startswith(("zokernels ", "python -m", "make "))
        assert not is_command or re.search(r"[\[|…]", line), f"not a text block: {line}"


def shortened(words):
    """The command on a tiny model and for two steps; None if it is not to be run here."""
    spoken = " ".join(words)
    if not spoken.startswith(RUN) or "--help" in words:
        return None
    name, context = commands.parse(words)
    values = context.params
    if name == "sweep":
        return None
    if name == "replay":
        return words if Path(values["run"]).exists() else None
    if name == "finetune":
        if values["preset"] == "list":
            return words
        if values["resume"]:
            return words if Path(values["resume"]).exists() else None
        elsewhere = re.fullmatch(r"package:.*|.*\.gguf", values["model"] or "")
        # The tiny model's layers are too small for the kernels of few bits.
        own = values["task"] not in (None, "sst2") or values["data"] or values["load_in"]
        if own or values["preset"] or elsewhere:
            return None
        return [*words, "--data", "data", "--device", "cpu", "--steps", "2", "--batch-size", "4"]
    if name == "tune":
        own = values["task"] not in (None, "sst2") or values["data"]
        if own or values["model"].startswith("package:"):
            return None
        few = ["--forwards", "224", "--by", "none", "--batch-size", "4"]
        return [*words, "--data", "data", "--device", "cpu", *few]
    return words


def blocks():
    parsers = [PythonCodeBlockParser(), SkipParser()]
    checks = {"bash": bash_block, "yaml": yaml_block, "text": text_block}
    parsers += [CodeBlockParser(language, check) for language, check in checks.items()]
    sybil = Sybil(parsers)
    for page in PAGES:
        for example in sybil.parse(page):
            yield pytest.param(page, example, id=f"{page.relative_to(ROOT)}:{example.line}")


@pytest.fixture(scope="module")
def folders(tmp_path_factory, places):
    """A folder for each page, with the model and the data that a reader has."""

    data, made = tmp_path_factory.mktemp("data"), {}
    for name in ("train.tsv", "dev.tsv"):
        rows = (places / name).read_text().splitlines()[:33]
        (data / name).write_text("\n".join(rows) + "\n")

    def folder(page):
        if page not in made:
            made[page] = tmp_path_factory.mktemp(page.stem)
            (made[page] / "facebook").mkdir()
            (made[page] / "facebook/opt-125m").symlink_to(places / "opt")
            (made[page] / "data").symlink_to(data)
            (made[page] / "runs").mkdir()
            (made[page] / "examples").symlink_to(ROOT / "examples")
        return made[page]

    return folder


@pytest.fixture
def promised(monkeypatch):
    """The names that the index promises, and one process's variables of torchrun."""
    variables = dict(RANK=0, LOCAL_RANK=0, WORLD_SIZE=1, LOCAL_WORLD_SIZE=1)
    variables |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=0, HF_HUB_OFFLINE=1)
    for name, value in variables.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("ZOKERNELS_DATA", "data")

    def load():
        torch.manual_seed(0)
        return models()["opt"]()

    def row():
        ids = torch.randint(len(SPECIAL), len(SPECIAL) + len(WORDS), (8,))
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}

    torch.manual_seed(1)
    data = [row() for _ in range(48)]
    batches = [
        {k: torch.stack([r[k] for r in data[i : i + 4]]) for k in data[0]} for i in range(0, 48, 4)
    ]
    yield {"load": load, "model": load(), "data": data, "batches": batches}
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize(("page", "example"), list(blocks()))
def test_a_block(page, example, folders, promised, monkeypatch):
    monkeypatch.chdir(folders(page))
    for name, value in promised.items():
        example.namespace.setdefault(name, value)
    example.evaluate()


def test_every_block_has_a_language_that_is_checked():
    for page in PAGES:
        fences = re.findall(r"^ *```(.*)$", page.read_text(encoding="utf-8"), re.M)
        assert len(fences) % 2 == 0, page
        assert set(fences[::2]) <= LANGUAGES, page


def test_few_blocks_are_skipped():
    marks = [
        mark
        for page in PAGES
        for mark in re.findall(r"^<!-- skip: (.*) -->", page.read_text(encoding="utf-8"), re.M)
    ]
    assert len(marks) == SKIPPED
    assert all(re.fullmatch(r'next ".{10,}"', mark) for mark in marks)


WRONG = [
    "zokernels finetune --model a --stepz 3",
    "zokernels finetune --model a --scheme adapter",
    "zokernels finetune --model a --optimizer lion",
    "zokernels finetune --steps 3",
    "zokernels finetune --preset zo-bench/sst2/opt-14b/full/zo-sgd",
    "zokernels tune",
    "zokernels tune --model a --by colour --lr 1",
    "zokernels bench gone",
    "zokernels verify --only nothing/here",
    "zokernels sweep examples/gone.yaml --out runs/x",
    "make quickstart SPEED=3",
    "make coffee",
    "python -m bench.gone",
    "python -m bench.study.rates --gone",
    "python examples/gone.py",
    "pip install '.[gone]'",
    "torchrun --gone train.py",
    "bash bench/gone.sh",
    "brew install zokernels",
]


@pytest.mark.parametrize("line", WRONG)
def test_a_wrong_command_line_would_be_seen(line):
    (words,) = commands.lines(line)
    with pytest.raises(Exception, match="."):
        commands.check(words)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("https://", "http://")):
            continue
        file, _, heading = target.partition("#")
        there = (page.parent / file).resolve() if file else page
        assert there.is_file(), f"{page.name}: {target}"
        assert not heading or heading in headings(there), f"{page.name}: {target}"


def headings(page):
    """The names that a page's headings have as targets of links."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_a_page_writes_where_no_other_page_does():
    """So that what two pages show can be run in one folder; README and bench.md share a command."""
    names = re.compile(
        r"(?:--out |TrainingArguments\(\s*\"|out=Path\(\"|out: str = \")(runs/[\w-]+)"
        r"|(?:record\(|torch\.save\(.*, )\"([^\"]+)\""
    )
    found = {}
    examples = sorted((ROOT / "examples").glob("*.py"))
    for page in [*PAGES, *examples]:
        for match in names.findall(page.read_text(encoding="utf-8")):
            found.setdefault("".join(match), set()).add(page.name)
    shared = {name: pages for name, pages in found.items() if len(pages) > 1}
    assert shared == {"runs/bench": {"README.md", "bench.md"}}
    assert {"loop.zk", "run.zk", "runs/trainer-recipe", "runs/trl-sft"} < found.keys()


def test_the_index_names_every_page():
    index = (ROOT / "docs/index.md").read_text(encoding="utf-8")
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for page in (ROOT / "docs").rglob("*.md"):
        name = page.relative_to(ROOT / "docs").as_posix()
        assert name in navigation, f"mkdocs.yml lacks {name}"
        assert name == "index.md" or name.startswith("reference/") or f"({name})" in index, name
