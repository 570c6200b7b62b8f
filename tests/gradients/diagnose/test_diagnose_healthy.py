"""No healthy model is accused: torch's own modules, hand-written ones, and those of transformers'."""

import pytest
import torch
from tests.gradients.healthy import TORCH, TRANSFORMERS

from clinometer.gradients.diagnose.diagnose import diagnose


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [*TORCH, *TRANSFORMERS])
def test_a_healthy_model_is_not_accused(name):
    model, loss = {**TORCH, **TRANSFORMERS}[name]()
    found = diagnose(model, loss)
    assert found.healthy, found.render()
    assert len(found.findings) <= 5, found.render()  # explained findings are few
    assert all(found[n].status != "non-finite" for n in found)


def test_at_least_twenty_five_come_from_transformers():
    assert len(TRANSFORMERS) >= 25


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("seed", range(4))
def test_layers_dropped_at_random_are_not_accused(seed):
    model, loss = TRANSFORMERS["wav2vec2"]()
    model.config.layerdrop = 0.5
    torch.manual_seed(seed)
    found = diagnose(model, loss)
    assert found.healthy, found.render()
