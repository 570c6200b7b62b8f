"""Ctrl-C at every line of ours, in a process of its own.

    python -m tests.gradients.sandbox.interrupting CALL EVERY

Counts the lines of the instrument (and of contextlib, which opens and closes its blocks) that a call
executes, and sends SIGINT at each `EVERY`-th in a run of its own. After each run nothing may be left behind,
and the signal must have come through. Prints a line of JSON.
"""

from __future__ import annotations

import contextlib
import json
import signal
import sys

import torch
from tests.gradients.traces import trace_of
from torch import nn
from torch.nn.modules import module as modules
from torch.overrides import _get_current_function_mode_stack

from clinometer import attribute, check_gradients, diagnose, explain_step
from clinometer.gradients.check.accumulation import check_accumulation
from clinometer.gradients.check.leakage import check_causality
from clinometer.gradients.sandbox.code_origin import is_instrument


class Net(nn.Module):
    """Dropout draws, BatchNorm updates, a dead unit and a cut give each call something to explain."""

    def __init__(self):
        super().__init__()
        self.embed, self.norm, self.out = nn.Embedding(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)
        self.drop, self.unused = nn.Dropout(0.2), nn.Linear(2, 2)

    def forward(self, tokens):
        h = self.norm(self.embed(tokens).mean(1))
        return self.drop(self.out(h).relu()) + self.out(h.detach())


class Program:
    """A model, an optimizer that has stepped, and one call of the instrument."""

    def __init__(self, call):
        torch.manual_seed(0)
        self.net, self.tokens = Net(), torch.arange(12).remainder(5).view(4, 3)
        self.optimizer = torch.optim.AdamW(self.net.parameters())
        self.loss().backward()
        self.optimizer.step()
        self.call = getattr(self, call)

    def loss(self):
        return self.net(self.tokens).square().mean()

    def diagnose(self):
        diagnose(self.net, self.loss, optimizer=self.optimizer)

    def check_gradients(self):
        check_gradients({"norm.weight": self.net.norm.weight, "out.bias": self.net.out.bias}, self.loss)

    def check_accumulation(self):
        def of(rows):
            return lambda: self.net.eval()(self.tokens[rows]).square().mean()

        check_accumulation(self.net, of(slice(0, 4)), [of([0, 1]), of([2, 3])])

    def check_causality(self):
        check_causality(self.net, lambda x: self.net.eval().out(self.net.embed(x)), self.tokens)

    def attribute(self):
        attribute(self.net, self.loss, "out.weight", (0, 0), tokens=self.tokens)

    def explain_step(self):
        with explain_step(self.optimizer, self.net, loss=self.loss):
            pass  # a step would change the weights, as it should

    def state(self):
        return trace_of(self.net, self.optimizer), _left_behind()


def _left_behind():
    """What is set for the process as a whole: hooks on all modules, modes, torch's functions, the handler."""
    hooks = {
        k: len(v) for k, v in vars(modules).items() if k.startswith("_global_") and hasattr(v, "__len__")
    }
    functions = torch.autograd.backward, torch.autograd.grad, torch.Tensor.backward, nn.Module.__call__
    return (
        hooks,
        len(_get_current_function_mode_stack()),
        [id(f) for f in functions],
        signal.getsignal(signal.SIGINT) is signal.default_int_handler,
    )


def lines_of(call, at=None):
    """How many lines of ours the call executes; with `at`, SIGINT comes at the line of that number."""
    count = 0

    def line(frame, event, _):
        nonlocal count
        if event == "line":
            count += 1
            if count == at:
                sys.settrace(None)  # what follows runs at full speed
                signal.getsignal(signal.SIGINT)(signal.SIGINT, frame)  # as if it had come just now
        return line

    def called(frame, *_):
        file = frame.f_code.co_filename
        return line if is_instrument(file) or file == contextlib.__file__ else None

    sys.settrace(called)
    try:
        call()
    finally:
        sys.settrace(None)
    return count


def main(name, every):
    first = Program(name)
    first.call()  # what is made once, at first use
    total = lines_of(Program(name).call)
    wrong, runs, cut = [], 0, 0
    program = Program(name)
    before = program.state()
    for at in range(1 + every // 2, total + 1, every):
        try:
            if lines_of(program.call, at) < at:  # a run is a few lines shorter or longer than another
                continue
            wrong.append([at, "the signal was swallowed"])
        except KeyboardInterrupt:
            cut += 1
        runs += 1
        after = program.state()
        if after != before:
            parts = [k for k in after[0] if after[0][k] != before[0][k]] or ["process"]
            wrong.append([at, f"left behind: {', '.join(parts)} {after[1] if parts == ['process'] else ''}"])
            program = Program(name)
            before = program.state()
    print(json.dumps({"lines": total, "runs": runs, "cut": cut, "wrong": wrong}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
