"""Models of transformers, built from configs, in train mode with their own loss: none is accused."""

import pytest
import torch
from tests.gradients.check.tiny import MORE, TINY

from clinometer.gradients.check.check_gradients import check_gradients


def passes(build):
    torch.manual_seed(0)
    model, inputs = build()
    model.train()
    check = check_gradients(model, lambda: model(**inputs))
    assert check.healthy, check.render("en")
    assert check.passed, check.render("en")
    assert {finding.cause for finding in check.findings} <= {"corner"}
    assert check.wrong_layers == ()


@pytest.mark.parametrize("name", sorted(TINY))
def test_a_transformers_model_passes_in_train_mode(name):
    passes(TINY[name])


@pytest.mark.soak
@pytest.mark.parametrize("name", sorted(MORE))
def test_more_transformers_models_pass_in_train_mode(name):
    passes(MORE[name])
