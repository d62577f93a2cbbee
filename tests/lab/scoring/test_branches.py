"""Candidates as branches of one row: the scores, losses and steps of a row for each candidate."""

import pytest
import torch
from tiny import build

import zokernels as zk
from zokernels.lab.errors import InputError
from zokernels.lab.models import loading, schemes
from zokernels.lab.scoring.causal import CausalScorer
from zokernels.lab.tasks import TASKS

pytestmark = [pytest.mark.hf, pytest.mark.usefixtures("one_thread")]
FAMILIES = ["opt", "llama", "mistral", "qwen", "gemma", "gemma3", "gpt2"]
# Two and three candidates, of two to six tokens, which begin alike or not.
ROWS = [
    {"passage": "film movie plot", "query": "@placeholder is", "entities": list(names)}
    | {"answers": [right]}
    for names, right in (
        (("film is a plot", "the movie"), "the movie"),
        (("heart", "plot of the film", "the movie"), "heart"),
        (("not one", "not the other one"), "not one"),
    )
]
EXAMPLES = [e for row in ROWS for e in TASKS["record"].read(row, "x")]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {kind: build(kind, root / kind) for kind in FAMILIES}


@pytest.fixture(scope="module")
def tokenizer(folders):
    """One for all: transformers reads that of a folder of Qwen as Qwen's own, byte by byte."""
    return loading.load(str(folders["opt"])).tokenizer


def scorer_of(folder, tokenizer, *, branching=True, length=64, scheme="full", attention=None):
    model = loading.load(str(folder)).model
    if attention:
        model.set_attn_implementation(attention)
    model, _ = schemes.apply(model, scheme, None, 0, 0)
    scorer = CausalScorer(model, tokenizer, TASKS["record"], length)
    if not branching:
        scorer.longest_row = 0
    return scorer


@pytest.mark.parametrize("how", [{}, {"scheme": "lora"}, {"attention": "eager"}])
@pytest.mark.parametrize("kind", FAMILIES)
def test_branches_score_as_rows_of_their_own(folders, tokenizer, kind, how):
    together = scorer_of(folders[kind], tokenizer, **how)
    apart = scorer_of(folders[kind], tokenizer, branching=False, **how)
    one, many = together.collate(EXAMPLES), apart.collate(EXAMPLES)
    assert (len(one["input_ids"]), len(many["input_ids"])) == (3, 6)
    with torch.no_grad():
        # Other shapes are summed in another order; nothing else differs.
        got, want = together.scores(one), apart.scores(many)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert got.isneginf().sum() == 2


@pytest.mark.parametrize("options", [{}, {"perturb": "paired"}, {"blocks": "layer"}])
@pytest.mark.parametrize("kind", ["opt", "llama", "gpt2"])
def test_a_step_on_branches_is_the_step_on_rows(folders, tokenizer, kind, options):
    found = []
    for branching in (True, False):
        scorer = scorer_of(folders[kind], tokenizer, branching=branching)
        batch = scorer.collate(EXAMPLES)
        # A large ε, beside which the losses' rounding is small.
        opt = zk.ZOSGD(scorer.model, lr=1e-3, eps=1e-2, **options)
        loss = opt.step(lambda scorer=scorer, batch=batch: scorer.loss(batch))
        found.append([loss.double(), *map(torch.tensor, opt.projected_gradients)])
    torch.testing.assert_close(found[0], found[1], rtol=2e-3, atol=1e-3, check_dtype=False)


def test_gradients_go_through_branches(folders, tokenizer):
    gradients = []
    for branching in (True, False):
        scorer = scorer_of(folders["llama"], tokenizer, branching=branching)
        scorer.loss(scorer.collate(EXAMPLES)).backward()
        gradients.append([p.grad for p in scorer.model.parameters()])
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-5)


def test_a_window_or_a_soft_prompt_takes_rows_of_their_own(folders, tokenizer):
    """What a mask of branches would hide from the model keeps the plain form."""
    windowed = scorer_of(folders["mistral"], tokenizer)
    windowed.model.config.sliding_window = 8
    short = CausalScorer(windowed.model, tokenizer, TASKS["record"], 64)
    assert len(short.collate(EXAMPLES)["input_ids"]) == 6
    prefixed = scorer_of(folders["llama"], tokenizer, scheme="prefix")
    batch = prefixed.collate(EXAMPLES)
    assert len(batch["input_ids"]) == 6
    assert batch["attention_mask"].dim() == 2


@pytest.mark.parametrize("branching", [True, False])
def test_a_long_text_loses_the_same_start_for_each_candidate(folders, tokenizer, branching):
    scorer = scorer_of(folders["opt"], tokenizer, branching=branching, length=9)
    batch = scorer.collate(EXAMPLES[:1])
    assert (batch["input_ids"][:, 0] == tokenizer.bos_token_id).all()
    depth = batch["position_ids"].max() + 1 if branching else batch["input_ids"].shape[1]
    assert depth == 9
    starts = batch["places"][:, 0].tolist()
    assert starts[0] == starts[1]
    with torch.no_grad():
        assert torch.isfinite(scorer.scores(batch)).all()
    scorer.max_length = 3
    with pytest.raises(InputError, match="--max-length 3 leaves no room for the prompt"):
        scorer.collate(EXAMPLES[:1])
