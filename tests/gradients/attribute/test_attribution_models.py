"""attribute() on whole models: every parameter, in one forward and backward; and it leaves no trace."""

import pytest
import torch
from tests.gradients.traces import trace_of
from torch import nn

from clinometer import TransformerConfig, TransformerLM, cross_entropy, transformer_lm
from clinometer.gradients.attribute.attribute import attribute

CONFIG = TransformerConfig(vocab_size=50, context_length=16, d_model=16, num_layers=2, num_heads=2, d_ff=32)
IDS = torch.randint(0, 50, (3, 12), generator=torch.Generator().manual_seed(3))


def our_model():
    model = TransformerLM(CONFIG).double()
    return model, lambda: cross_entropy(model(IDS[:, :-1]), IDS[:, 1:])


def transformers_model(kind):
    transformers = pytest.importorskip("transformers")
    ids = torch.randint(0, 90, (2, 9), generator=torch.Generator().manual_seed(3))
    small = {"vocab_size": 90, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    if kind == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=90, n_positions=16, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
        )
        model = transformers.GPT2LMHeadModel(config)
    elif kind == "llama":
        config = transformers.LlamaConfig(**small, intermediate_size=32, num_key_value_heads=1)
        model = transformers.LlamaForCausalLM(config)
    elif kind == "tied-llama":
        config = transformers.LlamaConfig(**small, intermediate_size=32, tie_word_embeddings=True)
        model = transformers.LlamaForCausalLM(config)
    elif kind == "bert":
        config = transformers.BertConfig(**small, intermediate_size=32, max_position_embeddings=16)
        model = transformers.BertForMaskedLM(config)
    else:
        config = transformers.T5Config(
            vocab_size=90, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=0
        )
        model = transformers.T5ForConditionalGeneration(config)
    model = model.double().eval()
    return model, lambda: model(input_ids=ids, labels=ids).loss


MODELS = {"ours": our_model} | {
    kind: lambda kind=kind: transformers_model(kind) for kind in ("gpt2", "llama", "tied-llama", "bert", "t5")
}


@pytest.mark.parametrize("kind", list(MODELS))
def test_every_parameter_of_a_model_is_the_sum_of_its_tokens(kind):
    model, loss = MODELS[kind]()
    parameters = dict(model.named_parameters())
    grads = dict(zip(parameters, torch.autograd.grad(loss(), list(parameters.values())), strict=True))
    strongest = {name: tuple(divmod_all(int(g.abs().argmax()), g.shape)) for name, g in grads.items()}

    entries = attribute(model, loss, strongest)
    wholes = attribute(model, loss, list(parameters))
    assert list(entries) == list(wholes) == list(parameters)
    total = torch.stack([g.norm() for g in grads.values()]).norm().item()
    for name, grad in grads.items():
        one, whole = entries[name], wholes[name]
        assert one.gradient == grad[strongest[name]].item(), name
        assert whole.gradient == pytest.approx(grad.norm().item(), rel=1e-13)
        # A key bias has gradient zero by construction: its own size is no scale, the model's is.
        assert abs(one.remainder) <= 1e-12 * abs(one.gradient) + 1e-15 * total, name
        assert abs(whole.remainder) <= 1e-12 * whole.gradient + 1e-15 * total, name
        assert one.complete, name
        assert one.unseen == whole.unseen == []
        assert whole.norms_exact, name
        # ‖Σ contributions‖ ≤ Σ ‖contributions‖, and each part along G is at most the norm.
        if whole.norms is not None and whole.matrix is not None:
            assert whole.gradient <= whole.norms.sum().item() * (1 + 1e-12) + 1e-15 * total
            assert bool((whole.matrix.abs() <= whole.norms + 1e-12 * total).all()), name


def divmod_all(flat, shape):
    index = []
    for size in reversed(shape):
        flat, rest = divmod(flat, size)
        index.insert(0, rest)
    return index


@pytest.mark.parametrize(
    ("kind", "name"), [("gpt2", "transformer.wte.weight"), ("tied-llama", "model.embed_tokens.weight")]
)
def test_a_tied_embedding_is_pushed_as_a_table_and_as_a_head(kind, name):
    model, loss = MODELS[kind]()
    ids = torch.randint(0, 90, (2, 9), generator=torch.Generator().manual_seed(3))
    token = int(ids[0, 4])
    found = attribute(model, loss, name, (token, 3))
    assert [use.op for use in found.uses] == ["embedding", "linear"]
    table = found.uses[0].terms
    assert bool((table[ids != token] == 0).all())
    assert float(table[0, 4]) != 0
    assert found.matrix.shape == (2, 9)
    # The other name of the same tensor means the same.
    assert attribute(model, loss, "lm_head.weight", (token, 3)).gradient == found.gradient


def test_a_plain_dictionary_of_leaves_is_attributed_like_the_module_it_came_from():
    model, loss = our_model()
    weights = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    name, index = "layers.1.ffn.w1.weight", (17, 3)
    a = attribute(model, loss, name, index)
    b = attribute(
        weights, lambda: cross_entropy(transformer_lm(weights, IDS[:, :-1], CONFIG), IDS[:, 1:]), name, index
    )
    assert torch.equal(a.matrix, b.matrix)
    assert all(w.grad is None for w in weights.values())


def test_an_embedding_row_is_pushed_only_where_its_token_stands():
    model, loss = our_model()
    token = int(IDS[0, 0])
    found = attribute(model, loss, "token_embeddings.weight", (token, 5))
    here = IDS[:, :-1] == token
    assert bool((found.matrix[~here] == 0).all())
    assert bool((found.matrix[here] != 0).all())
    assert len(found.top(100)) == int(here.sum())


def test_causality_shows_in_who_pushed():
    # A loss at position 4 alone is pushed by no position after it.
    model, _ = our_model()
    loss = lambda: cross_entropy(model(IDS[:, :-1])[:, 4], IDS[:, 5])  # noqa: E731
    matrix = attribute(model, loss, "layers.0.attn.v_proj.weight").matrix
    assert bool((matrix[:, 5:] == 0).all())
    assert bool((matrix[:, :5] != 0).all())


@pytest.mark.parametrize("failing", [False, True])
def test_nothing_is_left_behind(failing):
    model = nn.Sequential(nn.Embedding(50, 8), nn.Linear(8, 8), nn.Dropout(0.3), nn.Linear(8, 50))
    optimizer = torch.optim.AdamW(model.parameters())
    kept = []

    def loss():
        hidden = model[1](model[0](IDS))
        kept.append(hidden)
        model.eval()
        if failing:
            raise ZeroDivisionError
        return cross_entropy(model[3](model[2](hidden)), IDS)

    cross_entropy(model(IDS), IDS).backward()
    optimizer.step()
    before = trace_of(model, optimizer)
    if failing:
        with pytest.raises(ZeroDivisionError):
            attribute(model, loss, "1.weight", (2, 3))
    else:
        attribute(model, loss, "1.weight", (2, 3))
    assert trace_of(model, optimizer) == before
    assert not kept[0]._backward_hooks
    assert torch.overrides._get_current_function_mode_stack() == []


def test_a_wrong_index_runs_nothing():
    ran = []
    model = nn.Linear(3, 3)

    def loss():
        ran.append(1)
        return model(torch.ones(1, 3)).sum()

    with pytest.raises(ValueError):
        attribute(model, loss, "weight", (3, 3))
    assert ran == []
