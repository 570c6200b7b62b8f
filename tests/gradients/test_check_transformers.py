"""Models of transformers, built from configs, in train mode with their own loss: none is accused."""

import pytest
import torch
from tests.gradients.tiny import TINY

from clinometer.gradients.check import check_gradients


@pytest.mark.parametrize("name", sorted(TINY))
def test_a_transformers_model_passes_in_train_mode(name):
    torch.manual_seed(0)
    model, inputs = TINY[name]()
    model.train()
    check = check_gradients(model, lambda: model(**inputs))
    assert check.healthy, check.render("en")
    assert check.passed, check.render("en")
    assert all(layer.judgement.verdict != "wrong" for layer in check.layers)


@pytest.mark.soak
@pytest.mark.parametrize("name", sorted(TINY))
def test_a_transformers_model_is_not_accused_over_two_hundred_seeds(name):
    for seed in range(200):
        torch.manual_seed(seed)
        model, inputs = TINY[name]()
        model.train()
        check = check_gradients(model, lambda model=model, inputs=inputs: model(**inputs), seed=seed)
        assert check.healthy, (seed, check.render("en"))
