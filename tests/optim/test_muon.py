"""Our Muon takes torch's steps, to the bit."""

import pytest
import torch
from torch import nn

from clinometer.optim import muon as ours
from clinometer.optim.muon import Muon, orthogonalised

SHAPES = [
    (24, 24),
    (24, 24),
    (24, 24),
    (64, 24),
    (64, 24),
    (24, 64),
    (24, 64),
    (7, 5),
    (1, 9),
    (9, 1),
    (640, 512),
]


def matrices(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]


def set_grads(parameters: list[nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for number, p in enumerate(parameters):
        scale = 10.0 ** (number % 5 - 3)
        p.grad = (scale * torch.randn(p.shape, generator=generator)).to(p.dtype)


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("adjust", ["match_rms_adamw", "original", None])
@pytest.mark.parametrize("threads", [1, 2])
def test_it_is_torchs_muon_bit_for_bit(nesterov: bool, adjust: str | None, threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        mine, theirs = matrices(), matrices()
        options = {"lr": 0.02, "weight_decay": 0.1, "nesterov": nesterov, "adjust_lr_fn": adjust}
        a, b = Muon(mine, **options), torch.optim.Muon(theirs, **options)
        for step in range(4):
            set_grads(mine, step)
            set_grads(theirs, step)
            if step == 2:
                mine[1].grad = theirs[1].grad = None
            a.step()
            b.step()
            for p, q in zip(mine, theirs, strict=True):
                assert torch.equal(p, q), (step, p.shape, float((p - q).abs().max()))
        for p, q in zip(mine, theirs, strict=True):
            assert torch.equal(a.state[p]["momentum_buffer"], b.state[q]["momentum_buffer"])
    finally:
        torch.set_num_threads(before)


def test_a_batch_that_would_be_too_large_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ours, "_AT_ONCE", 2 * 24 * 24)
    mine, theirs = matrices(), matrices()
    for parameters, optimizer in ((mine, Muon(mine)), (theirs, torch.optim.Muon(theirs))):
        set_grads(parameters, 3)
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(mine, theirs, strict=True))


def test_every_direction_of_the_update_has_about_the_same_length() -> None:
    generator = torch.Generator().manual_seed(0)
    u, _, v = torch.linalg.svd(torch.randn(32, 20, generator=generator), full_matrices=False)
    steep = u * torch.logspace(0, -1.5, 20) @ v  # lengths from 1 to 0.03
    for made in orthogonalised([steep, steep.clone()], (3.4445, -4.7750, 2.0315), 5, 1e-7):
        lengths = torch.linalg.svdvals(made.float())
        assert 0.6 < float(lengths.min()) <= float(lengths.max()) < 1.3


def test_bfloat16_momentum_is_not_overwritten_by_the_orthogonalisation() -> None:
    p = nn.Parameter(torch.eye(4, dtype=torch.bfloat16))
    p.grad = torch.full((4, 4), 0.5, dtype=torch.bfloat16)
    optimizer = Muon([p], momentum=0.5, nesterov=False)
    optimizer.step()
    assert torch.equal(optimizer.state[p]["momentum_buffer"], torch.full((4, 4), 0.25, dtype=torch.bfloat16))
