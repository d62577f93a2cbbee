"""Tasks and data of one's own: descriptions, files with headers, completions, conversations."""

import json

import pytest
from own import described, examples, write

from zokernels.lab.cli import main
from zokernels.lab.errors import InputError
from zokernels.lab.runs.run import Finetune
from zokernels.lab.runs.settings import Settings
from zokernels.lab.scoring import generation
from zokernels.lab.tasks import description, get_task

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
