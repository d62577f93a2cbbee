"""All members of a population in the rows of one batch: each is what it is by itself."""

import pytest
import torch
from torch import nn

import zokernels as zk

pytestmark = pytest.mark.hf
hf = pytest.importorskip("transformers", reason="needs transformers: pip install '.[hf]'")

ROWS, LENGTH, WORDS = 4, 4, 60
SIZES = dict(
    vocab_size=WORDS, hidden_size=16, num_hidden_layers=2, num_attention_heads=4,
    intermediate_size=32, initializer_range=0.4, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
GROUPED = dict(SIZES, num_key_value_heads=2, head_dim=8)
MODELS = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES)),
    "opt": lambda: hf.OPTForCausalLM(
        hf.OPTConfig(
            vocab_size=WORDS, hidden_size=16, num_hidden_layers=2, num_attention_heads=4,
            ffn_dim=32, word_embed_proj_dim=16, init_std=0.4, max_position_embeddings=40,
            pad_token_id=0, bos_token_id=1, eos_token_id=2,
        )
    ),
    "gpt2": lambda: hf.GPT2LMHeadModel(
        hf.GPT2Config(
            vocab_size=WORDS, n_embd=16, n_layer=2, n_head=4, n_positions=40, pad_token_id=0,
            initializer_range=0.4, bos_token_id=1, eos_token_id=2,
        )
    ),
    "mistral": lambda: hf.MistralForCausalLM(hf.MistralConfig(**GROUPED, sliding_window=6)),
    "gemma3": lambda: hf.Gemma3ForCausalLM(
        hf.Gemma3TextConfig(
            **GROUPED, sliding_window=5, layer_types=["sliding_attention", "full_attention"]
        )
    ),
    "qwen2": lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**SIZES, num_key_value_heads=2)),
}  # fmt: skip


def prompts(padded):
    ids = torch.randint(3, WORDS, (ROWS, LENGTH), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :2], ids[0, :2] = 0, 0
    return dict(input_ids=ids, attention_mask=mask)


def make(kind):
    torch.manual_seed(3)
    return MODELS[kind]().eval()


def options(dist, **more):
    return dict(
        lr=0.0, eps=0.2, num_queries=ROWS, estimator="population", dist=dist, seed=1, **more
    )


def alone(opt, run):
    found = []
    for member in opt.ask():
        with member:
            found.append(run())
    return found


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("dist", ["rank1", "gaussian"])
@pytest.mark.parametrize("kind", MODELS)
def test_each_member_generates_what_it_does_by_itself(kind, dist, padded):
    model, batch = make(kind), prompts(padded)
    opt = zk.ZOSGD(model, **options(dist))
    told = dict(max_new_tokens=9, do_sample=False)
    with opt.ask() as population:
        together = model.generate(**population.repeat(batch), **told)
    # After the block it is the model that it was.
    assert len(model.generate(**batch, **told)) == ROWS
    apart = alone(opt, lambda: model.generate(**batch, **told))
    texts = set()
    for one, other in zip(population.split(together), apart, strict=True):
        # Of several members the longest answer decides how far the others are filled up.
        longest = max(one.shape[1], other.shape[1])
        one, other = (nn.functional.pad(t, (0, longest - t.shape[1])) for t in (one, other))
        assert torch.equal(one, other)
        texts.add(str(one.tolist()))
    # They differ, so that a member with another's weights would show.
    assert len(texts) == len(population)


@pytest.mark.parametrize("estimator", ["two_sided", "one_sided", "population"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_outputs_and_losses_are_each_members(kind, estimator):
    model, batch = make(kind), prompts(True)
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    opt = zk.ZOSGD(model, **options("rank1") | dict(estimator=estimator, num_queries=3))
    with opt.ask() as population:
        found = model(**population.repeat(batch))
    apart = alone(opt, lambda: model(**batch))
    assert found.loss.shape == (len(population),)
    for one, other, loss in zip(population.split(found), apart, found.loss, strict=True):
        torch.testing.assert_close(one.logits, other.logits, rtol=1e-4, atol=1e-5)
        assert float(loss) == pytest.approx(float(other.loss), rel=1e-5)
        assert float(one.loss) == float(loss)
    opt.tell(found.loss)
    assert opt.param_groups[0]["step"] == 1


def test_a_member_may_go_on_from_what_it_said():
    """Turns: what was generated is the next prompt, of other tokens for each member."""
    model, batch = make("llama"), prompts(False)

    def turns(first):
        ids = model.generate(**first, max_new_tokens=3, min_new_tokens=3, do_sample=False)
        return model(input_ids=ids).logits[:, -1].argmax(-1)

    opt = zk.ZOSGD(model, **options("rank1"))
    with opt.ask() as population:
        found = turns(population.repeat(batch))
    apart = alone(opt, lambda: turns(batch))
    assert all(map(torch.equal, population.split(found), apart))


def test_an_adapters_members():
    peft = pytest.importorskip("peft", reason="needs peft: pip install '.[hf]'")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = peft.get_peft_model(make("llama"), config).eval()
    batch, told = prompts(True), dict(max_new_tokens=5, do_sample=False)
    opt = zk.ZOSGD(model, **options("gaussian") | dict(eps=1.0))
    with opt.ask() as population:
        found = model.generate(**population.repeat(batch), **told)
    apart = alone(opt, lambda: model.generate(**batch, **told))
    assert all(map(torch.equal, population.split(found), apart))


def test_a_tokenizers_batch_is_repeated_by_its_keys():
    batch = hf.BatchEncoding(prompts(False))
    opt = zk.ZOSGD(make("llama"), **options("rank1"))
    with opt.ask() as population:
        found = population.repeat(batch)
    assert [len(t) for t in found.values()] == [ROWS * ROWS] * 2
    assert torch.equal(found["input_ids"][ROWS : 2 * ROWS], batch["input_ids"])


class Positions(nn.Module):
    """As many positions as there are rows: which they are no shape can tell."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.words, self.place = nn.Embedding(WORDS, 6), nn.Embedding(ROWS * ROWS, 6)

    def forward(self, ids, positions):
        return (self.words(ids) + self.place(positions)).sum(-1)


def test_a_vector_of_as_many_positions_as_rows_is_the_same_for_every_row():
    model, positions = Positions(), torch.arange(ROWS * ROWS)
    ids = torch.arange(ROWS * ROWS * ROWS).view(ROWS, -1) % WORDS
    opt = zk.ZOSGD(model, **options("gaussian"))
    with opt.ask() as population:
        found = model(population.repeat(ids), positions)
    apart = alone(opt, lambda: model(ids, positions))
    for one, other in zip(population.split(found), apart, strict=True):
        torch.testing.assert_close(one, other)


WAYS = {
    "beams": dict(num_beams=3),
    "several answers": dict(num_beams=4, num_return_sequences=2),
    "samples of one token": dict(num_return_sequences=3, do_sample=True, top_k=1),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_way_of_generating_moves_rows_inside_of_a_member_only(way):
    model, batch = make("llama"), prompts(True)
    opt = zk.ZOSGD(model, **options("rank1"))
    told = dict(max_new_tokens=6, min_new_tokens=6, **WAYS[way])
    with opt.ask() as population:
        found = model.generate(**population.repeat(batch), **told)
    apart = alone(opt, lambda: model.generate(**batch, **told))
    parts = population.split(found)
    assert all(map(torch.equal, parts, apart))
    assert len({str(part.tolist()) for part in parts}) == len(population)


def test_rows_may_be_moved_and_multiplied_inside_of_a_member():
    model, batch = make("llama"), prompts(False)
    ids, opt = batch["input_ids"], zk.ZOSGD(model, **options("rank1"))
    order = torch.tensor([2, 0, 3, 1])
    with opt.ask() as population:
        many = population.repeat(ids)
        places = torch.cat([order + ROWS * k for k in range(len(population))])
        found = model(many[places].repeat_interleave(2, 0)).logits
    apart = alone(opt, lambda: model(ids[order].repeat_interleave(2, 0)).logits)
    for one, other in zip(population.split(found), apart, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_texts_and_numbers_in_lists_are_rows():
    opt = zk.ZOSGD(make("llama"), **options("rank1"))
    batch = dict(prompts(False), answers=["a", "b", "c", "d"], spans=[[1], [2, 3], [4], [5]])
    with opt.ask() as population:
        many = population.repeat(batch)
    assert many["answers"] == batch["answers"] * ROWS and len(many["spans"]) == ROWS * ROWS
    texts = [str(k) for k in range(ROWS * ROWS)]
    parts = population.split({"texts": texts, "one": [0.1, 0.2, 0.3, 0.4]})
    assert parts[1] == {"texts": ["4", "5", "6", "7"], "one": [0.2]}
    with pytest.raises(ValueError, match="a list of 15 rows for 4 members"):
        population.split(texts[:15])


MOVED = {
    "an index": lambda t: t[torch.randperm(len(t), generator=torch.Generator().manual_seed(0))],
    "a list": lambda t: t[[*range(1, len(t)), 0]],
    "flipped": lambda t: t.flip(0),
    "rolled": lambda t: t.roll(1, 0),
    "interleaved": lambda t: t.view(ROWS, ROWS, -1).transpose(0, 1).reshape(ROWS * ROWS, -1),
    "sorted": lambda t: t.sort(dim=0).values,
    "and counted on": lambda t: t.flip(0) + 1 - 1,
}


@pytest.mark.parametrize("how", MOVED)
def test_rows_that_got_another_members_place_are_refused(how):
    model, batch = make("llama"), prompts(False)
    opt = zk.ZOSGD(model, **options("rank1"))
    with pytest.raises(RuntimeError, match="put in another order|not population.repeat"):
        with opt.ask() as population:
            model(MOVED[how](population.repeat(batch["input_ids"])))
    with opt.ask() as population:
        found = model(**population.repeat(batch)).logits.mean((1, 2))
        assert len(population.split(found)) == ROWS
        with pytest.raises(ValueError, match="put in another order"):
            population.split(found.sort().values)


REFUSED = {
    "another batch": (lambda m, b, p: m(**b), "not population.repeat"),
    "a static cache": (
        lambda m, b, p: m.generate(**p.repeat(b), cache_implementation="static"), "can't share",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_can_not_be_told_apart_is_a_sentence(what):
    run, words = REFUSED[what]
    model, batch = make("llama"), prompts(False)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    opt = zk.ZOSGD(model, **options("rank1"))
    with pytest.raises(RuntimeError, match=f"{words}.*for member in opt.ask"):
        with opt.ask() as population:
            run(model, batch, population)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert "forward" not in vars(model)
    # One at a time it goes.
    found = alone(opt, lambda: model(**batch).logits.mean())
    opt.tell(found)


def test_an_encoder_that_runs_by_itself_is_a_sentence():
    config = hf.T5Config(
        vocab_size=WORDS, d_model=16, d_kv=4, d_ff=32, num_layers=1, num_heads=2,
        decoder_start_token_id=0, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    model, batch = hf.T5ForConditionalGeneration(config).eval(), prompts(False)
    opt = zk.ZOSGD(model, **options("rank1"))
    told = dict(max_new_tokens=3, do_sample=False)
    with pytest.raises(RuntimeError, match="outside of the model's own forward.*opt.ask"):
        with opt.ask() as population:
            model.generate(**population.repeat(batch), **told)
    found = alone(opt, lambda: model.generate(**batch, **told))
    assert len(found) == ROWS


def test_a_parameter_that_no_forward_uses_is_named():
    model = make("llama")
    model.extra = nn.Parameter(torch.ones(3))
    opt = zk.ZOSGD(model, **options("rank1"))
    with pytest.raises(RuntimeError, match="parameter 'extra' was not perturbed"):
        with opt.ask() as population:
            model(**population.repeat(prompts(False)))
