"""Data files from anywhere: a reader gives examples that can be used, or one sentence."""

import io
import json

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from odd import JSON, places
from test_task_table import CASES

from zokernels.lab.errors import InputError
from zokernels.lab.tasks import TASKS, rows

NAMES = sorted(TASKS)
VALID = {name: [row for known, row, *_ in CASES if known == name] for name in NAMES}
ENDINGS = [ending for ending in rows.READERS if ending != ".parquet"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


def read(folder, name, ending, content):
    """Reads a file and does with its examples what a run does with them before it tokenizes."""
    path = folder / f"train{ending}"
    path.write_bytes(content)
    task = TASKS[name]
    try:
        found = rows.read(task, path)
    except InputError as error:
        assert str(path) in str(error)
        return None
    for e in found:
        count = len(task.candidates(e))
        assert 0 <= e.label < count
        for text in (task.prompt(e), task.with_template(False).prompt(e), *task.candidates(e)):
            assert isinstance(text, str)
            text.encode()
        if task.prompts.cloze:
            task.cloze(e, "<mask>")
        task.prompt(task.content_free(e))
        e.sentence.split()
        hash(e)
    return found


@given(name=st.sampled_from(NAMES), ending=st.sampled_from(ENDINGS), content=st.binary())
def test_random_bytes(folder, name, ending, content):
    read(folder, name, ending, content)


@given(
    name=st.sampled_from(NAMES),
    ending=st.sampled_from(ENDINGS),
    content=st.text(st.sampled_from('\t\n\r,"0123{}[]:_ab\0\\\u2028\x85') | st.characters()),
)
def test_random_text(folder, name, ending, content):
    read(folder, name, ending, content.encode("utf-8", "surrogatepass"))


@st.composite
def mutated(draw):
    """Rows of a task, some of whose values are gone, other, or of another type."""
    name = draw(st.sampled_from([n for n in NAMES if VALID[n]]))
    found = []
    for _ in range(draw(st.integers(1, 3))):
        row = json.loads(json.dumps(draw(st.sampled_from(VALID[name]))))
        for _ in range(draw(st.integers(0, 2))):
            if not places(row):
                break
            *path, last = draw(st.sampled_from(places(row)))
            inner = row
            for key in path:
                inner = inner[key]
            if draw(st.booleans()):
                inner[last] = draw(JSON)
            else:
                del inner[last]
        found.append(row)
    return name, found


@given(case=mutated(), whole=st.booleans(), cut=st.integers(0, 10_000))
@example(case=("rte", [{"premise": 3, "hypothesis": "b", "label": 0}]), whole=False, cut=9999)
@example(
    case=("rte", [{"premise": "\ud800", "hypothesis": "b", "label": 0}]), whole=False, cut=9999
)
@example(case=("rte", [{"premise": "a", "hypothesis": ["b"], "label": 0}]), whole=True, cut=9999)
def test_mutated_rows(folder, case, whole, cut):
    """Also cut short anywhere, as a download that broke off."""
    name, found = case
    text = json.dumps(found) if whole else "".join(json.dumps(r) + "\n" for r in found)
    read(folder, name, ".json" if whole else ".jsonl", text.encode()[:cut])


@given(case=mutated(), flip=st.integers(0, 10_000), bits=st.integers(0, 255))
def test_parquet_with_a_byte_changed(folder, case, flip, bits):
    pa = pytest.importorskip("pyarrow", reason="Parquet needs pyarrow: pip install pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    name, found = case
    buffer = io.BytesIO()
    try:
        parquet.write_table(pa.Table.from_pylist(found), buffer)
    except (pa.ArrowException, OverflowError, UnicodeEncodeError, TypeError):
        return
    content = bytearray(buffer.getvalue())
    content[flip % len(content)] ^= bits
    read(folder, name, ".parquet", bytes(content))


@pytest.mark.parametrize(
    ("name", "file", "content", "sentence"),
    [
        ("rte", "a.jsonl", b'{"premise": 3, "hypothesis": "b", "label": 0}', "no row of rte"),
        ("rte", "a.jsonl", b'{"premise": "a", "hypothesis": 3, "label": 0}', "be a text, got 3"),
        ("rte", "a.jsonl", b'{"premise": "a", "hypothesis": null, "label": 0}', "is null"),
        ("rte", "a.jsonl", b'{"premise": "a", "hypothesis": "b"}', "column 'label' is missing"),
        ("rte", "a.jsonl", b'{"premise": "a", "hypothesis": "b", "label": 7}', "got '7'"),
        ("rte", "a.jsonl", b'{"premise": "a\\ud800", "hypothesis": "b", "label": 0}', "surrogate"),
        ("rte", "a.jsonl", b"[" * 100_000, "not JSON"),
        ("rte", "a.json", b"[" * 100_000, "not JSON"),
        ("rte", "a.jsonl", b"\xff\xfe\x00", "not UTF-8"),
        ("rte", "a.jsonl", b"", "has no rows"),
        ("rte", "a.parquet", b"PAR1nonsense", "could not be read as Parquet"),
        ("record", "a.jsonl",
         b'{"passage": "a", "query": "q", "entities": [[1]], "answers": ["x"]}', "no row of rec"),
        ("sst5", "a.csv", b"3," + b"x" * 200_000 + b"\n", "not CSV .field larger"),
        ("sst2", "a.tsv", b"a film\t1\nsent\0ence\t-1\n", "line 2: the label must be"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_with_its_place(tmp_path, name, file, content, sentence):
    path = tmp_path / file
    path.write_bytes(content)
    with pytest.raises(InputError, match=sentence) as caught:
        rows.read(TASKS[name], path)
    assert str(path) in str(caught.value)


def test_a_line_of_ten_megabytes_is_a_row(tmp_path):
    path = tmp_path / "train.tsv"
    path.write_bytes(b"film " * 2_000_000 + b"\t1\n")
    (found,) = rows.read(TASKS["sst2"], path)
    assert len(found.sentence.split()) == 2_000_000
