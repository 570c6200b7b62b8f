"""The compiler stays out of a process that compiles nothing, and in where something was compiled."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from clinometer.optim.adamw import AdamW
from clinometer.optim.muon import Muon
from clinometer.optim.sgd import SGD

ONE_LIFE = """
import sys, torch
from clinometer.optim.make_optimizers import make_optimizers
from clinometer.optim.sgd import SGD
weights = {"layers.0.w": torch.ones(4, 4), "head": torch.ones(4, 4)}
weights = {name: torch.nn.Parameter(weight) for name, weight in weights.items()}
optimizers = [*make_optimizers(weights.items(), name="muon", lr=0.1), SGD(weights.values(), 0.1)]
for optimizer in optimizers:
    for weight in weights.values():
        weight.grad = torch.ones(4, 4)
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.zero_grad()
assert len(optimizers) == 3 and all(weight.grad is None for weight in weights.values())
print("torch._dynamo" in sys.modules)
"""


def test_an_optimizers_whole_life_does_not_import_the_compiler() -> None:
    done = subprocess.run([sys.executable, "-c", ONE_LIFE], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize("kind", [AdamW, Muon, SGD])
def test_where_the_compiler_is_loaded_torchs_own_methods_are_called(
    kind: type[torch.optim.Optimizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    optimizer = kind([torch.nn.Parameter(torch.ones(2, 2))], lr=0.1)  # pyright: ignore[reportCallIssue]
    asked = []
    method = torch.optim.Optimizer.zero_grad
    monkeypatch.setitem(sys.modules, "torch._dynamo", torch)
    monkeypatch.setattr(method.__wrapped__, "__dynamo_disable", asked.append, raising=False)  # pyright: ignore
    optimizer.zero_grad()
    assert asked == [optimizer]


@pytest.mark.parametrize("kind", [AdamW, Muon, SGD])
def test_what_is_learnt_is_saved_and_loaded_as_by_torch(kind: type[torch.optim.Optimizer]) -> None:
    weight = torch.nn.Parameter(torch.arange(4.0).view(2, 2))
    optimizer = kind([weight], lr=0.1)  # pyright: ignore[reportCallIssue]
    weight.grad = torch.ones(2, 2)
    optimizer.step()
    saved, by_torch = optimizer.state_dict(), torch.optim.Optimizer.state_dict(optimizer)
    assert saved["param_groups"] == by_torch["param_groups"]
    assert saved["state"].keys() == by_torch["state"].keys()
    for key, value in by_torch["state"].get(0, {}).items():
        assert torch.equal(torch.as_tensor(saved["state"][0][key]), torch.as_tensor(value))
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(2, 2))]})
    assert [len(group["params"]) for group in optimizer.param_groups] == [1, 1]
