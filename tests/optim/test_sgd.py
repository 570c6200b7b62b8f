"""SGD's arithmetic: the plain formula, and torch.optim.SGD bit for bit."""

from typing import Any

import pytest
import torch

from clinometer.optim.sgd import SGD

PATHS = pytest.mark.parametrize("fused", [None, False], ids=["fast", "reference"])


@PATHS
def test_plain_sgd_is_theta_minus_lr_times_grad(fused: bool | None) -> None:
    p = torch.nn.Parameter(torch.tensor([1.0, -2.0, 0.0]))
    p.grad = torch.tensor([0.5, 4.0, -1.0])
    optimizer = SGD([p], lr=0.25, fused=fused)
    optimizer.step()
    assert p.tolist() == [0.875, -3.0, 0.25]
    assert not optimizer.state[p]


@PATHS
def test_momentum_and_nesterov_by_hand(fused: bool | None) -> None:
    """b = 1, then 0.5·1 + 3 = 3.5; plain: 1 + 3.5; Nesterov: (1 + 0.5) + (3 + 1.75)."""
    for nesterov, moved in ((False, 4.5), (True, 6.25)):
        p = torch.nn.Parameter(torch.tensor([0.0]))
        optimizer = SGD([p], lr=1.0, momentum=0.5, nesterov=nesterov, fused=fused)
        for grad in (1.0, 3.0):
            p.grad = torch.tensor([grad])
            optimizer.step()
        assert p.item() == -moved
        assert optimizer.state[p]["momentum_buffer"].item() == 3.5


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"weight_decay": 0.1},
        {"momentum": 0.9},
        {"momentum": 0.9, "weight_decay": 0.1},
        {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
    ],
    ids=str,
)
@PATHS
def test_it_is_torchs_sgd_bit_for_bit(options: dict[str, Any], fused: bool | None) -> None:
    """The reference equals torch's single-tensor form, the fast path torch's fused one."""
    generator = torch.Generator().manual_seed(3)
    start = torch.randn(300, 70, generator=generator)
    p, q = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    ours = SGD([p], lr=0.03, fused=fused, **options)
    theirs = torch.optim.SGD([q], lr=0.03, foreach=False, fused=fused is None, **options)
    for _ in range(10):
        p.grad = torch.randn(start.shape, generator=generator)
        q.grad = p.grad.clone()
        ours.step()
        theirs.step()
    assert torch.equal(p, q)
    assert (p - start).abs().max() > 0.1
    if "momentum" in options:
        assert torch.equal(ours.state[p]["momentum_buffer"], theirs.state[q]["momentum_buffer"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@PATHS
def test_half_precision_is_rounded_once(dtype: torch.dtype, fused: bool | None) -> None:
    """The fused SGD of torch up to 2.13 cannot do it: on the CPU it moves half-precision weights wrongly."""
    generator = torch.Generator().manual_seed(3)
    start, grad = (torch.randn(5000, generator=generator).to(dtype) for _ in range(2))
    p = torch.nn.Parameter(start.clone())
    p.grad = grad.clone()
    SGD([p], lr=0.03, momentum=0.9, weight_decay=0.1, fused=fused).step()
    exact = start.double() - 0.03 * (grad.double() + 0.1 * start.double())
    assert ((p.detach().double() - exact).abs() <= torch.finfo(dtype).eps * exact.abs() + 1e-6).all()
