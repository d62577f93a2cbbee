"""TrainingArguments: what an optimizer takes from them, and what is said of the rest."""

import dataclasses
import subprocess
import sys
import warnings

import pytest
import torch
from tiny import environment
from trainers import hf, model_of, rows, same, trainer_of, transformers, weights

import zokernels as zk

pytestmark = [pytest.mark.hf, pytest.mark.usefixtures("one_thread")]
NAMES = {f.name for f in dataclasses.fields(transformers.TrainingArguments)}
CHECKPOINTING = next(f"{n}_checkpointing" for n in ("activation", "gradient")
                     if f"{n}_checkpointing" in NAMES)  # fmt: skip


def said_by(trainer, times=1):
    """What our own code warns of in a run, and in those after it."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(times):
            trainer.train()
    words = ("has no effect", "learning_rate is", "torch_compile")
    return [text for w in caught if any(word in (text := str(w.message)) for word in words)]


SET = {
    "optim": "sgd",
    "optim_args": "rank=4",
    "adam_beta1": 0.5,
    "adam_beta2": 0.0,
    "adam_epsilon": 1e-3,
    "max_grad_norm": 0.25,
    "neftune_noise_alpha": 5.0,
    CHECKPOINTING: True,
}


@pytest.mark.parametrize("name", SET)
def test_an_argument_without_effect_is_named_once_and_has_none(tmp_path, name):
    plain = trainer_of(tmp_path, "llama", max_steps=2)
    assert said_by(plain) == []
    trainer = trainer_of(tmp_path, "llama", max_steps=2, **{name: SET[name]})
    (said,) = said_by(trainer)
    assert said.startswith(f"{name}={SET[name]!r} has no effect on ZOSGD: ")
    assert same(weights(plain), weights(trainer))


def test_it_is_said_in_the_first_of_several_runs(tmp_path):
    trainer = trainer_of(tmp_path, max_steps=1, max_grad_norm=0.5, optim="sgd")
    assert len(said_by(trainer, times=2)) == 2


def test_no_clipping_is_what_a_norm_of_0_asks_for(tmp_path):
    assert said_by(trainer_of(tmp_path, max_steps=1, max_grad_norm=0.0)) == []


def test_adams_numbers_go_to_zo_adam(tmp_path):
    numbers = dict(adam_beta1=0.5, adam_beta2=0.75, adam_epsilon=1e-3)
    trainer = trainer_of(tmp_path, cls=zk.ZOAdam, max_steps=1, **numbers)
    assert said_by(trainer) == []
    group = trainer.optimizer.param_groups[0]
    assert (group["betas"], group["adam_eps"], group["eps"]) == ((0.5, 0.75), 1e-3, 2e-3)
    given = {"betas": (0.25, 0.125), "adam_eps": 1e-4}
    trainer = trainer_of(tmp_path, cls=zk.ZOAdam, options=given, max_steps=1, **numbers)
    trainer.train()
    group = trainer.optimizer.param_groups[0]
    assert (group["betas"], group["adam_eps"]) == ((0.25, 0.125), 1e-4)


@dataclasses.dataclass
class Theirs(transformers.TrainingArguments):
    """As another library's: with defaults of its own."""

    learning_rate: float = 1e-6
    adam_beta2: float = 0.95
    optim: str = "sgd"


@dataclasses.dataclass
class Fast(Theirs):
    """And with a rate for backpropagation."""

    learning_rate: float = 2e-5


@pytest.mark.parametrize("cls", [transformers.TrainingArguments, Theirs, Fast])
@pytest.mark.parametrize("where", ["nowhere", "arguments", "options"])
def test_a_rate_that_nobody_gave_is_told_by_its_number(tmp_path, cls, where):
    given = {"learning_rate": 3e-6} if where == "arguments" else {}
    args = cls(
        str(tmp_path), max_steps=1, save_strategy="no", use_cpu=True, disable_tqdm=True, **given
    )
    options = {"lr": 2e-6} if where == "options" else {}
    trainer = hf.ZOTrainer(
        model_of("opt"), args, train_dataset=rows(), optimizer_cls_and_kwargs=(zk.ZOSGD, options)
    )
    said = said_by(trainer)
    rate = next(f.default for f in dataclasses.fields(cls) if f.name == "learning_rate")
    used = {"nowhere": rate, "arguments": 3e-6, "options": 2e-6}[where]
    assert trainer.optimizer.param_groups[0]["initial_lr"] == used
    if where == "nowhere" and rate > 1e-6:
        (sentence,) = said
        assert sentence.startswith(f"learning_rate is {rate:g}, ")
        assert sentence.endswith(f"{cls.__name__}(learning_rate=1e-06).")
    else:
        assert said == []


class Bare(zk.ZOSGD):
    """Has a rate by what it is made from."""

    def __init__(self, params, lr, eps=1e-3, **common):
        super().__init__(params, lr, eps, **common)


def test_the_rate_that_an_optimizer_has_is_advised(tmp_path):
    (said,) = said_by(trainer_of(tmp_path, cls=Bare, max_steps=1, learning_rate=5e-5))
    assert "begin with 1e-06 for all the weights" in said


def test_lora_with_checkpointed_layers_is_lora(tmp_path):
    peft = pytest.importorskip("peft")
    found = []
    for checkpointing in (False, True):
        config = peft.LoraConfig(r=2, task_type="CAUSAL_LM", init_lora_weights=False)
        torch.manual_seed(2)
        model = peft.get_peft_model(model_of("llama"), config)
        trainer = trainer_of(tmp_path, model=model, max_steps=2, **{CHECKPOINTING: checkpointing})
        trainer.train()
        found.append(weights(trainer))
    assert same(*found)


COMPILED = """
import sys, torch
from torch import nn
from trainers import trainer_of, weights

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.emb, self.head = nn.Embedding(40, 6), nn.Linear(6, 40)

    def forward(self, input_ids, labels):
        logits = self.head(self.emb(input_ids).tanh())
        return {"loss": nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())}

found = []
for extra in ({}, {"torch_compile": True, "torch_compile_backend": "eager"}):
    trainer = trainer_of(sys.argv[1], model=Net(), options={"perturb": None}, max_steps=2, **extra)
    trainer.train()
    found.append(weights(trainer))
    assert hasattr(trainer.model_wrapped, "_orig_mod") == bool(extra)
assert trainer.optimizer.optimizer.perturb == "in_place"
for name, w in found[0].items():
    torch.testing.assert_close(w, found[1][name], rtol=0, atol=1e-5)
"""


def test_a_compiled_model_trains_as_the_plain_one(tmp_path):
    """In a process of its own: a tracer that walked through a perturbed forward ended it."""
    env = environment()
    env["PYTHONPATH"] += "".join(f":{p}" for p in sys.path if "tests" in p)
    done = subprocess.run(
        [sys.executable, "-c", COMPILED, str(tmp_path)],
        env=env, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stderr.count("will be compiled (torch_compile)") == 1


@pytest.mark.parametrize("mode", ["on_entry", "paired"])
def test_a_mode_that_a_compiled_model_cannot_have_is_refused(tmp_path, mode):
    extra = dict(torch_compile=True, torch_compile_backend="eager")
    with pytest.raises(ValueError, match=f"perturb='{mode}' was asked for, but the model will"):
        trainer_of(tmp_path, options={"perturb": mode}, **extra).train()
