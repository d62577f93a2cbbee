"""Every task of the table: read from the forms it is published in, and turned into prompts."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from zokernels.lab import hub
from zokernels.lab.errors import InputError
from zokernels.lab.scoring.generation import f1
from zokernels.lab.tasks import SST2, TASKS, data, get_task, rows

NLI = {"premise": "It rained all day.", "hypothesis": "it was wet"}
# Task, a row in its data set's own form, the prompt's end, the candidates, and the right one.
CASES = [
    ("sst2", {"sentence": "a film ", "label": 1}, "a film It was", [" terrible", " great"], 1),
    ("sst5", {"text": "a film", "label": "3"}, "a film It was", None, 3),
    ("trec", {"sentence": "Who ?", "label": "3"}, "Who ?\nThis question asks for a", None, 3),
    ("rte", {**NLI, "label": "not_entailment"}, '"it was wet" is true? Yes or No?', None, 1),
    ("cb", {**NLI, "label": "neutral"}, "Yes, No, or Maybe?", ["\nYes", "\nNo", "\nMaybe"], 2),
    ("snli", {"text_a": "A.", "text_b": "b", "label": "neutral"}, "or Maybe?", None, 1),
    ("mnli", {**NLI, "label": 2}, "Yes, No, or Maybe?", ["\nYes", "\nMaybe", "\nNo"], 2),
    (
        "boolq",
        {"passage": "Wine is red.", "question": "is wine red", "label": True},
        "Wine is red. Is wine red?",
        ["\nNo", "\nYes"],
        1,
    ),
    (
        "wic",
        {"word": "cold", "sentence1": "A cold.", "sentence2": "Cold soup.", "label": False},
        "A cold.\nCold soup.",
        None,
        0,
    ),
    (
        "wsc",
        {"text": "Al saw Bo as he left.", "label": True}
        | {"target": {"span1_text": "Bo", "span2_text": "he"}},
        'does the pronoun "he" refer to Bo? Yes or No?',
        None,
        1,
    ),
    (
        "copa",
        {"premise": "I fell.", "choice1": "I slipped.", "choice2": "It rained."}
        | {"question": "cause", "label": 1},
        "I fell because",
        [" I slipped.", " it rained."],
        1,
    ),
    (
        "winogrande",
        {"sentence": "Al beat Bo so _ won.", "option1": "Al", "option2": "Bo", "answer": "2"},
        "Al beat Bo so",
        [" Al won.", " Bo won."],
        1,
    ),
    (
        "multirc",
        {"paragraph": "P.", "question": "Q?", "answer": "", "label": 0},
        'I found this answer "". Is that correct? Yes or No?',
        ["\nNo", "\nYes"],
        0,
    ),
    (
        "record",
        {"passage": "Al met Bo.\n@highlight\nBo won", "query": "@placeholder lost"}
        | {"entities": ["Bo", "Al"], "answers": ["Al"]},
        '- Bo won\n@placeholder lost\nQuestion: What is the "@placeholder"\nAnswer:',
        [" Bo", " Al"],
        1,
    ),
    (
        "squad",
        {"context": "C.", "question": "Q?", "answers": {"text": ["x", "x", "y"]}},
        "Context: C.\nQuestion: Q?\nAnswer:",
        [" x"],
        0,
    ),
    (
        "drop",
        {"passage": "C.", "question": "Q?", "answers_spans": {"spans": ["7"], "types": ["number"]}},
        "Passage: C.\nQuestion: Q?\nAnswer:",
        [" 7"],
        0,
    ),
]


def one(name, row):
    (example,) = TASKS[name].read(row, "here, line 1")
    return example


def test_every_task_has_a_case():
    # Rows that are a task by themselves have tests of their own.
    assert {c[0] for c in CASES} == set(TASKS) - {"completion"}


@pytest.mark.parametrize(("name", "row", "end", "candidates", "label"), CASES)
def test_a_row_becomes_a_prompt(name, row, end, candidates, label):
    task, example = TASKS[name], one(name, row)
    assert task.prompt(example).endswith(end)
    assert example.label == label
    if candidates is not None:
        assert task.candidates(example) == candidates


@pytest.mark.parametrize(("name", "row", "end", "candidates", "label"), CASES)
def test_without_a_template_there_is_no_word_of_ours(name, row, end, candidates, label):
    """What is left when the row's own texts are taken out of the plain prompt is blank."""
    task, example = TASKS[name].with_template(False), one(name, row)
    text = task.prompt(example)
    texts = [v.strip() for v in example.fields.values() if isinstance(v, str) and v.strip()]
    for value in sorted(texts, key=len, reverse=True):
        text = text.replace(value, "")
    assert not text.strip()


def test_a_content_free_example_keeps_its_candidates_and_loses_its_texts():
    for name, texts in (("winogrande", "beat"), ("copa", "fell"), ("rte", "rained")):
        row = next(c[1] for c in CASES if c[0] == name)
        example, task = one(name, row), TASKS[name]
        free = task.content_free(example)
        assert texts in task.prompt(example)
        assert texts not in task.prompt(free)
        assert task.candidates(free) == task.candidates(example)


def test_clozes_have_one_blank_where_words_are_the_labels():
    for name, row, *_ in CASES:
        task = TASKS[name]
        for form in (task, task.with_template(False)):
            if task.words:
                assert form.cloze(one(name, row), "<mask>").count("<mask>") == 1
            else:
                with pytest.raises(InputError, match="use a causal LM"):
                    form.cloze(one(name, row), "<mask>")
    assert TASKS["rte"].cloze(one("rte", CASES[3][1]), "_") == "It rained all day? _, it was wet"


def test_nested_multirc_and_record_rows_unfold():
    answers = [{"text": "a", "label": 1}, {"text": "b", "label": 0}]
    questions = [{"question": "Q1", "answers": answers}, {"question": "Q2", "answers": answers}]
    found = TASKS["multirc"].read({"passage": {"text": "P", "questions": questions}}, "x")
    assert [e.label for e in found] == [1, 0, 1, 0]
    row = {
        "passage": {
            "text": "Al met Bo",
            "entities": [{"start": 0, "end": 1}, {"start": 7, "end": 8}],
        },
        "qas": [{"query": "@placeholder?", "answers": [{"text": "Bo"}]}],
    }
    (example,) = TASKS["record"].read(row, "x")
    assert TASKS["record"].candidates(example) == [" Al", " Bo"]
    assert example.label == 1


@pytest.mark.parametrize(
    ("name", "file", "content", "sentence"),
    [
        ("copa", "train.jsonl", '{"premise": "P"}\n', r"line 1: this is no row of copa \(KeyError"),
        ("copa", "train.jsonl", "{\n", "line 1: this is not JSON"),
        ("copa", "train.jsonl", "[1]\n", "line 1: a row must be an object"),
        ("rte", "train.jsonl", '{"premise": "P", "label": 0}\n', "column 'hypothesis' is missing"),
        ("rte", "train.jsonl", json.dumps({**NLI, "label": "perhaps"}), "got 'perhaps'"),
        ("sst5", "train.csv", "3,a film\n4,a,b\n", "line 2: expected label,sentence, got 3"),
        ("sst5", "train.csv", "5,a film\n", "line 1: the label must be 0 or 1 or 2 or 3 or 4"),
        ("snli", "s.json", "3", "holds neither an object of rows nor a list"),
        ("rte", "train.tsv", "a\tb\n", "line 1: expected premise<TAB>hypothesis<TAB>label, got 1"),
        (
            "winogrande",
            "t.jsonl",
            '{"sentence": "no blank", "option1": "a", "option2": "b", "answer": "1"}',
            "line 1: this is no row of winogrande",
        ),
    ],
)
def test_a_bad_row_is_one_sentence_with_file_and_line(tmp_path, name, file, content, sentence):
    path = tmp_path / file
    path.write_text(content)
    with pytest.raises(InputError, match=sentence) as caught:
        rows.read(TASKS[name], path)
    assert str(path) in str(caught.value)


def test_snli_columns_go_by_name_and_the_label_is_the_last(tmp_path):
    head = "index\tsentence1\tsentence2\tlabel1\tgold_label"
    lines = [head, "1\tA.\tb\tneutral\tneutral", "2\tC.\td\tneutral\tcontradiction\tentailment\t-"]
    lines += ["3\tE.\tf\tneutral\tcontradiction\tcontradiction\tcontradiction"]
    path = tmp_path / "train.tsv"
    path.write_text("\n".join(lines))
    found = rows.read(TASKS["snli"], path)
    # The second row's annotators did not agree.
    assert [(e.sentence, e.label) for e in found] == [("A.", 1), ("E.", 2)]


def jsonl(path, count, **columns):
    lines = [json.dumps({**columns, "sentence": f"s{i}", "label": i % 2}) for i in range(count)]
    path.write_text("\n".join(lines))


def test_beside_a_test_file_dev_picks_and_without_one_train_is_shared(tmp_path):
    for name, count in (("train", 20), ("dev", 6), ("test", 4)):
        jsonl(tmp_path / f"{name}.jsonl", count)
    splits = data.load(SST2, tmp_path)
    assert [len(s) for s in (splits.train, splits.valid, splits.dev)] == [20, 6, 4]
    (tmp_path / "test.jsonl").unlink()
    splits = data.load(SST2, tmp_path)
    assert [len(s) for s in (splits.train, splits.valid, splits.dev)] == [18, 2, 6]


def test_an_only_file_is_cut_in_three_and_the_report_says_so(tmp_path):
    task = replace(SST2, cut=(10, 4))
    jsonl(tmp_path / "val.jsonl", 30)
    splits = data.load(task, tmp_path)
    parts = [[e.sentence for e in p] for p in (splits.train, splits.valid, splits.dev)]
    assert sum(parts, []) == [f"s{i}" for i in range(30)]
    assert [len(p) for p in parts] == [10, 4, 16]
    assert "results do not compare" in splits.notes[0]
    jsonl(tmp_path / "val.jsonl", 14)
    with pytest.raises(InputError, match="has 14 rows"):
        data.load(task, tmp_path)


def test_few_shots_are_balanced_disjoint_and_fixed_by_the_seed(tmp_path):
    for name in ("train", "dev"):
        jsonl(tmp_path / f"{name}.jsonl", 80)
    splits = data.load(SST2, tmp_path)
    first, again, other = (data.few(splits, 8, seed) for seed in (13, 13, 21))
    for part in (first.train, first.valid):
        assert [e.label for e in part].count(1) == [e.label for e in part].count(0) == 8
    assert not {e.sentence for e in first.train} & {e.sentence for e in first.valid}
    assert first == again
    assert first.train != other.train
    assert first.dev == splits.dev


def test_the_hub_is_read_by_its_own_names_and_label_order(tmp_path, monkeypatch):
    """TREC's coarse classes have another order on the hub."""
    pa = pytest.importorskip("pyarrow", reason="pip install 'zokernels[hf]'")
    from pyarrow import parquet

    asked = []

    def fetch(name, cached):
        asked.append((name, cached))
        path = tmp_path / name.replace("/", "-")
        columns = {"text": [f"q{i} ?" for i in range(12)], "coarse_label": [0, 2] * 6}
        parquet.write_table(pa.table(columns), path)
        return path

    monkeypatch.delenv(data.VARIABLE, raising=False)
    monkeypatch.setattr(hub, "fetcher", lambda repo, revision: fetch)
    splits = data.load(TASKS["trec"])
    assert {e.label for e in splits.dev} == {2, 0}
    assert splits.dev[0].label == 2
    assert asked[0] == ("default/train/0000.parquet", True)
    assert "CogComp/trec" in splits.source


def test_without_a_hub_a_task_that_is_not_shipped_says_what_to_pass(monkeypatch):
    monkeypatch.delenv(data.VARIABLE, raising=False)
    monkeypatch.setattr(data, "_from_hub", lambda *_: (None, "HF_HUB_OFFLINE is set"))
    with pytest.raises(InputError, match="no data for rte: .* Pass --data FOLDER"):
        data.load(TASKS["rte"])


@pytest.mark.parametrize(
    ("written", "right", "value"),
    [
        ("the Big apple.", ["big apple"], 1.0),
        ("a red apple", ["green pear", "red"], 2 / 3),
        ("", ["red"], 0.0),
        ("7", ["7", "seven"], 1.0),
    ],
)
def test_f1_is_over_words_without_articles_and_the_best_of_the_answers(written, right, value):
    assert f1(written, right) == pytest.approx(value)


# Rows of train, of what picks, and of what is reported, in the published files.
PUBLISHED = {
    "sst2": (60614, 6735, 872),
    "sst5": (8544, 1101, 2210),
    "trec": (4907, 545, 500),
    "rte": (2241, 249, 277),
    "cb": (225, 25, 56),
    "boolq": (1000, 500, 1770),
    "wic": (4886, 542, 638),
    "wsc": (499, 55, 104),
    "multirc": (24519, 2724, 4848),
    "copa": (360, 40, 100),
    "winogrande": (9211, 1023, 1267),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_files_are_read_whole(name):
    place = Path(os.environ.get(data.VARIABLE) or "no folder")
    if not (place / get_task(name).folder).is_dir():
        pytest.skip(f"needs ZOKERNELS_DATA with a folder {get_task(name).folder}")
    splits = data.load(get_task(name), place)
    assert (len(splits.train), len(splits.valid), len(splits.dev)) == PUBLISHED[name]


def test_every_label_word_is_one_token_of_roberta():
    pytest.importorskip("tokenizers", reason="pip install 'zokernels[hf]'")
    from tokenizers import ByteLevelBPETokenizer

    place = Path(os.environ.get(data.VARIABLE) or "no folder") / "tokenizers/gpt2-opt"
    if not place.is_dir():
        pytest.skip(
            "needs ZOKERNELS_DATA with OPT's and RoBERTa's vocabulary in tokenizers/gpt2-opt"
        )
    tokenizer = ByteLevelBPETokenizer(str(place / "vocab.json"), str(place / "merges.txt"))
    words = {word for task in TASKS.values() for word in task.words}
    assert not {w for w in words if len(tokenizer.encode(f" {w}").ids) != 1}
