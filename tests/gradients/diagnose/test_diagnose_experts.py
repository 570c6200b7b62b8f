"""A mixture of experts: those no token was sent to are named in one explained line, however it is written."""

import pytest
import torch
from torch import nn

from clinometer.gradients.diagnose.diagnose import diagnose

X = torch.randn(8, 4, generator=torch.Generator().manual_seed(2))


def skipped(experts, weight, chosen):
    out = torch.zeros_like(X)
    for i, expert in enumerate(experts):
        rows = (chosen == i).nonzero().flatten()
        if len(rows):
            out = out.index_add(0, rows, expert(X[rows]) * weight[rows, i, None])
    return out


def run_on_nothing(experts, weight, chosen):
    out = torch.zeros_like(X)
    for i, expert in enumerate(experts):
        rows = (chosen == i).nonzero().flatten()
        out = out.index_add(0, rows, expert(X[rows]) * weight[rows, i, None])
    return out


def written_by_mask(experts, weight, chosen):
    out = torch.zeros_like(X)
    for i, expert in enumerate(experts):
        out[chosen == i] = expert(X[chosen == i]) * weight[chosen == i, i, None]
    return out


def weighted_with_zero(experts, weight, chosen):
    kept = torch.zeros_like(weight).scatter(1, chosen[:, None], weight.gather(1, chosen[:, None]))
    return sum(kept[:, i, None] * expert(X) for i, expert in enumerate(experts))


def stacked_and_weighted(experts, weight, chosen):
    kept = torch.zeros_like(weight).scatter(1, chosen[:, None], weight.gather(1, chosen[:, None]))
    return (torch.stack([expert(X) for expert in experts], 1) * kept[..., None]).sum(1)


STYLES = [skipped, run_on_nothing, written_by_mask, weighted_with_zero, stacked_and_weighted]


class Mixture(nn.Module):
    def __init__(self, style, closed):
        super().__init__()
        self.router, self.style = nn.Linear(4, 4), style
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4)) for _ in range(4)
        )
        self.register_buffer("closed", torch.zeros(4))
        self.closed[closed] = -1e4

    def forward(self):
        weight = (self.router(X) + self.closed).softmax(-1)
        chosen = torch.arange(8) % 4 if not self.closed.any() else weight.argmax(-1)
        return self.style(self.experts, weight, chosen)


@pytest.mark.parametrize("style", STYLES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("closed", [[2], [1, 2]])
def test_idle_experts_are_one_explained_line_with_their_names(style, closed):
    model = Mixture(style, closed)
    found = diagnose(model, lambda: (model() - 1).square().mean())
    assert found.healthy, found.render()
    idle = {name for name in found if name.startswith(tuple(f"experts.{i}." for i in closed))}
    (finding,) = [f for f in found.findings if idle & set(f.names)]
    assert set(finding.names) >= idle, found.render()
    assert finding.cause in ("unused", "absent-rows"), found.render()
    assert finding.owners[: len(closed)] == tuple(f"experts[{i}]" for i in closed)
    assert all(f"experts[{i}]" in finding.say("what", lang) for i in closed for lang in ("en", "zh"))


@pytest.mark.parametrize("style", STYLES, ids=lambda f: f.__name__)
def test_experts_that_all_have_tokens_are_left_in_peace(style):
    model = Mixture(style, [])
    found = diagnose(model, lambda: (model() - 1).square().mean())
    assert not found.findings, found.render()


def test_an_expert_whose_result_is_left_aside_is_a_fault():
    def forgotten(experts, weight, chosen):
        results = [expert(X) * weight[:, i, None] for i, expert in enumerate(experts)]
        return results[0] + results[1] + results[3]

    model = Mixture(forgotten, [])
    found = diagnose(model, lambda: (model() - 1).square().mean())
    (finding,) = [f for f in found.findings if f.severity == "fault"]
    assert finding.cause == "not-reaching-loss"
    assert finding.owners == ("experts[2]",)
