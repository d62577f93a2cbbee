"""Tasks and data of one's own: descriptions, files with headers, completions, conversations."""

import json

import pytest
import torch

from zokernels.lab.cli import main
from zokernels.lab.errors import InputError
from zokernels.lab.models import loading
from zokernels.lab.runs.run import Finetune
from zokernels.lab.runs.settings import Settings
from zokernels.lab.scoring import CausalScorer, generation
from zokernels.lab.tasks import COMPLETION, chat, data, description, get_task, rows
from zokernels.lab.tasks.data import parsed

pytestmark = pytest.mark.usefixtures("one_thread")

REVIEWS = """
name: reviews
prompt: "{sentence} It was"
plain: "{sentence}"
cloze: "{sentence} It was {mask}."
plain_cloze: "{sentence} {mask}"
label_text: "It was {word}."
words: [terrible, great]
"""


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def described(tmp_path, text, name="own.yaml"):
    return get_task(str(write(tmp_path / name, text)))


def examples(task, *given):
    return [e for i, row in enumerate(given) for e in task.read(row, f"row {i}")]


def test_sst2_described_is_sst2(tmp_path):
    own, published = described(tmp_path, REVIEWS), get_task("sst2")
    given = [{"sentence": "a dull film ", "label": "0"}, {"sentence": "{good}", "label": 1}]
    for template in (True, False):
        one, other = own.with_template(template), published.with_template(template)
        pairs = zip(examples(one, *given), examples(other, *given), strict=True)
        for a, b in pairs:
            assert (a.sentence, a.label) == (b.sentence, b.label)
            assert one.prompt(a) == other.prompt(b)
            assert one.candidates(a) == other.candidates(b)
            assert one.cloze(a, "<m>") == other.cloze(b, "<m>")
            assert one.label_sentences() == other.label_sentences()
    assert own.name == "reviews" and own.metric.name == "accuracy"


@pytest.mark.hf
@pytest.mark.parametrize("kind", ["opt", "roberta", "bert"])
def test_a_described_task_trains_as_the_published_one(places, tmp_path, kind):
    write(tmp_path / "own.yaml", REVIEWS)

    def losses(task, out):
        given = dict(data=str(places), steps=3, batch_size=4, lr=1e-3, max_length=32)
        Finetune(Settings(model=str(places / kind), task=task, out=out, **given)).run()
        lines = (out / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line).get("loss") for line in lines if '"loss"' in line]

    assert losses(str(tmp_path / "own.yaml"), tmp_path / "a") == losses("sst2", tmp_path / "b")


def test_labels_of_the_datas_own_may_share_a_word(tmp_path):
    text = 'prompt: "{text} So it is"\nlabel: stars\nwords: {1: bad, 2: bad, 5: good, yes: good}'
    task = described(tmp_path, text)
    assert task.words == ("bad", "good")
    # A whole number from a column with gaps is a float; "yes" is no truth value.
    given = [{"text": "a", "stars": s} for s in (1, "2", 5.0, " Yes ")]
    assert [e.label for e in examples(task, *given)] == [0, 0, 1, 1]
    with pytest.raises(InputError, match="row 0: the stars must be 1 or 2 or 5 or yes, got '3'"):
        examples(task, {"text": "a", "stars": 3})


def test_candidates_of_columns_and_of_a_list(tmp_path):
    text = """
    prompt: "{question}\\nAnswer:"
    candidates: ["{a}", "{b}"]
    label: right
    labels: [A, B]
    """
    task = described(tmp_path, text.replace("\n    ", "\n"))
    (found,) = examples(task, {"question": "1 + 1?", "a": 1, "b": 2, "right": "b"})
    assert (found.label, task.candidates(found)) == (1, [" 1", " 2"])
    assert task.content_free(found).fields["a"] == "1"
    with pytest.raises(InputError, match="row 0: the column 'b' is missing; it has question, a"):
        examples(task, {"question": "1 + 1?", "a": "1", "right": "A"})

    text = 'prompt: "{question}"\ncandidates: options\nanswer: right\njoint: "\\n"'
    task = described(tmp_path, text)
    row = {"question": "?", "options": ["x", "y", "z"], "right": "z"}
    (found,) = examples(task, row)
    assert (found.label, task.candidates(found)) == (2, ["\nx", "\ny", "\nz"])
    with pytest.raises(InputError, match="none of the answers"):
        examples(task, {**row, "right": "w"})
    with pytest.raises(InputError, match="options must be a list"):
        examples(task, {**row, "options": "xyz"})


def test_written_answers_end_where_the_model_says_so(tmp_path):
    task = described(tmp_path, 'prompt: "{q}"\nanswer: a\nmetric: exact_match')
    one, many = examples(task, {"q": "?", "a": "x\ny"}, {"q": "?", "a": ["x", "y"]})
    assert one.answers == ("x\ny",) and many.answers == ("x", "y")
    assert task.ends and task.metric.name == "exact_match"
    assert generation.exact_match(" x\ny ", one.answers) == 1
    assert generation.exact_match("x", one.answers) == 0


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("words: [a, b]", "needs prompt"),
        ('prompt: "{t}"', "line 1: prompt has to say how an answer is given, by one of words"),
        ('prompt: "{t}"\nanswer: a\nwords: [a, b]', "line 2: answer has to say how an answer"),
        ('prompt: "{t}"\nwords: [a]', "line 2: words must be two words at least"),
        ('prompt: "{t}"\nwords: {a: 1, b: [2]}', "words must be"),
        ('prompt: "{t}"\nwords: a', "line 2: words must be a list of texts; got 'a'"),
        ("prompt: text\nwords: [a, b]", "line 1: prompt must have a column in braces"),
        ('prompt: "{t"\nwords: [a, b]', "line 1: prompt has braces that do not match"),
        ('prompt: "{t.x}"\nwords: [a, b]', "line 1: prompt must have nothing but a column's name"),
        ('prompt: "{}"\nwords: [a, b]', "prompt must have nothing but a column's name"),
        ('prompt: "{t:>9}"\nwords: [a, b]', "prompt must have nothing but a column's name"),
        ('prompt: "{t}"\ncloze: "{t}"\nwords: [a, b]', "line 2: cloze must have the blank"),
        ('prompt: "{t}"\nplain: "{u}"\nwords: [a, b]', "plain has {u}, which the prompt does not"),
        ('prompt: "{t}"\nanswer: a\nmetric: rouge', "line 3: metric must be one of accuracy, f1"),
        ('prompt: "{t}"\nwords: [a, b]\nmetric: f1', "--metric f1 does not fit task own"),
        ('prompt: "{t}"\nwords: [a, b]\ncolour: red', "line 3: there is no key colour; allowed"),
        ('prompt: "{t}"\nprompt: "{t}"', "line 2: the key prompt is there twice"),
        ('prompt: "{t}"\ncandidates: opts', "candidates from a column's lists need answer"),
        ('prompt: "{t}"\ncandidates: ["{a}", b]\nlabels: [A]', "labels must be 2"),
        ('prompt: "{t}"\nwords: [a, b]\nlabels: [A, B]', "labels is for candidates"),
        (
            'prompt: "{t}"\nwords: {x: a, y: b}\nlabels: [A, B]',
            "labels is for candidates; words take theirs",
        ),
        ('prompt: "{t}"\nwords: [a, b]\ncolumns: t', "columns must hold a column"),
        ('prompt: "{t}"\nwords: [a, b]\ndata: [x]', "data must be a file, a folder"),
        ("prompt: [a]\nanswer: x", "line 1: prompt must be a text"),
        ("- a\n- b", "the file must hold keys and values"),
        ("", "the file must hold keys and values, got nothing"),
        ('prompt: "{t}\nwords', "is no YAML"),
    ],
)
def test_a_description_that_cannot_be_used_says_where(tmp_path, text, words):
    with pytest.raises(InputError) as error:
        described(tmp_path, text)
    assert words in str(error.value)
    assert "own" in str(error.value)


def test_no_description_is_a_sentence(tmp_path):
    with pytest.raises(InputError, match=r"The task .*gone.yaml cannot be read: No such file"):
        get_task(str(tmp_path / "gone.yaml"))
    with pytest.raises(InputError, match="files that end in .yaml or .yml describe others"):
        get_task("sst3")


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


def test_pairs_and_conversations_are_read_as_trl_takes_them():
    said = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "Bye"},
        {"role": "assistant", "content": "Farewell"},
    ]
    found = examples(
        COMPLETION,
        {"prompt": " two ", "completion": " four\n"},
        {"messages": said},
        {"prompt": said[:2], "completion": said[2:3]},
    )
    assert [e.answers[0] for e in found] == [" four\n", "Hello", "Farewell", "Hello"]
    assert [len(e.turns) for e in found] == [0, 2, 4, 2]
    assert COMPLETION.prompt(found[0]) == " two "
    assert found[1].turns == (("system", "Be brief."), ("user", "Hi"))


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": "a"}, "line 1: a row must have prompt and completion, or messages; it has"),
        ({"prompt": "a", "completion": " "}, "line 1: the completion is empty"),
        ({"prompt": 3, "completion": "x"}, "line 1: the prompt must be a text, got 3"),
        ({"messages": "hi"}, "line 1: messages must be a list of messages"),
        ({"messages": [{"role": "user", "content": "x"}]}, "no message of the assistant follows"),
        ({"messages": [{"role": "bot", "content": "x"}]}, "a message must have a role (system"),
        ({"messages": [{"role": "user", "content": None}]}, "a content that is a text"),
        ({"prompt": [], "completion": []}, "a prompt of messages must have one"),
        ({"prompt": "a", "completion": "\ud800"}, "line 1: this is no row of completion"),
    ],
)
def test_a_row_that_is_neither_says_where_and_why(tmp_path, row, words):
    path = write(tmp_path / "own.jsonl", json.dumps(row) + "\n")
    with pytest.raises(InputError) as error:
        rows.read(COMPLETION, path)
    assert words in str(error.value) and "own.jsonl" in str(error.value)


TEMPLATE = (
    "{% for m in messages %}<s>{{ m['role'] }} {{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant {% endif %}"
)


def scorer_of(places, max_length=64, **extra):
    loaded = loading.load(str(places / "opt"))
    return CausalScorer(loaded.model, loaded.tokenizer, COMPLETION, max_length, **extra)


@pytest.mark.hf
def test_the_end_of_an_answer_is_learned(places):
    scorer = scorer_of(places)
    (pair,) = examples(COMPLETION, {"prompt": "the film", "completion": " was fine"})
    batch = scorer.collate([pair])
    words = scorer.tokenizer.convert_ids_to_tokens(batch["targets"][0].tolist())
    assert words == ["was", "fine", "</s>"]

    scorer.tokenizer.chat_template = TEMPLATE
    scorer.chat = chat.form(scorer.tokenizer, "own", "causal")
    said = [{"role": "user", "content": "the film"}, {"role": "assistant", "content": "was fine"}]
    (talk,) = examples(COMPLETION, {"messages": said})
    assert scorer.prompt(talk) == "user the film</s>\n<s>assistant "
    words = scorer.tokenizer.convert_ids_to_tokens(scorer.collate([talk])["targets"][0].tolist())
    assert words == ["was", "fine", "</s>"]
    # Next to conversations a pair is one too.
    assert scorer.prompt(pair) == "user the film</s>\n<s>assistant "


@pytest.mark.hf
def test_a_row_that_is_too_long_loses_the_prompts_start_and_then_the_answers_end(places):
    whole, short = scorer_of(places), scorer_of(places, max_length=8)
    pair = examples(
        COMPLETION,
        {"prompt": "a the an film good bad", "completion": " one two"},
        {"prompt": "film", "completion": " good bad" * 10},
    )
    words = [
        [made.tokenizer.convert_ids_to_tokens(made.collate([e])["input_ids"][0].tolist())
         for e in pair]
        for made in (whole, short)
    ]  # fmt: skip
    assert words[0][0] == ["<s>", *"a the an film good bad one <unk>".split()]
    assert words[1][0] == ["<s>", *"the an film good bad one <unk>".split()]
    assert words[1][1] == ["<s>", "film", *["good", "bad"] * 3]
    with torch.no_grad():
        assert torch.isfinite(short.losses(short.collate(pair))).all()


@pytest.mark.hf
@pytest.mark.parametrize("metric", [None, "exact_match"])
def test_a_file_of_pairs_without_a_task(places, tmp_path, monkeypatch, capsys, metric):
    monkeypatch.chdir(tmp_path)
    lines = [
        json.dumps({"question": f"{a} film", "reply": f" {b}"})
        for a, b in (("good", "fine"), ("bad", "dull"), ("great", "fine"), ("slow", "dull"))
        for _ in range(8)
    ]
    write(tmp_path / "own.jsonl", "\n".join(lines))
    more = [] if metric is None else ["--metric", metric]
    assert main([
        "finetune", "--model", str(places / "opt"), "--data", "own.jsonl", "--steps", "200",
        "--columns", "prompt=question,completion=reply", "--lr", "3e-2", "--num-queries", "8",
        "--estimator", "population", "--max-length", "16", "--batch-size", "8",
        "--max-new-tokens", "4", *more,
    ]) == 0  # fmt: skip
    assert "lose the start" not in (shown := capsys.readouterr().out)
    (out,) = (tmp_path / "runs").iterdir()
    assert out.name.startswith("completion-")
    metrics = json.loads((out / "metrics.json").read_text())
    before, after = metrics["dev_accuracy_before"], metrics["dev_accuracy_after"]
    assert metrics["metric"] == (metric or "loss")
    if metric is None:
        assert after < 0.7 * before
        assert f"dev loss {before:.4g} -> {after:.4g}" in shown
        assert "loss" in (out / "report.md").read_text()
    else:
        # From nothing to whole answers, their ends included.
        assert before == 0 and after > 0.5


@pytest.mark.hf
def test_a_run_says_how_much_of_ones_own_data_is_cut(places, tmp_path):
    lines = [json.dumps({"prompt": "film " * n, "completion": " good"}) for n in (5, 20) * 10]
    path = write(tmp_path / "own.jsonl", "\n".join(lines))
    given = dict(data=str(path), steps=1, max_length=16, out=tmp_path / "run")
    run, said = Finetune(Settings(model=str(places / "opt"), **given)), []
    run.watcher.say = said.append
    run.run()
    (told,) = [s for s in said if "--max-length 16" in s]
    assert "of 17 texts looked at are longer" in told
    assert "(the longest has 22)" in told


@pytest.mark.hf
def test_conversations_need_a_chat_form_before_anything_is_written(places, tmp_path):
    said = [{"role": "user", "content": "film"}, {"role": "assistant", "content": "good"}]
    path = write(tmp_path / "own.jsonl", "\n".join([json.dumps({"messages": said})] * 20))
    given = dict(data=str(path), steps=2, out=tmp_path / "run")
    with pytest.raises(InputError, match="Data of conversations: the tokenizer of"):
        Finetune(Settings(model=str(places / "opt"), **given)).run()
    assert not (tmp_path / "run").exists()


@pytest.mark.hf
def test_a_run_keeps_its_description(places, tmp_path):
    own = write(tmp_path / "own.yaml", REVIEWS)
    out = tmp_path / "run"
    given = dict(data=str(places), steps=4, batch_size=4, max_length=32, eval_every=2)
    run = Finetune(Settings(model=str(places / "opt"), task=str(own), out=out, **given))
    run.watcher.step = lambda number, *_: run.stopped.set() if number == 2 else None
    assert run.run()["interrupted"]
    own.unlink()
    assert main(["finetune", "--resume", str(out)]) == 0
    assert json.loads((out / "metrics.json").read_text())["task"] == "reviews"
    assert "on reviews" in (out / "report.md").read_text()
    assert main(["replay", str(places / "opt"), str(out), "--verify"]) == 0


@pytest.mark.hf
def test_what_a_metric_does_not_fit_is_refused(places, tmp_path):
    for task, metric, words in (
        ("sst2", "f1", "--metric f1 does not fit task sst2, whose answers are chosen"),
        ("squad", "accuracy", "whose answers are written; it may be f1 or exact_match or loss"),
        ("sst2", "bleu", "--metric must be one of accuracy, f1, exact_match, loss"),
    ):
        with pytest.raises(InputError, match=words):
            Finetune(Settings(model="m", task=task, metric=metric, out=tmp_path / "run")).run()


def test_the_description_that_a_run_keeps_is_plain(tmp_path):
    plain = description.read(write(tmp_path / "own.yaml", REVIEWS))
    assert get_task("gone.yaml", json.loads(json.dumps(plain))) == get_task(
        str(tmp_path / "own.yaml")
    )
