"""Prompts as turns of a chat."""

import pytest
from tiny import build

from zokernels.lab.errors import InputError
from zokernels.lab.models import loading
from zokernels.lab.runs.run import Finetune
from zokernels.lab.runs.settings import Settings
from zokernels.lab.scoring import CausalScorer
from zokernels.lab.tasks import chat, get_task
from zokernels.lab.tasks.task import Example

pytestmark = pytest.mark.hf

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}film {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}plot\n{% endif %}"
)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return loading.load(str(build("llama", tmp_path_factory.mktemp("chat") / "vicuna-tiny")))


def scorer(loaded, form):
    made = CausalScorer(loaded.model, loaded.tokenizer, get_task("sst2"), 64)
    made.chat = form
    return made


def test_vicunas_form_stands_around_the_prompt(loaded):
    form = chat.form(loaded.tokenizer, "lmsys/Vicuna-7b-v1.5", "causal")
    text = scorer(loaded, form).prompt(Example("dull {film}", 0, {"sentence": "dull {film}"}))
    assert text.startswith("A chat between a curious user")
    assert text.endswith("USER: dull {film} It was ASSISTANT:")


def test_a_tokenizers_template_wins_and_begins_once(loaded, monkeypatch):
    monkeypatch.setattr(loaded.tokenizer, "chat_template", TEMPLATE)
    form = chat.form(loaded.tokenizer, "vicuna", "causal")
    made = scorer(loaded, form)
    example = Example("dull", 0, {"sentence": "dull"})
    assert made.prompt(example) == "film dull It was\nplot\n"
    ids = made.collate([example])["input_ids"][0].tolist()
    assert ids.count(loaded.tokenizer.bos_token_id) == 1
    # The answer's first token follows the template's end.
    words = loaded.tokenizer.convert_ids_to_tokens(ids)
    assert words == ["<s>", "film", "dull", "it", "was", "plot"]


@pytest.mark.parametrize(
    ("model", "kind", "words"),
    [("some/llama", "causal", "no chat template"), ("some/vicuna", "masked", "needs a causal LM")],
)
def test_a_model_without_a_form_is_a_sentence(loaded, model, kind, words):
    with pytest.raises(InputError, match=words):
        chat.form(loaded.tokenizer, model, kind)


@pytest.mark.parametrize("scheme", ["lora", "probe"])
def test_a_run_in_chat_form(loaded, tmp_path, monkeypatch, scheme):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("ZOKERNELS_DATA", raising=False)
    monkeypatch.setitem(chat.FORMS, "vicuna", chat.Written("the ", {"user": "plot {} "}, "of"))
    options = dict(chat=True, scheme=scheme, steps=2, batch_size=4, max_words=5)
    run = Finetune(Settings(model=loaded.model.name_or_path, out=tmp_path / "run", **options))
    assert run.run()["steps"] == 2
    assert "as a turn of a chat" in (tmp_path / "run/report.md").read_text()
