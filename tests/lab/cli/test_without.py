"""What a command says where something is not installed: once, in a sentence, and no more."""

import importlib.util
import subprocess
import sys

import pytest
from tiny import environment

import zokernels as zk
from zokernels.backends import native
from zokernels.lab.cli import main, slow

# `zokernels.backends` is the function.
backends = sys.modules["zokernels.backends"]

# As setup.py leaves it.
WHY = "there is no C++ compiler ('c++' was not found). Install a C++ compiler and reinstall."


@pytest.fixture
def no_compiler(tmp_path, monkeypatch):
    """The package as an install without a compiler leaves it."""
    (tmp_path / "why.txt").write_text(WHY + "\n")
    monkeypatch.setattr(native, "LIBRARY", tmp_path / "none.so")
    monkeypatch.setattr(native, "BUILD_ERROR", tmp_path / "why.txt")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    slow._say_once.cache_clear()
    yield
    slow._say_once.cache_clear()


@pytest.fixture
def run(places, tmp_path):
    """The options of a run of two steps."""
    return [
        "--model", str(places / "opt"), "--data", str(places), "--steps", "2", "--lr", "1e-3",
        "--batch-size", "4", "--eval-examples", "4", "--device", "cpu",
        "--out", str(tmp_path / "run"),
    ]  # fmt: skip


def said(captured):
    """What it says of speed, on both streams."""
    words = " ".join((captured.out + captured.err).split())
    return words.count("takes many times as long"), words


@pytest.mark.hf
@pytest.mark.filterwarnings("error")
def test_a_run_in_plain_pytorch_says_so_once_and_why(no_compiler, run, capfd):
    assert main(["finetune", *run]) == 0
    count, words = said(capfd.readouterr())
    assert count == 1
    assert WHY in words
    assert "UserWarning" not in words


@pytest.mark.hf
@pytest.mark.parametrize("more", [["--optimizer", "fo-sgd"], ["--backend", "reference"]])
def test_a_run_without_passes_or_with_a_backend_of_its_own_says_nothing(
    no_compiler, run, more, capfd
):
    assert main(["finetune", *run, *more]) == 0
    assert said(capfd.readouterr())[0] == 0


@pytest.mark.hf
def test_without_matplotlib_a_run_has_a_report_without_a_plot(run, tmp_path, monkeypatch, capfd):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *a: None if name == "matplotlib" else find(name, *a),
    )
    assert main(["finetune", *run]) == 0
    words = said(capfd.readouterr())[1]
    assert words.count("no plot, which needs matplotlib: pip install 'matplotlib>=3.8'") == 1
    assert not (tmp_path / "run" / "plot.png").exists()
    assert "plot.png" not in (tmp_path / "run" / "report.md").read_text()


@pytest.mark.hf
def test_replay_and_benchmarks_say_it_too(no_compiler, run, tmp_path, capfd):
    assert main(["finetune", *run, "--backend", "reference"]) == 0
    capfd.readouterr()
    model = run[run.index("--model") + 1]
    commands = {
        "replay": ["replay", model, str(tmp_path / "run"), "--verify"],
        "tune": ["tune", *run[:4], "--device", "cpu", "--forwards", "224", "--batch-size", "4"],
    }
    for name, words in commands.items():
        slow._say_once.cache_clear()
        assert main(words) == 0, name
        assert said(capfd.readouterr())[0] == 1, name


def test_env_does_not_send_tensors_to_a_backend_that_is_not_there(no_compiler, monkeypatch):
    monkeypatch.setattr(backends, "_why_no_triton", lambda: None)
    monkeypatch.setattr(backends, "_triton", lambda: type("module", (), {"INTERPRETED": False}))
    reason = zk.backends()["triton"].reason
    assert "CPU tensors take the reference, since the native backend is missing." in reason


def test_env_says_which_backend_cpu_tensors_take(monkeypatch):
    monkeypatch.setattr(backends, "_why_no_triton", lambda: None)
    monkeypatch.setattr(backends, "_triton", lambda: type("module", (), {"INTERPRETED": False}))
    monkeypatch.setattr(native, "why_missing", lambda: None)
    assert "CPU tensors take the native backend." in zk.backends()["triton"].reason


def python(code, *words):
    return subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, env=environment()
    )


# A module of that name in sys.modules that is None can't be imported.
GONE = "import sys; sys.modules['{}'] = None\n"


@pytest.mark.parametrize("words", [["--help"], ["env"], ["verify", "--only", "replay/reference"]])
def test_a_command_needs_no_numpy_and_does_not_miss_it(words):
    code = "from zokernels.lab.cli import main; sys.exit(main(sys.argv[1:]))"
    done = python(GONE.format("numpy") + code, *words)
    assert "numpy" not in (done.stdout + done.stderr).lower()
    assert done.returncode == 0, done.stderr


def test_the_trainers_room_says_what_it_needs_and_how_to_get_it():
    code = (
        "try: import zokernels.hf\n"
        "except ImportError as error: print(type(error).__name__, error.name, error)"
    )
    done = python(GONE.format("transformers") + code)
    wanted = (
        "ModuleNotFoundError transformers zokernels.hf needs transformers: pip install '.[hf]'."
    )
    assert done.stdout.strip() == wanted, done.stderr
