"""The remedy names the module to freeze: the largest that holds what is concerned and nothing else."""

import fnmatch

import pytest
import torch
from torch import nn

from clinometer.gradients.diagnose.diagnose import diagnose
from clinometer.gradients.report.finding import Finding
from clinometer.gradients.report.module_names import owners
from clinometer.gradients.sandbox.subject import Subject


def freezing(names, subject):
    return Finding("cut", "none", "fault", "diagnosis.none.cut", owners=owners(names, subject)).freeze


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Module()
        self.encoder.embed, self.encoder.layers = nn.Linear(4, 4), nn.ModuleList([nn.Linear(4, 4)] * 1)
        self.encoder.layers.append(nn.Linear(4, 4))
        self.head = nn.Linear(4, 1)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x):
        h = self.encoder.embed(x)
        for layer in self.encoder.layers:
            h = torch.tanh(layer(h))
        return self.head(h.detach()) * self.scale


@pytest.mark.parametrize(
    ("names", "code"),
    [
        (["encoder.*"], "encoder.requires_grad_(False)"),
        (["encoder.layers.1.*"], "encoder.layers[1].requires_grad_(False)"),
        (["encoder.layers.*"], "encoder.layers.requires_grad_(False)"),
        (["encoder.layers.1.weight"], "encoder.layers[1].weight.requires_grad_(False)"),
        (["encoder.embed.*", "scale"], "encoder.embed.requires_grad_(False), scale.requires_grad_(False)"),
        (["encoder.embed.*", "encoder.layers.0.*", "head.*", "scale"], ""),
    ],
)
def test_the_largest_modules_that_hold_nothing_else(names, code):
    subject = Subject.of(Model())
    matched = [n for p in names for n in subject.tensors if fnmatch.fnmatchcase(n, p)]
    assert freezing(matched, subject) == code


def test_what_rests_already_does_not_matter():
    model = Model()
    model.encoder.embed.requires_grad_(False)
    subject = Subject.of(model)
    names = [name for name in subject.tensors if name.startswith("encoder.layers")]
    assert freezing(names, subject) == "encoder.requires_grad_(False)"


def test_a_tied_weight_elsewhere_is_not_frozen_with_a_module():
    model = Model()
    model.encoder.layers[1].weight = model.head.weight = nn.Parameter(torch.randn(4, 4))
    subject = Subject.of(model)
    assert freezing(["encoder.layers.1.bias"], subject) == "encoder.layers[1].bias.requires_grad_(False)"


def test_layers_of_a_sequential_are_written_as_python():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    assert freezing(["0.weight", "0.bias"], Subject.of(model)) == "model[0].requires_grad_(False)"


def test_tensors_without_a_module_are_named_themselves():
    weights = {"w": torch.ones(2, requires_grad=True), "v": torch.ones(2, requires_grad=True)}
    assert freezing(["w"], Subject.of(weights)) == "w.requires_grad_(False)"


def test_the_remedy_is_code_that_makes_the_finding_an_intention():
    model = Model()
    (finding,) = diagnose(model, lambda: model(torch.ones(3, 4)).mean()).findings
    assert (
        finding.say("remedy", "en") == "Remove it; or, if it is meant, say so: encoder.requires_grad_(False)."
    )
    assert finding.say("remedy", "zh") == "去掉它；如果是有意为之，请写明：encoder.requires_grad_(False)。"
    exec(finding.freeze, {"encoder": model.encoder})
    assert diagnose(model, lambda: model(torch.ones(3, 4)).mean()).healthy


def test_many_places_are_left_to_words():
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(5)), nn.Linear(4, 1))
    (finding,) = diagnose(model, lambda: model[-1](model[:-1](torch.ones(3, 4)).detach()).mean()).findings
    assert finding.say("remedy", "en").endswith("say so: requires_grad_(False) on these parameters.")
