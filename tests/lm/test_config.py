import math

import pytest
import torch

from clinometer.lm.model import TransformerLM, initial_weights
from clinometer.lm.transformer_config import TransformerConfig
from clinometer.messages import InputError

GOOD = {
    "vocab_size": 100,
    "context_length": 16,
    "d_model": 48,
    "num_layers": 2,
    "num_heads": 4,
    "d_ff": 64,
}


@pytest.mark.parametrize("field", list(GOOD))
@pytest.mark.parametrize("value", [0, -1, 2.0, "8", True, None])
def test_sizes_must_be_whole_numbers_above_zero(field, value):
    with pytest.raises(InputError) as error:
        TransformerConfig(**GOOD | {field: value})
    assert error.value.key == "model.positive"
    assert field in str(error.value)
    assert repr(value) in str(error.value)


def test_heads_must_divide_the_width_and_the_remedy_works():
    with pytest.raises(InputError) as error:
        TransformerConfig(**GOOD | {"d_model": 50})
    assert error.value.key == "model.heads"
    TransformerConfig(**GOOD | {"d_model": error.value.values["suggestion"]})


def test_rope_needs_an_even_head_and_the_remedy_works():
    with pytest.raises(InputError) as error:
        TransformerConfig(**GOOD | {"d_model": 20})
    assert error.value.key == "model.odd_head"
    assert error.value.values["head_dim"] == 5
    TransformerConfig(**GOOD | {"d_model": error.value.values["suggestion"]})


@pytest.mark.parametrize("theta", [0.0, -1.0, math.nan, math.inf])
def test_rope_theta_must_be_positive_and_finite(theta):
    with pytest.raises(InputError) as error:
        TransformerConfig(**GOOD, rope_theta=theta)
    assert error.value.key == "model.theta"


def test_weight_shapes_and_count_are_those_of_the_model():
    config = TransformerConfig(**GOOD)
    model = TransformerLM(config)
    assert {n: tuple(p.shape) for n, p in model.named_parameters()} == config.weight_shapes()
    assert [n for n, _ in model.named_parameters()] == list(config.weight_shapes())
    assert sum(p.numel() for p in model.parameters()) == config.num_parameters
    V, D, L, F = 100, 48, 2, 64
    assert config.num_parameters == 2 * V * D + L * (4 * D * D + 3 * D * F + 2 * D) + D


def test_flops_count_the_matrix_products_of_one_token():
    """Against torch's own counter of a forward and backward without attention, which it counts in full."""
    from torch.utils.flop_counter import FlopCounterMode

    config = TransformerConfig(**GOOD)
    model = TransformerLM(config)
    ids = torch.zeros(3, 16, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        model.loss(ids, ids).backward()
    by_op = counter.get_flop_counts()["Global"]
    products = sum(n for op, n in by_op.items() if "attention" not in str(op)) / ids.numel()
    attention = 6.0 * config.num_layers * config.d_model * 16
    assert products == config.flops_per_token() - attention


def test_initial_weights_have_the_documented_scale_and_are_reproducible():
    config = TransformerConfig(
        vocab_size=512, context_length=8, d_model=256, num_layers=8, num_heads=4, d_ff=512
    )
    weights = initial_weights(config, torch.Generator().manual_seed(1))
    again = initial_weights(config, torch.Generator().manual_seed(1))
    other = initial_weights(config, torch.Generator().manual_seed(2))
    # A normal cut at three standard deviations keeps 0.9866 of its standard deviation.
    for name, std in {
        "token_embeddings.weight": 1.0,
        "lm_head.weight": math.sqrt(2 / (512 + 256)),
        "layers.3.attn.q_proj.weight": math.sqrt(2 / 512),
        "layers.3.ffn.w1.weight": math.sqrt(2 / 768),
        "layers.3.attn.output_proj.weight": math.sqrt(2 / 512) / 4,
        "layers.3.ffn.w2.weight": math.sqrt(2 / 768) / 4,
    }.items():
        assert float(weights[name].std()) == pytest.approx(0.9866 * std, rel=0.02), name
        assert float(weights[name].abs().max()) <= 3 * std
    for name, w in weights.items():
        assert torch.equal(w, again[name])
        if w.ndim > 1:
            assert not torch.equal(w, other[name])
        else:
            assert torch.equal(w, torch.ones_like(w))
