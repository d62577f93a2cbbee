"""Files from others: read without running anything in them, and refused whole when damaged."""

import json
import pickle
import re
import shutil
from pathlib import Path

import pytest
import torch
from tiny import build

import zokernels
from zokernels.lab.cli import main
from zokernels.lab.errors import InputError
from zokernels.lab.models import loading

SOURCES = sorted(Path(zokernels.__file__).parent.rglob("*.py"))
# What could run a file's content; `weights_only=True` makes `torch.load` a reader of tensors.
FORBIDDEN = {
    "pickle": r"\bpickle\b|\bdill\b|\bjoblib\b|\bmarshal\b|\bshelve\b",
    "eval or exec": r"(?<![\w.])(eval|exec|compile|__import__)\(",
    "yaml.load": r"yaml\.(unsafe_|full_)?load\b",
    "trust_remote_code": r"trust_remote_code\s*=\s*(?!False)",
    "a shell": r"shell\s*=\s*True|os\.system",
    "torch.load": r"torch\.load\((?![^)]*weights_only\s*=\s*True)",
    "numpy pickles": r"allow_pickle\s*=\s*True",
}


@pytest.mark.parametrize("what", FORBIDDEN)
def test_the_package_has_no_way_to_run_what_it_reads(what):
    found = [
        f"{path.name}: {line.strip()}"
        for path in SOURCES
        for line in path.read_text(encoding="utf-8").splitlines()
        if re.search(FORBIDDEN[what], line)
    ]
    assert len(SOURCES) > 50
    assert found == []


@pytest.mark.parametrize(
    ("what", "line"),
    [
        ("pickle", "import pickle"),
        ("eval or exec", "x = eval(text)"),
        ("trust_remote_code", "load(name, trust_remote_code=True)"),
        ("torch.load", "torch.load(path)"),
        ("torch.load", "torch.load(path, weights_only=False)"),
    ],
)
def test_the_search_finds_what_it_is_for(what, line):
    assert re.search(FORBIDDEN[what], line)
    assert not re.search(FORBIDDEN[what], "model.eval(); torch.load(path, weights_only=True)")


class Touch:
    """When unpickled, it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    return build("bert", tmp_path_factory.mktemp("untrusted") / "bert")


@pytest.fixture
def model(built, tmp_path, monkeypatch):
    """A model folder of the test's own, and rows to train on beside it."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    shutil.copytree(built, tmp_path / "model")
    rows = "".join(f"a {'good' if i % 2 else 'bad'} film \t{i % 2}\n" for i in range(20))
    for split in ("train", "dev"):
        (tmp_path / f"{split}.tsv").write_text("sentence\tlabel\n" + rows)
    return tmp_path / "model"


def refused(model, capsys, sentence):
    """A run on the model ends with exit code 2 and one sentence, and leaves no folder."""
    out = model.parent / "run"
    argv = ["finetune", "--model", str(model), "--data", str(model.parent), "--out", str(out)]
    assert main([*argv, "--steps", "2"]) == 2
    assert re.search(sentence, capsys.readouterr().err.strip().splitlines()[-1])
    assert not out.exists()


@pytest.mark.hf
@pytest.mark.parametrize("protocol", [2, 4])
def test_a_checkpoint_that_would_run_code_is_refused_and_runs_none(model, capsys, protocol):
    mark = model.parent / "touched"
    (model / "model.safetensors").unlink()
    torch.save({"x": Touch(mark)}, model / "pytorch_model.bin", pickle_protocol=protocol)
    refused(model, capsys, "could not be loaded: .*")
    assert not mark.exists()
    # It is one that would: an unpickler without restrictions makes the file.
    pickle.loads(pickle.dumps(Touch(mark)))
    assert mark.exists()


@pytest.mark.hf
@pytest.mark.parametrize("kind", ["bert", "a kind that transformers does not have"])
def test_code_that_comes_with_a_model_is_not_run(model, capsys, kind):
    mark = model.parent / "touched"
    code = f"import pathlib; pathlib.Path({str(mark)!r}).touch()\n"
    (model / "modeling_own.py").write_text(code + "class Own: pass\nclass OwnConfig: pass\n")
    config = json.loads((model / "config.json").read_text())
    config["model_type"] = kind
    config["auto_map"] = {"AutoConfig": "modeling_own.OwnConfig", "AutoModel": "modeling_own.Own"}
    (model / "config.json").write_text(json.dumps(config))
    if kind == "bert":
        # Its own class serves, without the code beside it.
        assert type(loading.load(str(model)).model).__name__ == "BertModel"
    else:
        refused(model, capsys, "could not be loaded: .*")
    assert not mark.exists()


def cut(data):
    return data[: len(data) // 2]


def nonsense(data):
    return b"\xff" * len(data)


def long_header(data):
    return (2**62).to_bytes(8, "little") + data[8:]


def other_header(data):
    return data[:9] + b"{" + data[10:]


@pytest.mark.hf
@pytest.mark.parametrize(
    ("file", "damage"),
    [
        *(("model.safetensors", damage) for damage in (cut, nonsense, long_header, other_header)),
        *(
            (file, damage)
            for file in ("config.json", "tokenizer.json")
            for damage in (cut, nonsense)
        ),
    ],
)
def test_a_damaged_model_is_refused_before_anything_is_written(model, capsys, file, damage):
    (model / file).write_bytes(damage((model / file).read_bytes()))
    refused(model, capsys, r"model could not be loaded: .*")


@pytest.mark.hf
def test_a_tokenizer_beyond_the_embedding_is_refused_before_a_step(model, capsys):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens(["sublime", "dreary"])
    tokenizer.save_pretrained(model)
    refused(model, capsys, r"does not fit its model: 2 .* 'sublime' \(number \d+\)")


@pytest.mark.hf
@pytest.mark.parametrize("out", ["/proc/run", "a_file/run", "/dev/null"])
def test_an_out_that_cannot_be_written_is_refused_before_a_step(model, monkeypatch, capsys, out):
    monkeypatch.chdir(model.parent)
    Path("a_file").write_text("mine")
    argv = ["finetune", "--model", str(model), "--data", ".", "--out", out, "--steps", "1"]
    assert main(argv) == 2
    assert re.search("cannot be written|is a file", capsys.readouterr().err)
    assert Path("a_file").read_text() == "mine"
    assert Path("/dev/null").is_char_device()


@pytest.mark.hf
def test_a_json_on_a_full_disk_leaves_the_run_and_the_device(model, monkeypatch, capsys):
    from zokernels.lab import files

    monkeypatch.chdir(model.parent)
    argv = ["finetune", "--model", str(model), "--data", ".", "--steps", "1", "--out", "run"]
    assert main([*argv, "--json", "/dev/full"]) == 2
    assert Path("/dev/full").is_char_device()
    assert not Path("run").exists()
    Path("m.json").write_text("old")
    real = files.os.fsync

    def full(handle):
        if Path(f"/proc/self/fd/{handle}").readlink().name.startswith(".m.json."):
            raise OSError(28, "No space left on device")
        real(handle)

    monkeypatch.setattr(files.os, "fsync", full)
    assert main([*argv, "--json", "m.json"]) == 1
    assert "No space left on device. All else is done." in capsys.readouterr().err
    assert Path("m.json").read_text() == "old"
    assert json.loads(Path("run/metrics.json").read_text())["steps"] == 1


def test_a_vocabulary_that_fits_is_not_refused():
    class Tokenizer:
        def get_vocab(self):
            return {"a": 0, "b": 3}

    class Model:
        def get_input_embeddings(self):
            return torch.nn.Embedding(4, 2)

    loading._check_vocabulary("m", Tokenizer(), Model())
    Model.get_input_embeddings = lambda self: torch.nn.Embedding(3, 2)
    with pytest.raises(InputError, match="1 of its tokens are beyond the 3 embeddings, 'b'"):
        loading._check_vocabulary("m", Tokenizer(), Model())
