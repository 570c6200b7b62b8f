"""The compiled training step's form computes what the readable form computes."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from clinometer.lm import functional as lm
from clinometer.lm.chunked_loss import chunked_cross_entropy
from clinometer.lm.compiled_step import attention_by_rows, linear, onednn_is_faster, transformer_block

D, H, F = 48, 4, 80


def block_weights(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    shapes = {"ln1": (D,), "ln2": (D,), "ffn.w1": (F, D), "ffn.w2": (D, F), "ffn.w3": (F, D)}
    shapes |= {f"attn.{name}": (D, D) for name in ("q_proj", "k_proj", "v_proj", "output_proj")}
    generator = torch.Generator().manual_seed(0)
    return {
        f"{name}.weight": torch.randn(shape, generator=generator).mul(0.2).to(dtype).requires_grad_()
        for name, shape in shapes.items()
    }


def gradients(compute, weights, x):
    out = compute(weights, x)
    seed = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    return out, *torch.autograd.grad(out, [x, *weights.values()], seed)


def largest_relative(found, wanted) -> float:
    return max(float(((a - b).norm() / b.norm()).detach()) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("length", [2, 24, 64, 100, 192])
@pytest.mark.parametrize(
    ("dtype", "onednn", "tolerance"), [(torch.float64, False, 1e-12), (torch.float32, True, 2e-6)]
)
def test_the_block_and_every_gradient_are_the_readable_ones(length, dtype, onednn, tolerance):
    weights = block_weights(dtype)
    x = torch.randn(2, length, D, generator=torch.Generator().manual_seed(2)).to(dtype).requires_grad_()
    rotation = lm.rotary_table(torch.arange(length), D // H, 10_000.0)
    wanted = gradients(lambda w, x: lm.transformer_block(w, x, H, rotation=rotation), weights, x)
    found = gradients(lambda w, x: transformer_block(w, x, H, rotation, onednn=onednn), weights, x)
    assert largest_relative(found, wanted) <= tolerance


@pytest.mark.parametrize("length", [1, 63, 64, 65, 200])
def test_attention_by_rows_is_causal_attention(length):
    parts = [torch.randn(2, 3, length, 16, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    seed = torch.randn(2, 3, length, 16, dtype=torch.float64)
    wanted = lm.scaled_dot_product_attention(*parts, is_causal=True)
    found = attention_by_rows(*parts)
    assert largest_relative([found], [wanted]) <= 1e-12
    pairs = (torch.autograd.grad(out, parts, seed) for out in (found, wanted))
    scale = float(seed.norm())
    assert all(float((a - b).norm()) <= 1e-12 * scale for a, b in zip(*pairs, strict=True))


def test_attention_by_rows_in_bfloat16_is_about_as_near_to_float64_as_torchs_kernel():
    # It rounds the scores to bfloat16 once, as any product under autocast does; torch's kernel does not.
    parts = [torch.randn(2, 3, 200, 16, dtype=torch.float64) for _ in range(3)]
    exact = lm.scaled_dot_product_attention(*parts, is_causal=True)
    low = [part.bfloat16() for part in parts]
    by_rows = largest_relative([attention_by_rows(*low).double()], [exact])
    torchs = largest_relative([lm.scaled_dot_product_attention(*low, is_causal=True).double()], [exact])
    assert by_rows <= 1.5 * torchs


def test_a_product_by_onednn_has_the_plain_ones_gradients():
    x = torch.randn(3, 40, 24, requires_grad=True)
    w = torch.randn(56, 24, requires_grad=True)
    seed = torch.randn(3, 40, 56)
    found, wanted = linear(x, w, onednn=True), lm.linear(x, w)
    assert largest_relative([found], [wanted]) <= 1e-6
    pairs = (torch.autograd.grad(y, (x, w), seed) for y in (found, wanted))
    assert largest_relative(*pairs) <= 1e-6


def test_which_product_is_faster_is_measured_without_moving_a_random_number():
    before = torch.get_rng_state()
    assert isinstance(onednn_is_faster(size=64, rounds=1), bool)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize(
    ("dtype", "onednn", "tolerance"), [(torch.float64, False, 1e-12), (torch.float32, True, 2e-6)]
)
def test_the_chunked_loss_and_its_gradients_are_the_plain_ones(reduction, dtype, onednn, tolerance):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(3, 400, 16, generator=generator).to(dtype).requires_grad_()  # three chunks, one short
    w = torch.randn(777, 16, generator=generator).to(dtype).requires_grad_()
    targets = torch.randint(0, 777, (3, 400), generator=generator)
    targets[0, :50] = -100
    found = chunked_cross_entropy(x, w, targets, reduction=reduction, onednn=onednn) * 3
    wanted = lm.cross_entropy(lm.linear(x, w), targets, reduction=reduction) * 3
    assert float(found.detach()) == pytest.approx(float(wanted.detach()), rel=tolerance)
    assert (
        largest_relative(torch.autograd.grad(found, (x, w)), torch.autograd.grad(wanted, (x, w))) <= tolerance
    )


def test_the_chunked_loss_under_autocast_is_as_near_to_float64_as_the_plain_one():
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(2, 300, 32, generator=generator, dtype=torch.float64).requires_grad_()
    w = torch.randn(900, 32, generator=generator, dtype=torch.float64).mul(0.3).requires_grad_()
    targets = torch.randint(0, 900, (2, 300), generator=generator)
    exact = torch.autograd.grad(lm.cross_entropy(lm.linear(x, w), targets), (x, w))
    x32, w32 = (t.detach().float().requires_grad_() for t in (x, w))
    with torch.autocast("cpu", torch.bfloat16):
        plain = lm.cross_entropy(lm.linear(x32, w32), targets)
        chunked = chunked_cross_entropy(x32, w32, targets)
    off = largest_relative((g.double() for g in torch.autograd.grad(plain, (x32, w32))), exact)
    found = torch.autograd.grad(chunked, (x32, w32))
    assert all(grad.dtype == torch.float32 for grad in found)
    assert largest_relative((g.double() for g in found), exact) <= 1.25 * off


def test_a_second_backward_through_the_chunked_loss_is_refused():
    x, w = torch.randn(4, 8, requires_grad=True), torch.randn(20, 8, requires_grad=True)
    loss = chunked_cross_entropy(x, w, torch.arange(4))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


COMPILED = """
import sys
import torch
from clinometer.lm import compiled_step

V = int(sys.argv[1])
config = TransformerConfig(vocab_size=V, context_length=24, d_model=32, num_layers=1, num_heads=2, d_ff=64)
plain, compiled = (TransformerLM(config, generator=torch.Generator().manual_seed(0)) for _ in range(2))
seen = []
form = compiled_step.transformer_block
def spy(*a, **k):
    seen.append(1)
    return form(*a, **k)
compiled_step.transformer_block = spy
compiled.compile_parts(onednn=True)
ids, targets = torch.randint(0, V, (2, 2, 24), generator=torch.Generator().manual_seed(1))
losses = [model.loss(ids, targets) for model in (plain, compiled)]
for loss in losses:
    loss.backward()
assert seen, "the compiled block is not the fast one"
off = float((losses[1] - losses[0]).detach().abs() / losses[0].detach())
assert off < 1e-5, off
pairs = zip(compiled.parameters(), plain.parameters(), strict=True)
off = max(float((a.grad - b.grad).norm() / b.grad.norm()) for a, b in pairs)
assert off < 1e-5, off
with torch.compiler.set_stance("force_eager"), torch.no_grad():
    seen.clear()
    assert torch.equal(compiled(ids), plain(ids)) and not seen, "what runs eagerly is the readable form"
"""


@pytest.mark.soak
@pytest.mark.parametrize("vocab_size", [50, 33_000])
def test_a_compiled_model_takes_the_fast_form_and_gives_the_same_loss_and_gradients(vocab_size):
    # A process of its own: the shape checks that the tests put around `functional` cannot be compiled.
    done = subprocess.run(
        [sys.executable, "-c", COMPILED, str(vocab_size)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
