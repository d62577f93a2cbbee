"""Rows that are a task by themselves: pairs and conversations."""

import json

import pytest
import torch
from own import examples, write

from zokernels.lab.cli import main
from zokernels.lab.errors import InputError
from zokernels.lab.models import loading
from zokernels.lab.runs.run import Finetune
from zokernels.lab.runs.settings import Settings
from zokernels.lab.scoring import CausalScorer
from zokernels.lab.tasks import COMPLETION, chat, rows

pytestmark = pytest.mark.usefixtures("one_thread")


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
        ({"prompt": None, "completion": "x"}, "line 1: the prompt is null; give it a text"),
        ({"prompt": "a", "completion": None}, "line 1: the completion is null; give it a text"),
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
