"""Sampling against transformers' processors, the cache against no cache, and the window's rule."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from clinometer.lm.functional import transformer_lm
from clinometer.lm.generate import KeyValueCache, filter_logits, fit_prompt, generate, sample
from clinometer.lm.model import TransformerLM
from clinometer.lm.transformer_config import TransformerConfig
from clinometer.messages import InputError

CONFIG = TransformerConfig(
    vocab_size=61, context_length=16, d_model=32, num_layers=2, num_heads=4, d_ff=48, rope_theta=100.0
)


def small_model(config=CONFIG, seed=1):
    return TransformerLM(config, generator=torch.Generator().manual_seed(seed))


def tokens(generation):
    """(B, steps)."""
    return torch.stack(list(generation), dim=1)


@st.composite
def models_and_splits(draw):
    heads = draw(st.integers(1, 4))
    length = draw(st.integers(1, 24))
    config = TransformerConfig(
        vocab_size=draw(st.integers(2, 50)),
        context_length=length + draw(st.integers(0, 3)),
        d_model=heads * 2 * draw(st.integers(1, 8)),
        num_layers=draw(st.integers(1, 3)),
        num_heads=heads,
        d_ff=draw(st.integers(1, 40)),
        rope_theta=draw(st.sampled_from([10.0, 10_000.0])),
    )
    cuts = sorted(draw(st.sets(st.integers(1, length))) | {length})
    return config, draw(st.integers(1, 3)), cuts, draw(st.integers(0, 2**31))


@given(models_and_splits())
def test_cached_logits_are_the_uncached_ones_in_any_split(case):
    config, batch, cuts, seed = case
    generator = torch.Generator().manual_seed(seed)
    model = TransformerLM(config, generator=generator)
    ids = torch.randint(0, config.vocab_size, (batch, cuts[-1]), generator=generator)
    with torch.no_grad():
        plain = transformer_lm(dict(model.named_parameters()), ids, config)
        cache, parts = KeyValueCache(config.num_layers, config.context_length), []
        for start, end in zip([0, *cuts], cuts, strict=False):
            assert cache.length == start
            parts.append(model(ids[:, start:end], cache, start))
    difference = float((torch.cat(parts, dim=1) - plain).abs().max())
    assert difference <= 1e-5, f"largest difference {difference:.1e} over the chunks {cuts}"


def test_the_cache_is_filled_in_place_and_says_when_it_is_full():
    cache = KeyValueCache(2, capacity=4)
    k = torch.randn(1, 2, 3, 4)
    first, _ = cache[0].append(k, k)
    second, values = cache[0].append(k[:, :, :1], 2 * k[:, :, :1])
    assert second.data_ptr() == first.data_ptr()
    assert torch.equal(second[:, :, :3], k)
    assert torch.equal(values[:, :, 3:], 2 * k[:, :, :1])
    with pytest.raises(InputError) as error:
        cache[0].append(k, k)
    assert error.value.key == "generate.cache_full"
    cache.clear()
    assert cache.length == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_top_k_and_top_p_keep_what_transformers_keeps_bit_for_bit(dtype):
    processors = pytest.importorskip("transformers").generation.logits_process
    for top_k in (None, 1, 2, 7, 40, 41, 1000):
        for top_p in (None, 1e-20, 1e-6, 0.1, 0.5, 0.9, 0.999, 1.0):
            for temperature in (0.3, 1.0, 2.5):
                logits = torch.randn(5, 40, dtype=dtype) * 3
                logits[0, 5:9] = logits[0].max()  # equals
                theirs = processors.TemperatureLogitsWarper(temperature)(None, logits)
                if top_k is not None:
                    theirs = processors.TopKLogitsWarper(top_k)(None, theirs)
                if top_p is not None and top_p < 1:
                    theirs = processors.TopPLogitsWarper(top_p)(None, theirs)
                assert torch.equal(filter_logits(logits / temperature, top_k, top_p), theirs)


def test_the_token_that_crosses_p_is_kept():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    kept = [
        int((filter_logits(logits, top_p=p) > -math.inf).sum()) for p in (0.01, 0.49, 0.51, 0.79, 0.81, 0.96)
    ]
    assert kept == [1, 1, 2, 2, 3, 4]


def test_draws_follow_the_softmax_at_the_temperature():
    logits = torch.tensor([1.0, 0.0, -1.0, 2.0])
    generator = torch.Generator().manual_seed(0)
    drawn = sample(logits.expand(200_000, 4), temperature=0.7, generator=generator)
    frequencies = torch.bincount(drawn, minlength=4) / 200_000
    expected = torch.softmax(logits / 0.7, 0)
    assert float((frequencies - expected).abs().max()) < 5e-3  # about 4.5 standard deviations
    generator = torch.Generator().manual_seed(0)
    drawn = sample(logits.expand(20_000, 4), top_k=2, generator=generator)
    assert set(drawn.tolist()) == {0, 3}


@pytest.mark.parametrize("ties", [False, True])
def test_sampling_draws_from_exactly_the_filtered_distribution(ties):
    logits = torch.randn(1, 30)
    if ties:
        logits = logits.round()
    for top_k, top_p in [(4, None), (None, 0.6), (9, 0.8), (30, 1.0)]:
        expected = filter_logits(logits / 0.8, top_k, top_p).softmax(-1)[0]
        drawn = sample(logits.expand(100_000, 30), temperature=0.8, top_k=top_k, top_p=top_p)
        frequencies = torch.bincount(drawn, minlength=30) / 100_000
        assert float((frequencies - expected).abs().max()) < 7e-3
        assert float(frequencies[expected == 0].sum()) == 0


@pytest.mark.parametrize(("drawn", "token"), [(0.0, 1), (0.25, 1), (0.5, 2), (1.0, 2)])
def test_no_random_number_chooses_a_token_of_probability_zero(monkeypatch, drawn, token):
    """1.0 stands for a product that rounds up to the whole; 0.5 is the border itself."""
    monkeypatch.setattr(torch, "rand", lambda shape, dtype, **_: torch.full(shape, drawn, dtype=dtype))
    logits = torch.tensor([[-math.inf, 1.0, 1.0, -math.inf]])
    assert int(sample(logits)) == token


def test_temperature_zero_takes_the_first_of_the_largest():
    assert sample(torch.tensor([[0.0, 7.0, 7.0], [3.0, 1.0, 3.0]]), temperature=0).tolist() == [1, 0]


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 5e-324])
@pytest.mark.parametrize("scale", [1e-2, 1.0, 1e30])
@pytest.mark.parametrize("shift", [-1.0, 0.0, 1.0])
def test_a_tiny_temperature_is_greedy_not_nan(temperature, scale, shift):
    logits = (torch.tensor([[-1.0, 0.0, -2.0]]) + shift) * scale
    assert sample(logits, temperature=temperature).tolist() == [1]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0, 1.0])
def test_non_finite_logits_are_named_not_sampled(bad, temperature):
    logits = torch.zeros(3, 5)
    logits[1, 2] = bad
    with pytest.raises(InputError) as error:
        sample(logits, temperature=temperature)
    assert error.value.key == "generate.non_finite"
    assert error.value.values["row"] == 1
    logits[1, 2] = -math.inf  # a token that cannot come
    assert 2 not in [int(sample(logits)[1]) for _ in range(50)]


def test_nan_weights_are_reported():
    model = small_model()
    with torch.no_grad():
        model.layers[1].ffn.w1.weight[0, 0] = math.nan
    with pytest.raises(InputError) as error:
        next(generate(model, [1, 2, 3], 4))
    assert error.value.key == "generate.non_finite"


@pytest.mark.parametrize("prompt_length", [1, 3, 15, 16, 17, 40])
@pytest.mark.parametrize("temperature", [0, 1.0])
def test_text_is_the_same_with_and_without_cache_also_where_the_window_slides(prompt_length, temperature):
    model = small_model()
    prompt = torch.randint(0, CONFIG.vocab_size, (3, prompt_length))
    runs = [
        generate(model, prompt, 45, temperature=temperature, seed=5, cache=cache) for cache in (True, False)
    ]
    cached, plain = (tokens(run) for run in runs)
    assert cached.shape == (3, 45)
    assert torch.equal(cached, plain)
    assert runs[0].slides == runs[1].slides >= 3
    assert runs[0].dropped == max(0, prompt_length - 16)


@pytest.mark.parametrize("context", [1, 2, 5, 16])
def test_a_full_window_keeps_its_last_half(context):
    config = TransformerConfig(
        vocab_size=61, context_length=context, d_model=32, num_layers=2, num_heads=4, d_ff=48
    )
    model = small_model(config)
    made = tokens(generate(model, [3, 4], 2 * context + 5, temperature=0))[0].tolist()

    window, expected = [3, 4][-context:], []
    for _ in range(2 * context + 5):
        with torch.no_grad():
            expected.append(int(model(torch.tensor([window]))[0, -1].argmax()))
        window.append(expected[-1])
        if len(window) > context:
            window = window[-max(1, context // 2) :]
    assert made == expected


def test_fit_prompt_keeps_the_last_tokens_and_counts_the_others():
    kept, dropped = fit_prompt(torch.arange(20), CONFIG)
    assert (kept.tolist(), dropped) == (list(range(4, 20)), 4)
    kept, dropped = fit_prompt(torch.arange(16)[None], CONFIG)
    assert (kept.shape, dropped) == ((1, 16), 0)


def test_a_batch_generates_what_its_rows_generate_alone():
    model = small_model()
    prompt = torch.randint(0, CONFIG.vocab_size, (4, 5))
    together = tokens(generate(model, prompt, 30, temperature=0))
    alone = torch.cat([tokens(generate(model, row, 30, temperature=0)) for row in prompt])
    assert torch.equal(together, alone)


def test_rows_stop_one_by_one_and_the_iteration_with_the_last():
    model = small_model()
    prompt = torch.randint(0, CONFIG.vocab_size, (4, 5))
    free = tokens(generate(model, prompt, 400, seed=3))
    stop = int(free[0, 10])
    stopped = tokens(generate(model, prompt, 400, seed=3, stop_id=stop))
    firsts = [row.tolist().index(stop) for row in stopped]
    assert len(set(firsts)) > 1
    assert stopped.shape[1] == max(firsts) + 1 < 400
    for row, first in enumerate(firsts):
        assert torch.equal(stopped[row, : first + 1], free[row, : first + 1])
        assert set(stopped[row, first:].tolist()) == {stop}


def test_the_seed_decides_and_leaves_torchs_own_generator_alone():
    model = small_model()
    before = torch.get_rng_state()
    a, b, c = (tokens(generate(model, [1, 2], 20, seed=seed)) for seed in (7, 7, 8))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(7)
    assert torch.equal(tokens(generate(model, [1, 2], 20)), a)


def test_modes_are_the_callers_between_steps_and_after():
    model = small_model()
    model.train()
    model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    seen = []
    model.layers[1].register_forward_hook(
        lambda *_: seen.append((model.training, torch.is_inference_mode_enabled()))
    )
    weight = torch.ones(CONFIG.vocab_size, 2, requires_grad=True)
    for ids in generate(model, [1, 2], 3):
        assert [module.training for module in model.modules()] == modes
        assert torch.is_grad_enabled()
        assert not torch.is_inference_mode_enabled()
        torch.nn.functional.embedding(ids, weight).sum().backward()  # an ordinary tensor
    assert seen == [(False, True)] * 3
    with torch.no_grad():
        model.lm_head.weight[:] = math.nan
    with pytest.raises(InputError):
        next(generate(model, [1, 2], 3))
    assert [module.training for module in model.modules()] == modes


def test_an_interrupted_step_can_be_taken_again():
    model = small_model()
    expected = tokens(generate(model, [1, 2, 3], 8, temperature=0))
    generation = generate(model, [1, 2, 3], 8, temperature=0)
    made = [next(generation), next(generation)]

    def interrupt(*_):
        raise KeyboardInterrupt

    hook = model.layers[1].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        next(generation)
    hook.remove()
    assert torch.equal(torch.stack([*made, *generation], dim=1), expected)


def test_a_step_that_met_nan_can_be_asked_again():
    model = small_model()
    expected = tokens(generate(model, [1, 2, 3], 8, temperature=0))
    generation = generate(model, [1, 2, 3], 8, temperature=0)
    made = [next(generation)]
    hook = model.register_forward_hook(lambda _, __, logits: logits * math.nan)
    for _ in range(2):
        with pytest.raises(InputError):
            next(generation)
    hook.remove()
    assert torch.equal(torch.stack([*made, *generation], dim=1), expected)


def test_bfloat16_weights_and_autocast_generate_with_a_bfloat16_cache():
    prompt = torch.randint(0, CONFIG.vocab_size, (2, 5))
    half = small_model().to(torch.bfloat16)
    generation = generate(half, prompt, 40, temperature=0)
    assert tokens(generation).shape == (2, 40)
    assert generation._cache[0].k_BHCK.dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        generation = generate(small_model(), prompt, 40, seed=1)
        assert tokens(generation).shape == (2, 40)
    assert generation._cache[0].k_BHCK.dtype == torch.bfloat16


def test_anything_called_like_the_model_generates():
    class Counting:
        config = CONFIG

        def __call__(self, token_ids):
            return torch.nn.functional.one_hot((token_ids + 1) % 61, 61).float()

    made = [int(ids) for ids in generate(Counting(), [57], 6, temperature=0, cache=False)]
    assert made == [58, 59, 60, 0, 1, 2]


def test_a_prompts_other_logits_are_not_computed():
    model, shapes = small_model(), []
    model.register_forward_hook(lambda _, __, logits: shapes.append(tuple(logits.shape)))
    next(generate(model, torch.ones(2, 9, dtype=torch.long), 3))
    assert shapes == [(2, 1, 61)]


def test_no_tokens_asked_none_made():
    assert list(generate(small_model(), [1], 0)) == []


@pytest.mark.parametrize(
    ("key", "prompt", "settings"),
    [
        ("generate.temperature", [1], {"temperature": -0.1}),
        ("generate.temperature", [1], {"temperature": math.nan}),
        ("generate.temperature", [1], {"temperature": math.inf}),
        ("generate.top_k", [1], {"top_k": 0}),
        ("generate.top_k", [1], {"top_k": 2.5}),
        ("generate.top_p", [1], {"top_p": 0.0}),
        ("generate.top_p", [1], {"top_p": 1.01}),
        ("generate.top_p", [1], {"top_p": math.nan}),
        ("generate.max_new_tokens", [1], {"max_new_tokens": -1}),
        ("generate.stop_id", [1], {"stop_id": 61}),
        ("generate.stop_id", [1], {"stop_id": 2.5}),
        ("generate.two_sources", [1], {"seed": 1, "generator": torch.Generator()}),
        ("generate.empty_prompt", [], {}),
        ("generate.empty_prompt", torch.ones(2, 0, dtype=torch.long), {}),
        ("generate.prompt_kind", [0.5], {}),
        ("generate.prompt_kind", torch.ones(1, 1, 1, dtype=torch.long), {}),
        ("model.id_range", [1, 61], {}),
        ("model.id_range", [-1], {}),
    ],
)
def test_wrong_use_is_an_error_at_the_call(key, prompt, settings):
    with pytest.raises(InputError) as error:
        generate(small_model(), prompt, **{"max_new_tokens": 3, **settings})
    assert error.value.key == key
    assert str(error.value)
    assert error.value.render("zh")
