"""Data of one's own: files with headers, parts of a file, data sets by name."""

import json

import pytest
from own import described, write

from zokernels.lab.errors import InputError
from zokernels.lab.tasks import COMPLETION, data, get_task, rows
from zokernels.lab.tasks.data import parsed

pytestmark = pytest.mark.usefixtures("one_thread")

REVIEWS = """
prompt: "{sentence} It was"
words: [terrible, great]
"""


CSV = '\ufeffid,review,stars\n1,"A film,\nin two ""lines""",1\n2,Dull,0\n'


def test_a_csv_with_a_header_quotes_and_a_byte_order_mark(tmp_path):
    path = write(tmp_path / "own.csv", CSV)
    task = described(tmp_path, REVIEWS)
    columns = parsed("sentence=review, label=stars")
    found = rows.read(task, path, columns)
    assert [(e.sentence, e.label) for e in found] == [('A film,\nin two "lines"', 1), ("Dull", 0)]
    with pytest.raises(InputError, match=r"own.csv, line 3: the column 'sentence' is missing"):
        rows.read(task, path)
    with pytest.raises(InputError, match="there is no column 'text', which --columns takes for"):
        rows.read(task, path, {"sentence": "text"})
    write(path, "sentence,label\na,1,2\n")
    with pytest.raises(InputError, match=r"own.csv, line 2: expected sentence,label, got 3"):
        rows.read(task, path)


LONG = ["a film " * 20] * 500


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        (
            "a.csv",
            "sentence,label,sentence\na,1,b\n",
            "line 1: the column 'sentence' is there 2 times",
        ),
        (
            "a.tsv",
            "label\tlabel\tsentence\n1\t0\tb\n",
            "line 1: the column 'label' is there 2 times",
        ),
        (
            "a.json",
            json.dumps({"data": LONG}),
            "rows must be a list at the top, .* whose 'data' holds",
        ),
        ("a.json", json.dumps([LONG]), "row 0: a row must be an object with named columns, got"),
        ("a.jsonl", json.dumps({"sentence": LONG, "label": 1}), "the sentence must be a text, got"),
        ("a.jsonl", json.dumps({"sentence": "a", "label": LONG}), "the label must be 0 or 1"),
        ("a.jsonl", json.dumps({"x": 1, **dict.fromkeys(map(str, range(999)))}), "it has x, 0, 1"),
        ("a.jsonl", '{"sentence": null, "label": 1}', "the sentence is null; give it a value"),
        ("a.jsonl", '{"sentence": "a", "label": null}', "the label is null; give it a value"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(tmp_path, name, text, words):
    task, path = described(tmp_path, REVIEWS), write(tmp_path / name, text)
    with pytest.raises(InputError, match=words) as error:
        rows.read(task, path)
    assert len(str(error.value).replace(str(path), "")) < 300


def test_columns_without_a_name_are_nobodys(tmp_path):
    path = write(tmp_path / "a.csv", "sentence,label,,\na,1,,\n")
    assert len(rows.read(described(tmp_path, REVIEWS), path)) == 1


def test_shots_speak_of_labels_where_there_are_some(tmp_path):
    lines = [json.dumps({"prompt": f"film {i}", "completion": "x"}) for i in range(20)]
    path = write(tmp_path / "own.jsonl", "\n".join(lines))
    found = data.load(COMPLETION, path)
    with pytest.raises(InputError, match="needs 40 training examples and there are 17; lower it"):
        data.few(found, 20, 0)
    assert data.few(found, 4, 0).source.endswith("own.jsonl, 4 examples by seed 0")
    reviews(path, 20)
    with pytest.raises(InputError, match="of each label, but label 0 has"):
        data.few(data.load(described(tmp_path, REVIEWS), path), 20, 0)


@pytest.mark.parametrize("given", ["a", "a=", "=b", "a=b,c", ","])
def test_columns_of_another_form_are_refused(given):
    with pytest.raises(InputError, match="--columns must have the form NAME=COLUMN"):
        parsed(given)


def reviews(path, count):
    lines = [json.dumps({"sentence": f"film {i}", "label": i % 2}) for i in range(count)]
    return write(path, "\n".join(lines))


def test_a_file_alone_gives_all_three_parts(tmp_path):
    path = reviews(tmp_path / "own.jsonl", 100)
    found = data.load(get_task("sst2"), path)
    parts = (found.train, found.valid, found.dev)
    assert [len(p) for p in parts] == [81, 9, 10]
    assert len({e.sentence for part in parts for e in part}) == 100
    assert "a tenth of" in found.notes[0] and str(path) in found.source
    other = reviews(tmp_path / "other.jsonl", 7)
    found = data.load(get_task("sst2"), path, other)
    assert [len(p) for p in (found.train, found.valid, found.dev)] == [90, 10, 7]
    with pytest.raises(InputError, match="has 7 examples, too few to set a tenth aside"):
        data.load(get_task("sst2"), other)
    with pytest.raises(InputError, match="--eval-data x needs --data"):
        data.load(get_task("sst2"), None, "x")
    with pytest.raises(InputError, match="is a folder, which has what is reported"):
        data.load(get_task("sst2"), tmp_path, other)


def test_a_description_says_where_its_data_is_from_its_own_folder(tmp_path, monkeypatch):
    reviews(tmp_path / "train.jsonl", 20), reviews(tmp_path / "test.jsonl", 5)
    text = REVIEWS + "data: train.jsonl\neval_data: test.jsonl\ncolumns: {label: label}\n"
    task = described(tmp_path, text)
    monkeypatch.chdir("/")
    assert len(data.load(task).dev) == 5
    # What is named on the command line wins, and then stands alone.
    assert len(data.load(task, tmp_path / "train.jsonl").dev) == 2


def test_a_data_set_by_name_config_and_split(tmp_path, monkeypatch):
    library = pytest.importorskip("datasets")
    asked = []

    def split(count):
        given = [{"text": f"film {i}", "label": i % 2} for i in range(count)]
        return library.Dataset.from_list(given)

    def load_dataset(name, config, split=None, **_):
        asked.append((name, config, split))
        whole = {"train": split_of[0], "test": split_of[1]}
        return whole if split is None else whole[split.partition("[")[0]]

    split_of = (split(20), split(6))
    monkeypatch.setattr(library, "load_dataset", load_dataset)
    task = get_task("sst2")
    found = data.load(task, "org/films", columns={"sentence": "text"})
    assert [len(p) for p in (found.train, found.valid, found.dev)] == [18, 2, 6]
    found = data.load(task, "org/films:en@train[:9]", "org/films:en@test")
    assert [len(p) for p in (found.train, found.valid, found.dev)] == [18, 2, 6]
    assert asked == [
        ("org/films", None, None),
        ("org/films", "en", "train[:9]"),
        ("org/films", "en", "test"),
    ]
    with pytest.raises(InputError, match="org/films@train, row 0: there is no column 'words'"):
        data.load(task, "org/films", columns={"sentence": "words"})
    with pytest.raises(InputError, match="there is no such file or folder"):
        data.load(task, "gone/train.jsonl")


def test_a_data_set_that_is_not_there_is_a_sentence(monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(InputError) as error:
        data.load(get_task("sst2"), "no-one/nothing")
    assert "--data no-one/nothing is neither a file or folder here nor a data set" in str(
        error.value
    )
