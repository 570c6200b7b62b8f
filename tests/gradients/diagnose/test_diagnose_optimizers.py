"""Whom an optimizer steps: replaced layers are one finding, several optimizers are no accusation."""

import pytest
import torch
from torch import nn

from clinometer.gradients.diagnose.diagnose import diagnose
from clinometer.messages import InputError


class Adversaries(nn.Module):
    def __init__(self):
        super().__init__()
        self.generator = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
        self.discriminator = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1))


def z():
    return torch.randn(6, 4)


@pytest.fixture
def gan():
    model = Adversaries()
    steps = [torch.optim.Adam(part.parameters(), 1e-3) for part in (model.generator, model.discriminator)]
    return model, *steps


def generator_step(model):
    return nn.functional.softplus(-model.discriminator(model.generator(z()))).mean()


def discriminator_step(model):
    real, fake = model.discriminator(z() + 1), model.discriminator(model.generator(z()).detach())
    return (nn.functional.softplus(-real) + nn.functional.softplus(fake)).mean()


def causes(found, severity="fault"):
    return [f.cause for f in found.findings if f.severity == severity]


def test_the_generators_step_does_not_accuse_the_discriminator(gan):
    model, ours, theirs = gan
    found = diagnose(model, lambda: generator_step(model), optimizer=ours)
    assert found.healthy, found.render()
    (finding,) = found.findings
    assert (finding.cause, finding.variant, finding.severity) == ("not-in-optimizer", "other", "explained")
    assert {name.partition(".")[0] for name in finding.names} == {"discriminator"}
    assert "another one (Adam)" in finding.say("what", "en")
    assert theirs.state == {}


def test_the_discriminators_step_does_not_accuse_the_generator(gan):
    model, _, ours = gan
    found = diagnose(model, lambda: discriminator_step(model), optimizer=ours)
    assert found.healthy, found.render()
    assert {f.variant for f in found.findings} == {"apart"}  # its detach() is meant


@pytest.mark.parametrize("step", [generator_step, discriminator_step])
def test_each_part_alone_with_its_optimizer_is_healthy(gan, step):
    model, generator, discriminator = gan
    part, optimizer = (
        (model.generator, generator) if step is generator_step else (model.discriminator, discriminator)
    )
    found = diagnose(part, lambda: step(model), optimizer=optimizer)
    assert not found.findings, found.render()


def test_all_optimizers_may_be_given_and_each_takes_its_trial_step(gan):
    model, *optimizers = gan
    for group in optimizers[1].param_groups:
        group["lr"] = 0.0
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    found = diagnose(model, lambda: generator_step(model), optimizer=optimizers)
    assert causes(found) == ["zero-lr"]
    assert not any(optimizer.state for optimizer in optimizers)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_without_a_second_optimizer_the_part_that_nobody_steps_is_told():
    model = Adversaries()
    optimizer = torch.optim.Adam(model.generator.parameters(), 1e-3)
    found = diagnose(model, lambda: generator_step(model), optimizer=optimizer)
    assert causes(found) == ["not-in-optimizer"]


def test_a_replaced_head_is_one_finding_for_both_mistakes():
    model = nn.ModuleDict({"body": nn.Linear(4, 4), "head": nn.Linear(4, 10)})
    optimizer = torch.optim.AdamW(model.parameters())
    model["head"] = nn.Linear(4, 3)  # finetuning: another number of classes
    found = diagnose(model, lambda: model["head"](model["body"](z())).square().mean(), optimizer=optimizer)
    (finding,) = found.findings
    assert (finding.cause, finding.linked) == ("stale-in-optimizer", ("not-in-optimizer",))
    assert finding.names == ("head.weight", "head.bias")
    assert finding.values["stale"] == 2
    assert finding.to_dict()["linked"] == ["not-in-optimizer"]
    text = found.render("en")
    assert "holds 2 tensors that are no longer the model's, and misses 2 of the model's own" in text


def test_without_a_closure_a_replaced_head_is_told_too():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 10))
    optimizer = torch.optim.AdamW(model.parameters())
    model[1] = nn.Linear(4, 3)
    model(z()).mean().backward()
    (finding,) = diagnose(model, optimizer=optimizer).findings
    assert (finding.cause, finding.names) == ("stale-in-optimizer", ("1.weight", "1.bias"))


def test_a_loss_with_parameters_of_its_own_is_not_stale():
    model, temperature = nn.Linear(4, 4), nn.Parameter(torch.ones(()))
    optimizer = torch.optim.Adam([*model.parameters(), temperature])
    assert diagnose(model, lambda: (model(z()) * temperature).square().mean(), optimizer=optimizer).healthy


def test_a_layer_added_later_beside_a_loss_with_parameters_is_only_missing():
    model, temperature = nn.Sequential(nn.Linear(4, 4)), nn.Parameter(torch.ones(()))
    optimizer = torch.optim.Adam([*model.parameters(), temperature])
    model.append(nn.Linear(4, 1))
    found = diagnose(model, lambda: (model(z()) * temperature).square().mean(), optimizer=optimizer)
    assert causes(found) == ["not-in-optimizer"]


@pytest.mark.parametrize("given", ["adam", 3, [torch.ones(2)]])
def test_what_is_no_optimizer_is_refused(given):
    model = nn.Linear(4, 1)
    with pytest.raises(InputError, match="not an optimizer"):
        diagnose(model, lambda: model(z()).mean(), optimizer=given)


class NaN(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.kind, self.layer = kind, nn.Linear(4, 4)

    def forward(self, inputs):
        h = self.layer(inputs)
        return {"forward": h.sum().log(), "backward": (h - h.detach()).sqrt().sum()}[self.kind]


@pytest.mark.parametrize("kind", ["forward", "backward", "weights"])
@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD])
def test_a_gradient_of_nan_is_not_called_too_small_to_move_a_weight(kind, optimizer):
    model = NaN("forward" if kind == "weights" else kind)
    nn.init.constant_(model.layer.bias, float("nan") if kind == "weights" else -100.0)
    found = diagnose(model, lambda: model(torch.ones(3, 4)), optimizer=optimizer(model.parameters(), 0.1))
    assert {(f.status, f.cause) for f in found.findings} == {
        ("non-finite", "backward" if kind == "backward" else "forward")
    }


def test_what_an_optimizer_does_is_told_beside_a_loss_that_is_not_finite():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    optimizer = torch.optim.SGD(model[1].parameters(), 0.1)
    found = diagnose(model, lambda: model(z()).mean() * float("inf"), optimizer=optimizer)
    assert "not-in-optimizer" in {f.cause for f in found.findings}


@pytest.mark.parametrize(
    ("groups", "told"),
    [
        (1, "learning rate of parameter group 0 is 0"),
        (2, "learning rate of parameter groups 0, 1 is 0"),
        (9, "groups 0, 1, 2, 3, 4, 5 and 3 more is 0"),
    ],
)
def test_groups_that_do_not_move_are_counted(groups, told):
    weights = [nn.Parameter(torch.ones(2)) for _ in range(groups)]
    optimizer = torch.optim.SGD([{"params": [w]} for w in weights], lr=0.0)
    found = diagnose(
        {str(i): w for i, w in enumerate(weights)},
        lambda: torch.stack(weights).square().sum(),
        optimizer=optimizer,
    )
    (finding,) = found.findings
    assert told in finding.say("what", "en")
