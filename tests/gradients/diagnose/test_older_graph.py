"""A tensor that is older than this call of the closure and still carries a graph is named, wherever it lives.

torch's own error passes, with a note that names the tensor and the line, in diagnose and check_gradients.
"""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from clinometer.gradients.check.check_gradients import check_gradients
from clinometer.gradients.diagnose.diagnose import diagnose

TOOLS = [diagnose, check_gradients]
state = None


def x():
    return torch.linspace(-1, 1, 24).reshape(6, 4)


class Recurrent(nn.Module):
    def __init__(self, detached):
        super().__init__()
        self.cell, self.detached = nn.GRUCell(4, 4), detached
        self.hidden = (torch.zeros(6, 4),)

    def forward(self, inputs):
        before = self.hidden[0].detach() if self.detached else self.hidden[0]
        self.hidden = (self.cell(inputs, before),)  # <- here
        return self.hidden[0]


class InAList(nn.Module):
    def __init__(self, anew):
        super().__init__()
        self.first, self.cell, self.anew, self.kept = (
            nn.Parameter(torch.randn(4, 4)),
            nn.GRUCell(4, 4),
            anew,
            [],
        )

    def forward(self, inputs):
        if self.anew or not self.kept:
            self.kept[:] = [self.first]
        self.kept[0] = self.cell(self.kept[0], self.kept[0])  # <- here
        return inputs @ self.kept[0]


def in_an_attribute():
    model = Recurrent(False)
    return model, lambda: model(x()).square().mean(), "hidden[0]"


def in_a_list():
    model = InAList(False)
    return model, lambda: model(x()).square().mean(), "kept[0]"


def in_a_global():
    global state
    state = torch.zeros(6, 4)
    model = nn.GRUCell(4, 4)

    def loss():
        global state
        state = model(x(), state)  # <- here
        return state.square().mean()

    return model, loss, "state"


def in_a_variable():
    model, memory = nn.GRUCell(4, 4), {"h": torch.zeros(6, 4)}

    def loss():
        memory["h"] = model(x(), memory["h"])  # <- here
        return memory["h"].square().mean()

    return model, loss, "memory['h']"


def in_an_object():
    model, agent = nn.GRUCell(4, 4), SimpleNamespace(h=torch.zeros(6, 4))

    def loss():
        agent.h = model(x(), agent.h)  # <- here
        return agent.h.square().mean()

    return model, loss, "agent.h"


def computed_once():
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1))
    features = model[:2](x())
    return model, lambda: model[2](features).square().mean(), "features"  # <- here


@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize(
    "form", [in_an_attribute, in_a_list, in_a_global, in_a_variable, in_an_object, computed_once]
)
def test_the_tensor_and_the_line_are_named_in_a_note_to_torch_s_error(form, tool):
    model, loss, name = form()
    loss().backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time") as caught:
        tool(model, loss)
    (note,) = caught.value.__notes__
    assert name in note
    assert "# <- here" in note or form is computed_once
    assert "test_older_graph.py:" in note
    assert "detach" in note.lower()


@pytest.mark.parametrize("tool", TOOLS)
def test_a_tensor_that_no_name_leads_to_is_told_by_its_line(tool):
    model = nn.GRUCell(4, 4)

    def losses():
        hidden = torch.zeros(6, 4)
        while True:
            hidden = model(x(), hidden)
            yield hidden.square().mean()

    each = losses()
    next(each).backward()
    with pytest.raises(RuntimeError, match="second time") as caught:
        tool(model, lambda: next(each))
    assert "uses a tensor that was computed before" in caught.value.__notes__[0]


@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize("model", [Recurrent(True), InAList(True)], ids=["detached", "set anew"])
def test_a_state_that_is_detached_or_set_anew_is_healthy(model, tool):
    model(x()).square().mean().backward()
    model.zero_grad()
    found = tool(model, lambda: model(x()).square().mean())
    assert not found.findings, found.render()


@pytest.mark.parametrize("tool", TOOLS)
def test_a_graph_that_is_still_there_is_explained_and_left_as_it_is(tool):
    model, loss, name = computed_once()
    found = tool(model, loss)
    (finding,) = (f for f in found.findings if f.cause == "older-graph")
    assert finding.severity == "explained"
    assert name in finding.say("what", "en")
    assert "✓" not in found.render("en")
    loss().backward()  # nobody has used up the graph of features


def test_a_loss_that_was_computed_before_may_be_asked_about():
    model = nn.Linear(4, 1)
    loss = model(x()).square().mean()
    assert not diagnose(model, lambda: loss).findings
    loss.backward()
