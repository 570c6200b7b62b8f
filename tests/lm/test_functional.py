"""The parts of the model, each against an implementation nobody here wrote."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from clinometer.lm import functional as lm
from clinometer.lm.model import TransformerLM, head_loss, initial_weights
from clinometer.lm.transformer_config import TransformerConfig
from clinometer.messages import InputError

CONFIG = TransformerConfig(vocab_size=50, context_length=24, d_model=32, num_layers=2, num_heads=4, d_ff=48)


def largest(a, b):
    return float((a - b).detach().abs().max())


def float64_weights(config=CONFIG, seed=0):
    weights = initial_weights(config, torch.Generator().manual_seed(seed))
    return {name: w.double().requires_grad_() for name, w in weights.items()}


def test_linear_is_x_times_w_transposed():
    x, w = torch.randn(2, 3, 5), torch.randn(7, 5)
    assert largest(lm.linear(x, w), torch.einsum("bsi,oi->bso", x, w)) <= 1e-6


def test_embedding_picks_rows():
    table = torch.randn(9, 4)
    ids = torch.tensor([[0, 8], [3, 3]])
    assert torch.equal(lm.embedding(ids, table), table[ids])


@pytest.mark.parametrize("bad", [-1, 9, 10**12])
def test_embedding_names_the_id_outside_the_vocabulary(bad):
    with pytest.raises(InputError) as error:
        lm.embedding(torch.tensor([[0, 1], [2, bad]]), torch.randn(9, 4))
    assert error.value.values["value"] == bad
    assert error.value.values["index"] == [1, 1]
    assert str(bad) in str(error.value)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_rms_norm_is_the_equation(scale):
    x, w = torch.randn(3, 4, 16, dtype=torch.float64) * scale, torch.randn(16, dtype=torch.float64)
    want = w * x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
    assert largest(lm.rms_norm(x, w), want) <= 1e-12


def test_silu_and_swiglu_are_the_equations():
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    w1, w2, w3 = (torch.randn(s, dtype=torch.float64) for s in ((12, 8), (8, 12), (12, 8)))
    assert largest(lm.silu(x), x / (1 + (-x).exp())) <= 1e-12
    gate = x @ w1.T
    assert largest(lm.swiglu(x, w1, w2, w3), (gate * torch.sigmoid(gate) * (x @ w3.T)) @ w2.T) <= 1e-12


@given(
    head_dim=st.sampled_from([2, 4, 10, 64]),
    positions=st.lists(st.integers(0, 100_000), min_size=1, max_size=7),
    theta=st.sampled_from([100.0, 10_000.0, 5e5]),
)
def test_rope_is_multiplication_by_a_complex_number_of_modulus_one(head_dim, positions, theta):
    x = torch.randn(2, 3, len(positions), head_dim, dtype=torch.float64)
    at = torch.tensor(positions)
    y = lm.rope(x, at, theta)
    # In float64 from the float32 angles, which are what the model defines (see rotary_table).
    frequencies = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    angles = (at.float()[:, None] * frequencies).double()
    turned = torch.view_as_complex(x.unflatten(-1, (-1, 2))) * torch.polar(torch.ones_like(angles), angles)
    assert largest(y, torch.view_as_real(turned).flatten(-2)) <= 1e-6
    assert largest(y.norm(dim=-1), x.norm(dim=-1)) <= 1e-6 * float(x.norm(dim=-1).max())


def test_rope_scores_depend_on_the_distance_only():
    q, k = torch.randn(1, 16, dtype=torch.float64), torch.randn(1, 16, dtype=torch.float64)

    def score(m, n):
        return float((lm.rope(q, torch.tensor([m])) * lm.rope(k, torch.tensor([n]))).sum())

    assert score(7, 3) == pytest.approx(score(1004, 1000), abs=1e-3)
    assert abs(score(7, 3) - score(7, 4)) > 1e-2


def test_rope_takes_positions_that_differ_by_batch():
    x = torch.randn(2, 3, 5, 8)  # batch, heads, sequence, K
    positions = torch.tensor([[0, 1, 2, 3, 4], [9, 8, 7, 6, 5]])
    y = lm.rope(x, positions[:, None, :])
    for b in range(2):
        assert largest(y[b], lm.rope(x[b], positions[b])) == 0


def test_softmax_is_stable_and_sums_to_one():
    x = torch.tensor([[1e4, 1e4 - 1, -1e4], [0.0, 0.0, 0.0]])
    y = lm.softmax(x)
    assert torch.isfinite(y).all()
    assert largest(y.sum(-1), torch.ones(2)) <= 1e-6
    assert float(y[0, 0]) == pytest.approx(1 / (1 + math.exp(-1)), rel=1e-6)
    assert torch.equal(lm.softmax(x, dim=0).sum(0) > 0.99, torch.ones(3, dtype=torch.bool))


@given(batch=st.sampled_from([(), (3,), (2, 3), (2, 1, 3)]), S=st.integers(1, 6), T=st.integers(1, 6))
def test_attention_is_the_equation_for_any_mask_and_batch(batch, S, T):
    q, k, v = (torch.randn(*batch, n, 8, dtype=torch.float64) for n in (S, T, T))
    mask = torch.rand(*batch, S, T) < 0.6
    mask[..., 0] = True  # every query sees something
    scores = (q @ k.transpose(-1, -2) / 8**0.5).masked_fill(~mask, -torch.inf)
    want = scores.softmax(-1) @ v
    assert largest(lm.scaled_dot_product_attention(q, k, v, mask), want) <= 1e-12


def test_a_query_that_sees_no_key_gets_zeros():
    q = k = v = torch.randn(1, 3, 4)
    mask = torch.ones(1, 3, 3, dtype=torch.bool)
    mask[0, 1] = False
    y = lm.scaled_dot_product_attention(q, k, v, mask)
    assert torch.isfinite(y).all()
    assert torch.equal(y[0, 1], torch.zeros(4))


def test_multihead_attention_without_rope_is_torchs():
    x = torch.randn(2, 6, 32, dtype=torch.float64)
    theirs = torch.nn.MultiheadAttention(32, 4, bias=False, batch_first=True, dtype=torch.float64)
    q, k, v = theirs.in_proj_weight.chunk(3)
    causal = torch.ones(6, 6, dtype=torch.bool).triu(1)
    want = theirs(x, x, x, attn_mask=causal, need_weights=False)[0]
    got = lm.multihead_attention(x, q, k, v, theirs.out_proj.weight, 4)
    assert largest(got, want) <= 1e-12


def test_causality_through_gradients():
    """d logits[s] / d embedding[t] is nonzero for t ≤ s and exactly zero for t > s."""
    weights = float64_weights()
    x = torch.randn(1, 8, 32, dtype=torch.float64, requires_grad=True)
    rotation = lm.rotary_table(torch.arange(8), CONFIG.head_dim, CONFIG.rope_theta)
    y = x
    for i in range(CONFIG.num_layers):
        y = lm.transformer_block(
            {n: weights[f"layers.{i}.{n}"] for n in lm.BLOCK_WEIGHTS}, y, CONFIG.num_heads, rotation=rotation
        )
    for s in range(8):
        (grad,) = torch.autograd.grad(y[0, s].pow(2).sum(), x, retain_graph=True)
        reached = grad[0].abs().sum(-1)
        assert (reached[: s + 1] > 0).all()
        assert float(reached[s + 1 :].sum()) == 0.0


def test_transformer_lm_differentiates_plain_leaf_tensors():
    weights = float64_weights()
    ids = torch.randint(0, CONFIG.vocab_size, (3, 10))
    lm.cross_entropy(lm.transformer_lm(weights, ids, CONFIG), ids.roll(-1, 1)).backward()
    for name, weight in weights.items():
        assert weight.grad is not None, name
        assert weight.grad.shape == weight.shape
        assert float(weight.grad.norm()) > 0, name


def test_the_sum_over_the_vocabulary_of_the_logit_gradient_is_zero():
    logits = torch.randn(4, 6, 50, dtype=torch.float64, requires_grad=True)
    lm.cross_entropy(logits, torch.randint(0, 50, (4, 6))).backward()
    assert largest(logits.grad.sum(-1), torch.zeros(4, 6)) <= 1e-15


@pytest.mark.parametrize("rotated", [False, True])
def test_the_gradient_of_a_key_bias_is_zero_unless_keys_are_rotated(rotated):
    """One number added to all scores of a query changes no softmax: b·q is the same for every key."""
    q, k, v = torch.randn(3, 2, 7, 8, dtype=torch.float64)
    bias = torch.randn(8, dtype=torch.float64, requires_grad=True)
    rotation = lm.rotary_table(torch.arange(7), 8, CONFIG.rope_theta)
    keys = k + bias
    if rotated:
        q, keys = lm.rotate(q, rotation), lm.rotate(keys, rotation)
    seen = torch.ones(7, 7, dtype=torch.bool).tril()
    out = lm.scaled_dot_product_attention(q, keys, v, seen)
    (grad,) = torch.autograd.grad(out.square().sum(), bias)
    assert (float(grad.abs().max()) > 1e-3) == rotated
    assert rotated or float(grad.abs().max()) <= 1e-14


def test_the_module_and_the_function_agree_to_the_bit():
    model = TransformerLM(CONFIG)
    ids = torch.randint(0, CONFIG.vocab_size, (2, 24))
    assert list(model.state_dict()) == list(CONFIG.weight_shapes())
    assert torch.equal(model(ids), lm.transformer_lm(model.state_dict(), ids, CONFIG))
    assert torch.equal(model.loss(ids, ids), lm.cross_entropy(model(ids), ids))


def test_no_batch_dimension_and_many_are_fine():
    model = TransformerLM(CONFIG)
    ids = torch.randint(0, CONFIG.vocab_size, (2, 3, 7))
    assert model(ids).shape == (2, 3, 7, 50)
    assert largest(model(ids)[1, 2], model(ids[1, 2])) <= 1e-5


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"layers.1.ffn.w2.weight": None}, "model.weights_missing"),
        ({"ln_final.weight": torch.ones(31)}, "model.weight_shape"),
    ],
)
def test_wrong_weights_are_named(change, key):
    weights = {**initial_weights(CONFIG), **change}
    weights = {n: w for n, w in weights.items() if w is not None}
    with pytest.raises(InputError) as error:
        lm.transformer_lm(weights, torch.zeros(1, 4, dtype=torch.long), CONFIG)
    assert error.value.key == key
    assert error.value.values["name"] == next(iter(change))


def test_a_sequence_longer_than_the_context_is_refused():
    with pytest.raises(InputError, match="25 tokens"):
        lm.transformer_lm(initial_weights(CONFIG), torch.zeros(1, 25, dtype=torch.long), CONFIG)


# cross_entropy


@given(leading=st.sampled_from([(), (5,), (2, 3), (2, 1, 3)]), scale=st.sampled_from([1.0, 1000.0]))
def test_cross_entropy_is_minus_log_softmax_of_the_target(leading, scale):
    logits = torch.randn(*leading, 11, dtype=torch.float64) * scale
    targets = torch.randint(0, 11, leading)
    log_p = logits - logits.logsumexp(-1, keepdim=True)
    each = -log_p.gather(-1, targets[..., None])[..., 0]
    assert largest(lm.cross_entropy(logits, targets, reduction="none"), each) <= 1e-9
    assert largest(lm.cross_entropy(logits, targets), each.mean()) <= 1e-9
    assert largest(lm.cross_entropy(logits, targets, reduction="sum"), each.sum()) <= 1e-9


def test_cross_entropy_is_finite_and_right_at_huge_logits():
    logits = torch.tensor([[1000.0, 0.0], [0.0, 1000.0]]).mul(1000).requires_grad_()
    loss = lm.cross_entropy(logits, torch.tensor([0, 0]))
    loss.backward()
    assert float(loss) == pytest.approx(500_000.0)
    assert torch.isfinite(logits.grad).all()


def test_ignored_positions_do_not_count():
    logits = torch.randn(2, 4, 7, requires_grad=True)
    targets = torch.randint(0, 7, (2, 4))
    targets[0, 1:] = -100
    loss = lm.cross_entropy(logits, targets)
    kept = targets != -100
    assert largest(loss, F.cross_entropy(logits[kept], targets[kept])) <= 1e-6
    loss.backward()
    assert float(logits.grad[~kept].abs().sum()) == 0.0


def test_a_target_outside_the_classes_is_named():
    with pytest.raises(InputError) as error:
        lm.cross_entropy(torch.randn(2, 3, 7), torch.tensor([[0, 1, 2], [-100, 7, 0]]))
    assert error.value.key == "model.target_range"
    assert error.value.values["index"] == [1, 1]


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_chunked_loss_is_the_plain_loss(reduction):
    x = torch.randn(2, 40, 16, requires_grad=True)
    w = torch.randn(5000, 16, requires_grad=True)
    targets = torch.randint(0, 5000, (2, 40))
    targets[0, :5] = -100
    plain = lm.cross_entropy(lm.linear(x, w), targets, reduction=reduction)
    want = torch.autograd.grad(plain, (x, w))
    chunked = lm.linear_cross_entropy(x, w, targets, reduction=reduction)
    got = torch.autograd.grad(chunked, (x, w))
    assert float(chunked.detach()) == pytest.approx(float(plain.detach()), rel=1e-6)
    for a, b in zip(got, want, strict=True):
        assert largest(a, b) <= 1e-5 * float(b.abs().max())


def test_a_large_vocabulary_takes_the_chunked_loss(monkeypatch):
    called = []
    monkeypatch.setattr(lm, "linear_cross_entropy", lambda *a, **k: called.append(a) or torch.zeros(()))
    head_loss(torch.randn(2, 3, 4), torch.randn(32_768, 4), torch.zeros(2, 3, dtype=torch.long), "mean")
    assert len(called) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_attention_in_half_precision_only_rounds_its_result(dtype: torch.dtype, autocast: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v, g = (torch.randn(2, 3, 9, 8, generator=generator).to(dtype) for _ in range(4))
    for x in (q, k, v):
        x.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = lm.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert y.dtype == dtype
    found = (y, *torch.autograd.grad(y, (q, k, v), g))

    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    scores = (exact[0] @ exact[1].mT / math.sqrt(8)).masked_fill(torch.ones(9, 9).tril() == 0, -math.inf)
    truth = torch.softmax(scores, -1) @ exact[2]
    expected = (truth, *torch.autograd.grad(truth, exact, g.double()))
    half_ulp = torch.finfo(dtype).eps / 2
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.double(), other.to(torch.float64), rtol=half_ulp * 1.01, atol=2e-6)
