"""Scores of candidates: of their own for each example, calibrated, in context, and written."""

import json
from dataclasses import replace

import pytest
import torch
from tiny import build

import zokernels as zk
from zokernels.lab.errors import InputError
from zokernels.lab.models import loading
from zokernels.lab.runs.evaluate import accuracy
from zokernels.lab.runs.run import Finetune
from zokernels.lab.runs.settings import Settings
from zokernels.lab.scoring import SCORERS, generation
from zokernels.lab.tasks import TASKS, Example

pytestmark = [pytest.mark.hf, pytest.mark.usefixtures("one_thread")]
COPA = [
    {"premise": "The film was dull.", "choice1": "A bad plot.", "choice2": "The movie is slow."}
    | {"question": "cause", "label": 1},
    {"premise": "It was a good plot.", "choice1": "I was not bad.", "choice2": "Dull."}
    | {"question": "effect", "label": 0},
    {"premise": "This heart is great.", "choice1": "Slow.", "choice2": "Fine."}
    | {"question": "effect", "label": 0},
]
RECORD = [
    {"passage": "film movie plot", "query": "@placeholder is", "entities": list(names)}
    | {"answers": [right]}
    for names, right in ((("film", "the movie", "plot"), "plot"), (("heart", "plot"), "heart"))
]


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    for kind in ("opt", "llama", "gpt2", "roberta"):
        build(kind, root / kind)
    return root


def scorer_of(places, task, kind="opt", **extra):
    loaded = loading.load(str(places / kind))
    return SCORERS[loaded.kind](loaded.model, loaded.tokenizer, task, 64, **extra)


def examples(name, rows):
    return [e for row in rows for e in TASKS[name].read(row, "x")]


def mean_log_probability(scorer, prompt, candidate):
    """The plain way: one row, one candidate, no padding."""
    tokenizer = scorer.tokenizer
    ids = tokenizer(prompt + candidate, return_tensors="pt")["input_ids"]
    count = ids.shape[1] - len(tokenizer(prompt)["input_ids"])
    logs = scorer.model(ids).logits.log_softmax(-1)[0]
    return logs[-count - 1 : -1].gather(1, ids[0, -count:, None]).mean()


@pytest.mark.parametrize("kind", ["opt", "llama", "gpt2"])
@pytest.mark.parametrize(("name", "given"), [("copa", COPA), ("record", RECORD)])
def test_candidates_of_each_examples_own_are_scored_in_one_batch(places, kind, name, given):
    task, found = TASKS[name], examples(name, given)
    scorer = scorer_of(places, task, kind)
    with torch.no_grad():
        scores = scorer.scores(scorer.collate(found))
        for i, example in enumerate(found):
            candidates = task.candidates(example)
            want = [mean_log_probability(scorer, task.prompt(example), c) for c in candidates]
            # Padding changes the order of sums in attention, nothing else.
            got = scores[i, : len(candidates)]
            torch.testing.assert_close(got, torch.stack(want), rtol=1e-4, atol=1e-5)
            assert scores[i, len(candidates) :].isneginf().all()
    assert torch.isfinite(scorer.loss(scorer.collate(found)))


def test_a_blank_that_opens_the_sentence_is_scored_without_its_first_token(places):
    row = {"sentence": "_ is a good film .", "option1": "the plot", "option2": "heart"}
    found = examples("winogrande", [{**row, "answer": "1"}])
    with torch.no_grad():
        for kind in ("opt", "gpt2"):
            scorer = scorer_of(places, TASKS["winogrande"], kind)
            scores = scorer.scores(scorer.collate(found))
            assert torch.isfinite(scores).all()
            assert scores[0, 0] != scores[0, 1]


def test_calibration_takes_off_what_the_candidate_scores_without_content(places):
    for name, given in (("copa", COPA), ("record", RECORD)):
        task, found = TASKS[name], examples(name, given)
        scorer = scorer_of(places, task)
        want = []
        with torch.no_grad():
            for example in found:
                free = task.prompt(task.content_free(example))
                gains = [
                    mean_log_probability(scorer, task.prompt(example), c)
                    - mean_log_probability(scorer, free, c)
                    for c in task.candidates(example)
                ]
                want.append(int(torch.stack(gains).argmax()))
            assert scorer.predict(found, calibrate=True) == want


def test_examples_in_context_stand_before_the_prompt_with_their_answers(places):
    task = TASKS["sst2"]
    demos = [Example("a dull plot", 0), Example("a fine heart", 1)]
    scorer = scorer_of(places, task, demos=demos)
    batch = scorer.collate([Example("good film", 1)])
    text = scorer.tokenizer.decode(batch["input_ids"][0], skip_special_tokens=True)
    assert text == "a dull plot it was terrible a fine heart it was great good film it was"
    with pytest.raises(InputError, match="in context need a causal LM"):
        scorer_of(places, task, "roberta", demos=demos)


def test_objectives_are_what_they_say(places):
    found = examples("copa", COPA)
    with torch.no_grad():
        losses = {}
        for objective in ("candidates", "tokens", "accuracy"):
            scorer = scorer_of(places, TASKS["copa"], objective=objective)
            batch = scorer.collate(found)
            scores, labels = scorer.scores(batch), batch["labels"]
            losses[objective] = float(scorer.loss(batch))
        right = scores[range(3), labels]
    assert losses["candidates"] == pytest.approx(float(scores.logsumexp(1).sub(right).mean()))
    assert losses["tokens"] == pytest.approx(float(-right.mean()))
    assert losses["accuracy"] == pytest.approx(float((scores.argmax(1) != labels).float().mean()))


def test_accuracy_itself_can_be_trained_on(places):
    """It has no gradient; a large ε and the mean over many examples give it a slope."""
    found = [
        Example(f"{w} film", int(w in ("good", "fine"))) for w in ("good", "bad", "fine", "dull")
    ]
    scorer = scorer_of(places, TASKS["sst2"], objective="accuracy")
    batch = scorer.collate(found * 4)
    opt = zk.ZOSGD(scorer.model, lr=1e-2, eps=0.1, num_queries=4, seed=2)
    before = accuracy(scorer, found).value
    for _ in range(30):
        opt.step(lambda: scorer.loss(batch))
    assert accuracy(scorer, found).value > before


def test_a_mask_at_the_start_of_a_long_text_stays(places):
    loaded = loading.load(str(places / "roberta"))
    task = replace(TASKS["trec"], words=("good", "bad"))
    scorer = SCORERS["masked"](loaded.model, loaded.tokenizer, task, 9)
    batch = scorer.collate([Example("a fine film with a very good heart and a plot", 0)])
    assert batch["input_ids"].shape[1] == 9
    assert batch["places"].tolist() == [1]


@pytest.mark.parametrize("kind", ["opt", "llama", "gpt2"])
def test_a_written_answer_is_what_greedy_decoding_gives(places, kind):
    rows = [
        {"context": "the film is good", "question": "is it", "answers": {"text": ["good"]}},
        {"context": "a plot", "question": "a very slow one of it", "answers": {"text": ["plot"]}},
    ]
    found = examples("squad", rows)
    scorer = scorer_of(places, TASKS["squad"], kind)
    scorer.model.generation_config.eos_token_id = None
    got = generation.answers(scorer, found)
    for example, text in zip(found, got, strict=True):
        ids = scorer.tokenizer(scorer.prompt(example), return_tensors="pt")["input_ids"]
        start = ids.shape[1]
        with torch.no_grad():
            for _ in range(8):
                ids = torch.cat([ids, scorer.model(ids).logits[:, -1:].argmax(-1)], 1)
        want = scorer.tokenizer.decode(ids[0, start:], skip_special_tokens=True)
        assert text.startswith(want.strip())
    value = accuracy(scorer, found)
    assert value.value == pytest.approx(sum(map(generation.f1, got, [["good"], ["plot"]])) / 2)


@pytest.mark.parametrize(
    ("name", "rows", "extra"),
    [
        ("copa", COPA, {"scheme": "prefix", "template": False, "calibrate": True}),
        ("record", RECORD, {"objective": "tokens", "demos": 1}),
        ("copa", COPA, {"scheme": "head", "optimizer": "ZO-SGD", "estimator": "one_sided"}),
    ],
)
def test_a_whole_run_of_a_task_with_choices(places, tmp_path, name, rows, extra):
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows * 4)))
    (tmp_path / "val.jsonl").write_text("\n".join(map(json.dumps, rows)))
    metrics = Finetune(
        Settings(
            model=str(places / "llama"),
            data=str(tmp_path),
            out=tmp_path / "run",
            task=name,
            steps=3,
            batch_size=4,
            lr=1e-3,
            max_length=64,
            **extra,
        )
    ).run()
    assert metrics["dev_examples"] == len(rows)
    assert metrics["optimizer"] == "ZOSGD"
    assert 0 <= metrics["dev_accuracy_after"] <= 1
