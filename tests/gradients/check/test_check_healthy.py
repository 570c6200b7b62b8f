"""Healthy models: none is accused, whatever the seed, the precision, or the corners in it."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from clinometer.gradients.check.check_gradients import check_gradients
from clinometer.lm.functional import cross_entropy
from clinometer.lm.model import TransformerLM
from clinometer.lm.transformer_config import TransformerConfig


def accused(check):
    return [(finding.cause, finding.names) for finding in check.findings if finding.severity == "fault"]


def relu_network(seed):
    """Rectifiers, a max-pool, clamps, dropout and batch statistics: corners everywhere."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(36, 16),
        nn.Hardtanh(),
        nn.Dropout(0.2),
        nn.LeakyReLU(0.1, inplace=True),
        nn.Linear(16, 3),
    )
    x, y = torch.randn(6, 1, 8, 8), torch.randint(0, 3, (6,))
    return model, lambda: F.cross_entropy(model(x), y)


class Routed(nn.Module):
    """Top-1 of four experts, max over features, a sort, a norm: decisions that flip under a step."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(6, 4)
        self.experts = nn.ModuleList(nn.Linear(6, 6) for _ in range(4))

    def forward(self, x):
        weight, chosen = self.gate(x).softmax(-1).max(-1)
        out = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            at = torch.where(chosen == i)[0]
            out = out.index_add(0, at, weight[at, None] * expert(x[at]).abs())
        return out.sort(-1).values.cumsum(-1).amax(-1) + out.norm(dim=-1).clamp(0.1, 3.0)


def routed_network(seed):
    torch.manual_seed(seed)
    model = Routed()
    x = torch.randn(12, 6)
    return model, lambda: model(x).mean()


def language_model(seed):
    torch.manual_seed(seed)
    config = TransformerConfig(
        vocab_size=30, context_length=10, d_model=8, num_layers=2, num_heads=2, d_ff=12
    )
    model = TransformerLM(config)
    ids = torch.randint(0, 30, (2, 11))
    return model, lambda: cross_entropy(model(ids[:, :-1]), ids[:, 1:])


BUILDERS = [relu_network, routed_network, language_model]


@pytest.mark.parametrize("build", BUILDERS)
@pytest.mark.parametrize("seed", range(4))
def test_every_tensor_of_a_healthy_network_passes(build, seed):
    check = check_gradients(*build(seed), seed=seed)
    assert accused(check) == []
    assert check.passed
    assert all(tensor.error <= tensor.tolerance for tensor in check.entries().values())
    # Rectified zeros tie in a max-pool: alone, on those inputs, it stands on a corner.
    assert {layer.kind for layer in check.layers if layer.judgement.verdict != "passed"} <= {"MaxPool2d"}
    assert check.wrong_layers == ()
