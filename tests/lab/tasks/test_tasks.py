"""Data, prompts, scoring, schemes: what a user gets from each, on tiny models."""

import math
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from tiny import build, environment

from zokernels.lab import files, hub
from zokernels.lab.errors import InputError
from zokernels.lab.models import loading, schemes
from zokernels.lab.runs.evaluate import accuracy
from zokernels.lab.scoring import SCORERS
from zokernels.lab.tasks import SST2, Example, data, get_task, rows
from zokernels.lab.tasks.batches import batches

EXAMPLES = [
    Example("a fine film with a good heart", 1),
    Example("dull", 0),
    Example("slow and dull and bad and slow and dull and very very bad", 0),
]


def write(path, *rows):
    path.write_text("sentence\tlabel\n" + "".join(f"{row}\n" for row in rows))


@pytest.fixture
def sst2_folder(tmp_path):
    write(tmp_path / "train.tsv", *[f"a good film {i} \t{i % 2}" for i in range(40)])
    write(tmp_path / "dev.tsv", "fine \t1", "bad \t0")
    return tmp_path


def scorer_of(kind, tmp_path, max_length=64):
    loaded = loading.load(str(build(kind, tmp_path / kind)))
    return SCORERS[loaded.kind](loaded.model, loaded.tokenizer, SST2, max_length)


def test_importing_the_package_or_its_tasks_imports_no_transformers():
    code = (
        "import sys, zokernels, zokernels.lab.tasks, zokernels.lab.cli; "
        "print(sorted({'transformers', 'peft', 'matplotlib', 'datasets'} & set(sys.modules)))"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment()
    )
    assert out.stdout.strip() == "[]"


def test_a_folder_or_its_sst2_folder_serves(sst2_folder, tmp_path_factory):
    outer = tmp_path_factory.mktemp("outer")
    (outer / "SST-2").symlink_to(sst2_folder)
    for named in (sst2_folder, outer):
        splits = data.load(SST2, named)
        assert len(splits.dev) == 2
        assert len(splits.train) + len(splits.valid) == 40
        assert not {e.sentence for e in splits.train} & {e.sentence for e in splits.valid}


def test_train_rest_is_the_split_that_picks(sst2_folder):
    write(sst2_folder / "train_rest.tsv", "held out \t1")
    splits = data.load(SST2, sst2_folder)
    assert [e.sentence.strip() for e in splits.valid] == ["held out"]
    assert len(splits.train) == 40


def test_the_folder_given_wins_over_the_variable(sst2_folder, monkeypatch):
    monkeypatch.setenv(data.VARIABLE, "/does/not/exist")
    assert data.load(SST2, sst2_folder).source == f"SST-2 from {sst2_folder}"
    with pytest.raises(InputError, match="ZOKERNELS_DATA names /does/not/exist"):
        data.load(SST2)


def test_without_a_hub_the_shipped_set_serves_and_says_why(monkeypatch):
    monkeypatch.delenv(data.VARIABLE, raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(data, "_from_hub", lambda *_: (None, hub.unreachable()))
    splits = data.load(SST2)
    assert "ships" in splits.source
    assert "HF_HUB_OFFLINE is set" in splits.notes[0]
    sentences = [e.sentence for e in splits.train + splits.valid + splits.dev]
    # The same words with another stop or case are the same sentence.
    bare = {re.sub(r"\W", "", sentence).lower() for sentence in sentences}
    assert len(bare) == len(sentences) == 600
    # So many that a gain of seven points at 80 % is beyond two standard errors of a difference.
    assert len(splits.dev) == 400 and sum(e.label for e in splits.dev) == 200


def test_a_hub_that_never_answers_costs_less_than_five_seconds(monkeypatch):
    import socket
    import time

    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        began = time.perf_counter()
        assert hub.unreachable() is not None
        assert time.perf_counter() - began < 5


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("sentence\tlabel\ngood film \t1\nno tab here\n", "line 3: expected sentence<TAB>label"),
        ("sentence\tlabel\ngood\tfilm\t1\n", "line 2: .* got 2 tabs"),
        ("sentence\tlabel\ngood film \t2\n", "line 2: the label must be 0 or 1, got '2'"),
        ("sentence\tlabel\ngood film \tpositive\n", "got 'positive'"),
        ("sentence\tlabel\n  \t1\n", "line 2: the sentence is empty"),
        ("text\tgold\ngood film \t1\n", "line 1: the label must be 0 or 1, got 'gold'"),
        ("", "has no rows"),
        ("sentence\tlabel\n", "has no rows"),
    ],
)
def test_a_malformed_file_is_named_with_its_line(tmp_path, content, sentence):
    path = tmp_path / "train.tsv"
    path.write_text(content)
    with pytest.raises(InputError, match=sentence) as caught:
        rows.read(SST2, path)
    assert str(path) in str(caught.value)


def test_quotes_and_odd_line_breaks_are_part_of_a_sentence(tmp_path):
    path = tmp_path / "dev.tsv"
    path.write_bytes('sentence\tlabel\r\n"so bad it \x85 is\t0\r\ngood" \t1\r\n'.encode())
    assert [e.label for e in rows.read(SST2, path)] == [0, 1]


def test_bytes_that_are_not_text_are_one_sentence(tmp_path):
    path = tmp_path / "dev.tsv"
    path.write_bytes(b"caf\xe9\t1\n")
    with pytest.raises(InputError, match="not UTF-8"):
        rows.read(SST2, path)


def test_word_limits_count_both_ends():
    kept = data.by_words(EXAMPLES, 1, 7)
    assert [len(e.sentence.split()) for e in kept] == [7, 1]
    assert data.by_words(EXAMPLES, None, None) == EXAMPLES


def test_a_part_is_always_the_same_part():
    pool = [Example(str(i), i % 2) for i in range(50)]
    assert data.part(pool, 7) == data.part(pool, 7)
    assert len(data.part(pool, 7)) == 7
    assert data.part(pool, None) == data.part(pool, 99) == pool


@pytest.mark.parametrize("size", [4, 5])
def test_balanced_batches_have_equal_class_counts(size):
    pool = [Example(f"{i}", int(i < 3)) for i in range(20)]
    stream = batches(pool, size, seed=3, balanced=True)
    counts = [sum(e.label for e in next(stream)) for _ in range(10)]
    assert sum(counts) == size * 10 / 2
    assert max(counts) - min(counts) <= size % 2


def test_an_epoch_shows_every_sentence_once_and_the_seed_fixes_the_order():
    pool = [Example(f"{i}", i % 2) for i in range(12)]
    runs = []
    for seed in (5, 5, 6):
        stream = batches(pool, 4, seed=seed, balanced=False)
        runs.append([e.sentence for _ in range(3) for e in next(stream)])
    assert sorted(runs[0]) == sorted(e.sentence for e in pool)
    assert runs[0] == runs[1] != runs[2]


def test_batches_that_cannot_be_made_are_refused():
    with pytest.raises(InputError, match="no training sentence"):
        batches([], 4, seed=0, balanced=False)
    with pytest.raises(InputError, match="label 0"):
        batches([Example("good", 1)], 4, seed=0, balanced=True)


def test_an_unknown_task_names_the_known_ones():
    with pytest.raises(InputError, match="no task 'sst3'; the tasks are: sst2"):
        get_task("sst3")


@pytest.mark.hf
@pytest.mark.parametrize(
    ("kind", "expected"),
    [("opt", "causal"), ("bert", "encoder"), ("roberta", "masked"), ("llama", "causal")],
)
def test_the_checkpoint_decides_how_it_is_scored(tmp_path, kind, expected):
    assert loading.load(str(build(kind, tmp_path / kind))).kind == expected


@pytest.mark.hf
@pytest.mark.parametrize("kind", ["opt", "bert", "roberta", "llama"])
def test_scores_do_not_depend_on_the_rest_of_the_batch(tmp_path, kind):
    scorer = scorer_of(kind, tmp_path)
    with torch.no_grad():
        together = scorer.scores(scorer.collate(EXAMPLES))
        alone = torch.cat([scorer.scores(scorer.collate([e])) for e in EXAMPLES])
    assert together.dtype == torch.float32
    # Padding changes the order of sums in attention, nothing else.
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    assert together[:, 0].ne(together[:, 1]).all()


@pytest.mark.hf
@pytest.mark.parametrize("words", [("terrible", "great"), ("very bad", "good")])
def test_causal_scores_are_mean_log_probabilities_of_the_candidates(tmp_path, words):
    loaded = loading.load(str(build("opt", tmp_path / "opt")))
    task = replace(SST2, words=words)
    scorer = SCORERS["causal"](loaded.model, loaded.tokenizer, task, 64)
    with torch.no_grad():
        scores = scorer.scores(scorer.collate(EXAMPLES))
        for i, example in enumerate(EXAMPLES):
            for j, word in enumerate(words):
                text = f"{example.sentence} It was {word}"
                ids = loaded.tokenizer(text, return_tensors="pt")["input_ids"]
                logs = loaded.model(ids).logits.log_softmax(-1)[0]
                n = len(word.split())
                want = logs[-n - 1 : -1].gather(1, ids[0, -n:, None]).mean()
                torch.testing.assert_close(scores[i, j], want, rtol=1e-4, atol=1e-5)


@pytest.mark.hf
def test_a_masked_model_reads_the_label_words_at_the_blank(tmp_path):
    scorer = scorer_of("roberta", tmp_path)
    tokenizer = scorer.tokenizer
    ids = tokenizer(f"dull It was {tokenizer.mask_token}.", return_tensors="pt")["input_ids"]
    place = int((ids[0] == tokenizer.mask_token_id).nonzero())
    with torch.no_grad():
        logits = scorer.model(ids).logits[0, place]
        got = scorer.scores(scorer.collate([EXAMPLES[1]]))[0]
    want = logits[tokenizer.convert_tokens_to_ids(["terrible", "great"])]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.hf
def test_an_encoder_compares_mean_embeddings_with_those_of_the_label_sentences(tmp_path):
    scorer = scorer_of("bert", tmp_path)

    def embed(text):
        ids = scorer.tokenizer(text, return_tensors="pt")
        return scorer.model(**ids).last_hidden_state[0].mean(0)

    with torch.no_grad():
        got = scorer.scores(scorer.collate(EXAMPLES[:2]))
        for i, example in enumerate(EXAMPLES[:2]):
            for j, text in enumerate(("It was terrible.", "It was great.")):
                want = 20 * F.cosine_similarity(embed(example.sentence), embed(text), dim=0)
                torch.testing.assert_close(got[i, j], want, rtol=1e-4, atol=1e-4)


@pytest.mark.hf
@pytest.mark.parametrize("kind", ["opt", "bert", "roberta"])
def test_a_long_sentence_loses_words_and_keeps_the_prompt(tmp_path, kind):
    scorer = scorer_of(kind, tmp_path, max_length=9)
    batch = scorer.collate(EXAMPLES)
    assert batch["input_ids"].shape[1] <= 9
    assert torch.isfinite(scorer.scores(batch)).all()
    if kind != "bert":
        text = scorer.tokenizer.decode(batch["input_ids"][2])
        assert "it was" in text.lower()


@pytest.mark.hf
def test_a_label_word_that_is_no_single_token_is_refused(tmp_path):
    loaded = loading.load(str(build("roberta", tmp_path / "m")))
    task = replace(SST2, words=("very bad", "great"))
    with pytest.raises(InputError, match="'very bad' must be one known token"):
        SCORERS["masked"](loaded.model, loaded.tokenizer, task, 64)


@pytest.mark.hf
def test_accuracy_counts_every_example_once_whatever_the_batch(tmp_path):
    scorer = scorer_of("bert", tmp_path)
    found = [accuracy(scorer, EXAMPLES, batch_size=size) for size in (1, 2, 64)]
    assert found[0] == found[1] == found[2]
    p = found[0].value
    assert found[0].error == pytest.approx(math.sqrt(p * (1 - p) / 3))


@pytest.mark.hf
def test_bitfit_trains_biases_and_norms_only(tmp_path):
    loaded = loading.load(str(build("opt", tmp_path / "m")))
    model, trained = schemes.apply(loaded.model, "bitfit")
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    assert names
    assert all(n.endswith("bias") or "norm" in n for n in names)
    assert trained.weights == sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.hf
def test_lora_trains_adapters_on_q_and_v_and_starts_as_the_model(tmp_path):
    path = str(build("opt", tmp_path / "m"))
    plain, loaded = loading.load(path), loading.load(path)
    state = torch.random.get_rng_state()
    model, _ = schemes.apply(loaded.model, "lora", seed=4)
    assert torch.equal(torch.random.get_rng_state(), state)
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    assert all("lora_" in n and ("q_proj" in n or "v_proj" in n) for n in names)
    ids = torch.tensor([[1, 5, 6]])
    torch.testing.assert_close(model(input_ids=ids).logits, plain.model(input_ids=ids).logits)


@pytest.mark.hf
@pytest.mark.parametrize(
    ("pattern", "sentence"), [("nothing_like_it", "matches none"), ("(", "not a regular")]
)
def test_a_pattern_that_leaves_nothing_to_train_is_refused(tmp_path, pattern, sentence):
    loaded = loading.load(str(build("bert", tmp_path / "m")))
    with pytest.raises(InputError, match=sentence):
        schemes.apply(loaded.model, "full", pattern)


def test_json_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "m.json"
    files.write_json(path, {"a": 1})
    with pytest.raises(TypeError, match="JSON"):
        files.write_json(path, {"a": object()})
    assert path.read_text().strip() == '{\n  "a": 1\n}'
    assert [p.name for p in tmp_path.iterdir()] == ["m.json"]
