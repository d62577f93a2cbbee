"""Models in GGUF form: read as what their blocks stand for, trained, saved, refused if damaged."""

import importlib.util
import json
import math

import numpy as np
import pytest
import tiny_gguf
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from tiny import build

import zokernels as zk
from zokernels.lab.cli import main
from zokernels.lab.errors import InputError
from zokernels.lab.models import gguf_file, loading, schemes
from zokernels.lab.runs.history import Watcher
from zokernels.lab.runs.resume import settings_of
from zokernels.lab.runs.run import Finetune
from zokernels.lab.runs.settings import Settings
from zokernels.lab.scoring.causal import CausalScorer
from zokernels.lab.tasks import SST2, Example

pytestmark = [pytest.mark.hf, pytest.mark.usefixtures("one_thread")]
TEXTS = [("a fine film with heart", 1), ("dull", 0), ("the plot was bad", 0)]
EXAMPLES = [Example(text, label, {"sentence": text}) for text, label in TEXTS]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a model, and data whose classes differ by a word; and the model meant."""
    root = tmp_path_factory.mktemp("gguf")
    meant = tiny_gguf.write(root / "tiny.gguf")
    rows = [
        f"{lead} {word} {tail}\t{int(tail in ('good', 'fine'))}\n"
        for lead in ("the", "this")
        for word in ("film", "movie", "plot", "heart")
        for tail in ("good", "fine", "bad", "dull")
    ]
    for split in ("train", "dev"):
        (root / f"{split}.tsv").write_text("sentence\tlabel\n" + "".join(rows))
    return root, meant


@pytest.fixture
def place(made, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return made[0]


def scorer_of(loaded, model=None):
    return CausalScorer(model or loaded.model, loaded.tokenizer, SST2, 64)


@torch.no_grad()
def scores(loaded, model=None):
    scorer = scorer_of(loaded, model)
    return scorer.scores(scorer.collate(EXAMPLES))


def same(a, b):
    mine, other = a.state_dict(), b.state_dict()
    return mine.keys() == other.keys() and all(torch.equal(mine[n], other[n]) for n in mine)


def finetune(place, out, *options):
    common = "--steps 4 --batch-size 4 --eps 1e-2 --max-length 32 --seed 3".split()
    model = ["--model", str(place / "tiny.gguf"), "--data", str(place)]
    return main(["finetune", *model, "--out", str(out), *common, *options])


@torch.no_grad()
def test_the_loss_is_that_of_the_dequantised_tensors(made, place):
    """Of the model built from the numbers that the blocks stand for, on the file's own tokens."""
    loaded, meant = loading.load(str(place / "tiny.gguf")), made[1]
    assert loaded.kind == "causal" and not loaded.model.training
    assert same(loaded.model, meant)
    tokens = tiny_gguf.vocabulary()
    want = torch.zeros(len(TEXTS), 2)
    for i, (text, _) in enumerate(TEXTS):
        words = ["<bos>", *("▁" + word for word in f"{text} It was".split())]
        words[1] = words[1].removeprefix("▁")
        for j, answer in enumerate(("▁terrible", "▁great")):
            row = torch.tensor([[tokens.index(word) for word in words]])
            want[i, j] = meant(input_ids=row).logits[0, -1].log_softmax(-1)[tokens.index(answer)]
    scorer = scorer_of(loaded)
    # A row alone and rows that are padded to one width are summed in another order.
    torch.testing.assert_close(scores(loaded), want, rtol=1e-4, atol=1e-5)
    loss = F.cross_entropy(want, torch.tensor([label for _, label in TEXTS]))
    torch.testing.assert_close(scorer.loss(scorer.collate(EXAMPLES)), loss, rtol=1e-4, atol=1e-5)
    assert want.std() > 0.1


@torch.no_grad()
def test_padding_on_either_side_changes_nothing(place):
    loaded = loading.load(str(place / "tiny.gguf"))
    rows = loaded.tokenizer([text for text, _ in TEXTS])["input_ids"]
    right, left = (scorer_of(loaded).pad(rows, before) for before in (False, True))
    ends = right["attention_mask"].sum(1) - 1
    last = [
        loaded.model(**right).logits[range(len(rows)), ends],
        loaded.model(**left).logits[:, -1],
    ]
    alone = [loaded.model(input_ids=torch.tensor([row])).logits[0, -1] for row in rows]
    # Positions count from other places, so that sines and cosines are of other angles.
    for found in last:
        torch.testing.assert_close(found, torch.stack(alone), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", list(loading.DTYPES))
def test_a_note_says_how_many_weights_were_dequantised_into_what(made, place, dtype):
    loaded, meant = loading.load(str(place / "tiny.gguf"), dtype), made[1]
    packed = sum(
        p.numel() for n, p in meant.named_parameters()
        if p.ndim > 1 and tiny_gguf.kind_of(n) != tiny_gguf.KIND.F16
    )  # fmt: skip
    whole = sum(p.numel() for p in meant.parameters())
    assert loaded.notes == [
        f"tiny.gguf is quantised: {packed:,} of its {whole:,} weights (Q4_0, Q5_0, Q8_0) were "
        f"dequantised into {dtype}, and so they are trained and saved."
    ]
    for name, parameter in loaded.model.named_parameters():
        # Each number is rounded once.
        assert torch.equal(parameter, meant.get_parameter(name).to(loading.DTYPES[dtype]))


def test_what_lies_beside_a_file_is_not_taken_for_its_own(made, place, tmp_path):
    other = build("opt", tmp_path)
    (other / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    # Neither its end nor its name says what it is; files of some programs are called so.
    (other / "sha256-0123").write_bytes((place / "tiny.gguf").read_bytes())
    loaded = loading.load(str(other / "sha256-0123"))
    assert same(loaded.model, made[1])
    assert loaded.tokenizer.tokenize("the film") == ["the", "▁film"]


def test_a_run_saves_weights_that_load_and_replays_to_the_same_bits(place, tmp_path, capsys):
    out, replayed = tmp_path / "run", tmp_path / "replayed"
    assert finetune(place, out, "--lr", "1e-3") == 0
    note = "were dequantised into float32"
    assert note in " ".join(capsys.readouterr().out.split())
    assert note in (out / "report.md").read_text()
    config = json.loads((out / "final/config.json").read_text())
    assert config["architectures"] == ["Gemma3ForCausalLM"]
    assert "quantization_config" not in config
    argv = ["replay", str(place / "tiny.gguf"), str(out), "--verify", "--out", str(replayed)]
    assert main(argv) == 0
    base, saved = loading.load(str(place / "tiny.gguf")), loading.load(str(out / "final"))
    again = loading.load(str(replayed))
    assert saved.notes == []
    assert saved.tokenizer("a fine film")["input_ids"] == base.tokenizer("a fine film")["input_ids"]
    assert same(saved.model, again.model) and not same(saved.model, base.model)
    assert torch.equal(scores(saved), scores(again))
    # A run may begin with what another has saved.
    assert main(["finetune", "--model", str(out / "final"), "--data", str(place), "--steps", "1",
                 "--out", str(tmp_path / "next")]) == 0  # fmt: skip


@pytest.mark.filterwarnings("error:Could not find a config file")
def test_an_adapter_is_saved_and_loads_onto_the_file_again(place, tmp_path, monkeypatch, capsys):
    from peft import PeftModel

    monkeypatch.chdir(place)
    out = tmp_path / "run"
    options = "--scheme lora --lr 1e-1 --task sst2 --data . --steps 3".split()
    # A relative name looks like one of the hub's.
    assert main(["finetune", "--model", "./tiny.gguf", "--out", str(out), *options]) == 0
    kept = json.loads((out / "final/adapter_config.json").read_text())
    assert kept["base_model_name_or_path"] == str(place / "tiny.gguf")
    base = loading.load("tiny.gguf")
    plain = scores(base)
    adapted = PeftModel.from_pretrained(base.model, out / "final").eval()
    after = scores(base, adapted)
    assert not torch.equal(after, plain)
    again = loading.load("tiny.gguf")
    fresh, _ = schemes.apply(again.model, "lora", seed=0)
    zk.replay(fresh, out / "trajectory.zk")
    assert torch.equal(scores(again, fresh), after)
    assert main(["replay", "tiny.gguf", str(out), "--verify"]) == 0


@pytest.mark.parametrize("optimizer", ["zosgd", "fo-sgd"])
def test_a_resumed_run_ends_with_the_bits_of_a_whole_one(place, tmp_path, optimizer):
    def settings(out):
        return Settings(
            model=str(place / "tiny.gguf"), out=out, data=str(place), optimizer=optimizer, steps=5,
            lr=1e-2, batch_size=4, eval_every=2, eval_examples=8, dtype="bfloat16",
        )  # fmt: skip

    class Dies(Watcher):
        def step(self, number, *_):
            if number == 3:
                raise KeyboardInterrupt

    Finetune(settings(tmp_path / "whole")).run()
    with pytest.raises(KeyboardInterrupt):
        Finetune(settings(tmp_path / "cut"), Dies()).run()
    Finetune(settings_of(tmp_path / "cut"), resume=True).run()
    first, second = (
        loading.load(str(tmp_path / p / "final"), "bfloat16") for p in ("whole", "cut")
    )
    assert same(first.model, second.model)


def test_a_sweep_runs_on_a_file(place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "grid.yaml").write_text(
        f"base: {{model: {place / 'tiny.gguf'}, data: {place}, steps: 2, batch_size: 4}}\n"
        "grid: {lr: [1e-4, 1e-3]}\n"
    )
    assert main(["sweep", "grid.yaml", "--out", "out"]) == 0
    assert len(list((tmp_path / "out").rglob("trajectory.zk"))) == 2


def cut(part):
    def change(source, path):
        path.write_bytes(source[: math.floor(len(source) * part)])

    return change


def changed(number, value):
    """One of the numbers that follow a tensor's name: of dimensions, each of these, its type."""

    def change(source, path):
        name = b"blk.0.attn_q.weight"
        start = source.index(name) + len(name)
        source = bytearray(source)
        source[start + (0, 4, 12, 20)[number]] = value
        path.write_bytes(source)

    return change


def written(**given):
    return lambda source, path: tiny_gguf.write(path, **given)


FACTORS = [("rope_freqs.weight", np.ones(16, np.float32))]
BAD = {
    "no file": (lambda source, path: None, "There is no file"),
    "a folder": (lambda source, path: path.mkdir(), "has no config.json"),
    "another form": (lambda s, path: path.write_bytes(b"PK\3\4" + s), "is not in GGUF form"),
    "empty": (lambda s, path: path.write_bytes(b""), "is not in GGUF form: it begins with b''"),
    "cut at once": (cut(0.0005), "is damaged or not complete (its header goes on behind its end)"),
    "cut in the header": (cut(0.05), "damaged or not complete (its header goes on behind its end)"),
    "cut in the weights": (cut(0.97), "is damaged or not complete (it has"),
    "other version": (
        lambda s, path: path.write_bytes(s[:4] + b"\0\0\0\3" + s[8:]),
        "is of version 50331648 of GGUF, and only 2 and 3 in little-endian order",
    ),
    "unknown type": (changed(3, 99), "blk.0.attn_q.weight is of type 99, which the installed"),
    "seven dimensions": (changed(0, 7), "(the tensor blk.0.attn_q.weight has 7 dimensions)"),
    "half a block": (changed(1, 31), "weight of type Q4_0 has the shape [64, 31])"),
    "part of a model": (written(entries=[("split.count", 3)]), "is one of 3 parts of a model"),
    "an adapter": (written(entries=[("general.type", "adapter")]), "is of type 'adapter'"),
    "scaled positions": (
        written(
            entries=[("gemma3.rope.scaling.type", "linear"), ("gemma3.rope.scaling.factor", 8)]
        ),
        "scales its rotary positions (linear, factor 8)",
    ),
    "no layer": (
        written(leave_out=["blk.3.ffn_up.weight"]),
        "lacks 1 tensors of its model, model.layers.3.mlp.up_proj.weight among them",
    ),
    "unknown architecture": (
        written(architecture="bert"),
        "of architecture 'bert': GGUF model with architecture bert is not supported yet. Pass",
    ),
    "no language model": (written(architecture="t5encoder"), "T5EncoderModel cannot be scored"),
}


@pytest.mark.parametrize("what", BAD)
def test_what_cannot_be_used_is_one_sentence_and_nothing_is_written(place, tmp_path, capsys, what):
    change, words = BAD[what]
    path = tmp_path / "x.gguf"
    change((place / "tiny.gguf").read_bytes(), path)
    out = tmp_path / "run"
    argv = ["finetune", "--model", str(path), "--data", str(place), "--out", str(out)]
    assert main(argv) == 2
    said = capsys.readouterr().err
    assert words in said
    assert said.count("\n") == 1 and "Traceback" not in said
    assert not out.exists()


def test_factors_that_are_left_out_are_said(tmp_path):
    tiny_gguf.write(tmp_path / "x.gguf", tensors=FACTORS)
    notes = loading.load(str(tmp_path / "x.gguf")).notes
    assert len(notes) == 2 and "rotary frequencies (rope_freqs.weight)" in notes[1]


def test_without_what_reads_it_a_sentence_says_what_to_install(place, monkeypatch):
    path = str(place / "tiny.gguf")
    with monkeypatch.context() as patch:
        found = importlib.util.find_spec
        patch.setattr(
            importlib.util, "find_spec", lambda n, *a: None if n == "gguf" else found(n, *a)
        )
        with pytest.raises(InputError, match=r"pip install 'zokernels\[gguf\]'"):
            loading.load(path)
    monkeypatch.setattr("transformers.__version__", "5.22.2")
    with pytest.raises(InputError, match="transformers 5.23 or later, .* 5.22.2 is installed"):
        loading.load(path)


@given(data=st.data())
def test_fuzz_a_header_is_read_or_refused(place, tmp_path_factory, data):
    source = bytearray((place / "tiny.gguf").read_bytes())
    # All of the header, the tensors' table at its end as often as the rest.
    end = source.rindex(b"output_norm.weight") + 60
    spots = st.integers(0, end) | st.integers(end - 4000, end)
    for at in data.draw(st.lists(spots, min_size=1, max_size=4)):
        source[at] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp("fuzz") / "x.gguf"
    path.write_bytes(source)
    try:
        header = gguf_file.read(path)
    except InputError as error:
        assert str(path) in str(error)
    else:
        assert header.tensors and header.notes("float32", None) is not None
