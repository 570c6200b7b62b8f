"""The fast decoding step against the module, and every condition under which the module is asked instead."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from clinometer.lm import products
from clinometer.lm.decoding import WORTH_PACKING, Decoder, Decoders
from clinometer.lm.generate import KeyValueCache, _largest, generate
from clinometer.lm.model import TransformerLM
from clinometer.lm.products import BlockedProduct, PlainProduct
from clinometer.lm.transformer_config import TransformerConfig

CONFIG = TransformerConfig(
    vocab_size=61, context_length=48, d_model=32, num_layers=2, num_heads=4, d_ff=48, rope_theta=100.0
)
PAYS = WORTH_PACKING + 4


def small_model(config=CONFIG, seed=1):
    model = TransformerLM(config, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():  # norm weights of 1 would hide that they are folded into the wrong product
        for name, weight in model.named_parameters():
            if weight.dim() == 1:
                weight.copy_(
                    0.5 + torch.rand(weight.shape, generator=torch.Generator().manual_seed(len(name)))
                )
    return model


def tokens(generation):
    return torch.stack(list(generation), dim=1)


def largest_difference(model, rows, dtype=torch.float32, steps=12):
    """Between the module's logits and the decoder's, position by position after a prompt of 5."""
    ids = torch.randint(0, model.config.vocab_size, (rows, 5 + steps))
    ours, theirs = (KeyValueCache(model.config.num_layers, 5 + steps) for _ in range(2))
    worst = 0.0
    with torch.inference_mode():
        decoder = Decoder(model, rows, dtype)
        for cache in (ours, theirs):
            model(ids[:, :5], cache, 0)
        for t in range(5, 5 + steps):
            expected = model(ids[:, t : t + 1], theirs, t)[:, -1]
            worst = max(worst, float((decoder(ids[:, t], ours) - expected).abs().max()))
    assert ours.length == theirs.length == 5 + steps
    for mine, its in zip(ours, theirs, strict=True):
        assert float((mine.k_BHCK.float() - its.k_BHCK.float()).abs().max()) <= (
            1e-5 if dtype != torch.bfloat16 else 0.1
        )
    return worst


@given(st.integers(1, 4), st.integers(1, 6), st.integers(1, 40), st.integers(1, 5))
def test_the_step_gives_the_modules_logits(heads, pairs, d_ff, rows):
    config = TransformerConfig(
        vocab_size=50, context_length=20, d_model=heads * 2 * pairs, num_layers=2, num_heads=heads, d_ff=d_ff
    )
    worst = largest_difference(small_model(config), rows)
    assert worst <= 1e-5, f"largest difference {worst:.1e}"


@pytest.mark.parametrize("rows", [1, 3, 32])
def test_the_step_gives_the_modules_logits_in_oneDNNs_layout_and_turned(rows):
    config = TransformerConfig(
        vocab_size=1100, context_length=20, d_model=256, num_layers=2, num_heads=8, d_ff=704
    )
    model = small_model(config)
    kinds = {type(product) for product in vars(Decoder(model, rows, torch.float32)._layers[0]).values()}
    if rows > 1 and products.blocks(torch.float32):
        assert kinds == {BlockedProduct}
    worst = largest_difference(model, rows)
    assert worst <= 1e-5, f"largest difference {worst:.1e}"


def test_float64_is_exact_to_its_own_rounding():
    worst = largest_difference(small_model().double(), 2, torch.float64)
    assert worst <= 1e-6, f"largest difference {worst:.1e}"  # the rotary tables are float32 by design


@pytest.mark.parametrize("rows", [1, 4])
def test_bfloat16_products_stay_as_close_to_float32_as_the_modules(rows):
    model = small_model()
    ids = torch.randint(0, 61, (rows, 17))
    caches = [KeyValueCache(2, 17) for _ in range(3)]
    errors = [0.0, 0.0]
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        decoder = Decoder(model, rows, torch.bfloat16)
        model(ids[:, :5], caches[0], 0)
        model(ids[:, :5], caches[1], 0)
        with torch.autocast("cpu", enabled=False):
            model(ids[:, :5], caches[2], 0)
        for t in range(5, 17):
            theirs = model(ids[:, t : t + 1], caches[0], t)[:, -1]
            ours = decoder(ids[:, t], caches[1])
            with torch.autocast("cpu", enabled=False):
                exact = model(ids[:, t : t + 1], caches[2], t)[:, -1]
            for i, logits in enumerate((ours, theirs)):
                errors[i] = max(errors[i], float((logits.float() - exact).abs().max()))
    assert errors[0] <= 1.5 * errors[1], errors


@pytest.mark.parametrize("shape", [(5, 7), (48, 40), (1, 9)])
def test_every_product_says_what_its_equation_says(shape):
    weight = torch.randn(shape)
    x, other = torch.randn(3, shape[1]), torch.randn(3, shape[0])
    y = x.double() @ weight.double().T
    kinds = [PlainProduct(weight), PlainProduct(weight, turned=True)]
    if products.blocks(torch.float32):
        kinds.append(BlockedProduct(weight))
    for product in kinds:
        kept = other.clone()
        for made, expected in (
            (product(x), y),
            (product.silu(x), y * y.sigmoid()),
            (product.times(x, other), other.double() * y),
            (product.plus(x, other), other.double() + y),
        ):
            assert float((made.double() - expected).abs().max()) <= 1e-4
        assert torch.equal(other, kept)


def called(model, count, **settings):
    """How often the module was called while `count` tokens were made, and the tokens."""
    calls = []
    forward = type(model).forward

    class Counted:
        def __get__(self, instance, owner):
            return lambda *args, **kwargs: calls.append(1) or forward(instance, *args, **kwargs)

    before = type(model).forward
    type(model).forward = Counted()
    try:
        made = tokens(generate(model, [1, 2, 3], count, temperature=0, **settings))
    finally:
        type(model).forward = before
    return len(calls), made


def test_the_module_reads_the_prompt_and_the_decoder_makes_the_rest():
    calls, made = called(small_model(), PAYS)
    assert calls == 1
    assert torch.equal(made, tokens(generate(small_model(), [1, 2, 3], PAYS, temperature=0, cache=False)))


def test_a_few_tokens_are_not_worth_the_copy():
    assert called(small_model(), 8)[0] == 8


def test_a_subclass_a_hook_and_a_wrapped_forward_are_called_at_every_token():
    class Louder(TransformerLM):
        def forward(self, *args, **kwargs):
            return 2 * super().forward(*args, **kwargs)

    louder = Louder(CONFIG)
    assert Decoders(louder, list(louder.modules()), 1).now(100) is None
    hooked = small_model()
    assert Decoders(hooked, list(hooked.modules()), 1).now(100) is not None
    handle = hooked.layers[1].ffn.register_forward_hook(lambda *_: None)
    assert Decoders(hooked, list(hooked.modules()), 1).now(100) is None
    handle.remove()
    wrapped = small_model()
    wrapped.layers[0].forward = wrapped.layers[0].forward
    assert Decoders(wrapped, list(wrapped.modules()), 1).now(100) is None


@pytest.mark.parametrize("change", ["in place", "another parameter"])
def test_weights_changed_between_two_tokens_count_from_the_next_token_on(change):
    model, plain = small_model(), small_model()
    runs = [generate(m, [1, 2, 3], PAYS, temperature=0) for m in (model, plain)]
    runs[1]._decoders._given_up = True  # the module at every token
    made = [[], []]
    for step in range(PAYS):
        if step == 3:
            for m in (model, plain):
                weight = 3 * m.lm_head.weight.detach().flip(0)
                if change == "in place":
                    with torch.no_grad():
                        m.lm_head.weight.copy_(weight)
                else:
                    m.lm_head.weight = torch.nn.Parameter(weight)
        for run, ids in zip(runs, made, strict=True):
            ids.append(int(next(run)))
    assert made[0] == made[1]
    assert runs[0]._decoders._given_up


def test_without_room_for_a_copy_there_is_none(monkeypatch):
    monkeypatch.setattr("clinometer.lm.decoding._room_for", lambda _: False)
    assert called(small_model(), PAYS)[0] == PAYS


@pytest.mark.parametrize(
    "shape", [(32, 10_000), (2, 50_257), (600, 128), (600, 129), (70_000, 1), (600, 127)]
)
def test_the_largest_is_torchs_also_among_equals_and_with_nan(shape):
    logits = torch.randn(shape).mul(2).round()  # many equals
    expected = logits.max(dim=-1)
    value, ids = _largest(logits)
    assert torch.equal(value, expected.values)
    first = (logits == expected.values[:, None]).int().argmax(-1)
    assert torch.equal(ids, first)
    logits[1, -1] = torch.nan
    logits[0, 0] = torch.inf
    value, ids = _largest(logits)
    assert torch.isnan(value[1])
    assert int(ids[1]) == shape[1] - 1
    assert int(ids[0]) == 0
    assert bool(torch.isinf(value[0]))
