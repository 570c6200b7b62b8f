"""Every public call inside every other, and under whatever else is going on: the answers are those alone.

A program may watch its training, diagnose in a callback, run under autocast, be compiled in parts and have a
library that wraps torch's backward, all at once. No call may fail for it, leave something behind, or say
something else.
"""

import contextlib
import itertools
import re

import pytest
import torch
from tests.gradients.traces import trace_of
from torch import nn

from clinometer import attribute, check_gradients, diagnose, explain_step, watch
from clinometer.gradients.check.accumulation import check_accumulation
from clinometer.gradients.check.leakage import check_causality


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.norm, self.out = nn.Embedding(5, 4), nn.LayerNorm(4), nn.Linear(4, 3)
        self.unused = nn.Linear(2, 2)

    def forward(self, tokens):
        return self.out(self.norm(self.embed(tokens))).tanh()


class Program:
    def __init__(self):
        self.inside = None
        """What the closure calls, once, before it computes the loss."""
        torch.manual_seed(0)
        self.net, self.tokens = Net(), torch.arange(12).remainder(5).view(4, 3)
        self.optimizer = torch.optim.AdamW(self.net.parameters())
        self.loss().backward()
        self.optimizer.step()

    def loss(self, rows=slice(None)):
        if self.inside is not None:
            inner, self.inside = self.inside, None
            inner()
        return self.net(self.tokens[rows]).square().mean()

    def diagnose(self):
        return str(diagnose(self.net, self.loss, optimizer=self.optimizer))

    def check_gradients(self):
        return str(check_gradients({"norm.weight": self.net.norm.weight}, self.loss))

    def check_accumulation(self):
        parts = [lambda: self.loss([0, 1]) / 2, lambda: self.loss([2, 3]) / 2]
        return str(check_accumulation(self.net, self.loss, parts))

    def check_causality(self):
        def outputs(x):
            self.loss()
            return self.net.out(x)

        return str(check_causality(self.net, outputs, torch.linspace(0, 1, 24).view(2, 3, 4)))

    def attribute(self):
        return str(attribute(self.net, self.loss, "out.weight", (0, 0), tokens=self.tokens))

    def explain_step(self):
        with explain_step(self.optimizer, self.net, loss=self.loss) as anatomy:
            pass
        return str(anatomy)

    def state(self):
        return trace_of(self.net, self.optimizer)


CALLS = ["diagnose", "check_gradients", "check_accumulation", "check_causality", "attribute", "explain_step"]


def said(text):
    """Without what differs from run to run: seconds."""
    return re.sub(r"[\d.]+ s\b", "… s", " ".join(text.split()))


@pytest.fixture(scope="module")
def alone():
    return {name: said(getattr(Program(), name)()) for name in CALLS}


@pytest.mark.parametrize(("outer", "inner"), [*itertools.product(CALLS, CALLS)])
def test_a_call_inside_a_call_says_what_both_say_alone(alone, outer, inner):
    program, answers = Program(), []
    before = program.state()
    program.inside = lambda: answers.append(said(getattr(program, inner)()))
    assert said(getattr(program, outer)()) == alone[outer]
    assert len(answers) == 1
    # A check runs the model in float64, and any call sets the gradients aside, of which a step would tell.
    if not outer.startswith("check_") and inner != "explain_step":
        assert answers == [alone[inner]]
    assert program.state() == before


@contextlib.contextmanager
def watched(program):
    watcher = watch(program.net, program.optimizer, to=[])
    try:
        yield
        assert not watcher.closed
    finally:
        watcher.close()


@contextlib.contextmanager
def wrapped_backward(_):
    """As a library does that counts backwards, or scales losses."""
    original = torch.autograd.backward

    def theirs(*args, **kwargs):
        return original(*args, **kwargs)

    torch.autograd.backward = theirs
    try:
        yield
        assert torch.autograd.backward is theirs
    finally:
        torch.autograd.backward = original


@contextlib.contextmanager
def compiled(program):
    plain = program.net.norm.forward
    program.net.norm.forward = torch.compile(plain, backend="aot_eager")
    try:
        yield
    finally:
        del program.net.norm.forward


@contextlib.contextmanager
def autocast(_):
    with torch.autocast("cpu", torch.bfloat16):
        yield


SURROUNDINGS = {
    "watch": watched,
    "wrapped backward": wrapped_backward,
    "compile": compiled,
    "autocast": autocast,
}


@pytest.mark.parametrize(
    "surroundings", [c for n in (1, 2) for c in itertools.combinations(SURROUNDINGS, n)], ids="+".join
)
@pytest.mark.parametrize("name", CALLS)
def test_a_call_under_what_else_is_going_on_works_and_leaves_no_trace(alone, name, surroundings):
    program = Program()
    with contextlib.ExitStack() as stack:
        for each in surroundings:
            stack.enter_context(SURROUNDINGS[each](program))
        before = program.state()
        answer = said(getattr(program, name)())
        assert program.state() == before
        assert getattr(program, name)()  # and again
    if not {"autocast", "compile"} & {*surroundings}:
        assert answer == alone[name]
