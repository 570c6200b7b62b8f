"""Inactive units of many layers are one line."""

import torch
from torch import nn

from clinometer.gradients.diagnose.diagnose import diagnose


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 32), nn.Linear(32, 8)

    def forward(self, inputs):
        return inputs + self.down(self.up(inputs).relu())  # inactive


def test_inactive_units_of_many_layers_are_one_finding_with_their_sum():
    model = nn.Sequential(*(Block() for _ in range(24)))
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    silent = []
    hooks = [
        b.up.register_forward_hook(lambda m, i, h: silent.append(int((h <= 0).all(0).sum()))) for b in model
    ]
    model(x)
    for hook in hooks:
        hook.remove()
    (finding,) = diagnose(model, lambda: model(x).square().mean()).findings
    assert finding.values == {"zero": sum(silent), "all": 24 * 32, "layers": sum(n > 0 for n in silent)}
    assert finding.where.source.endswith("# inactive")
    assert f"{sum(silent)} of 768 units in 24 activations" in finding.say("what", "en")


def test_inactive_units_of_one_layer_keep_its_line():
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 1))
    nn.init.constant_(model[0].bias[2:3], -100.0)
    finding = next(f for f in diagnose(model, lambda: model(torch.randn(9, 4)).sum()).findings)
    assert finding.variant == "units"
