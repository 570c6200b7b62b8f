"""While diagnose runs, other threads compute as ever; two diagnoses wait for each other."""

import threading

import pytest
import torch
from torch import nn

from clinometer.gradients.diagnose.diagnose import diagnose
from clinometer.gradients.trace import function_calls


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value):
        return value * 2

    @staticmethod
    def backward(ctx, gradient):
        return gradient * 2


class Loader(threading.Thread):
    """Prepares batches with all that diagnose patches: a Function, a Parameter, modules, inference_mode."""

    def __init__(self):
        super().__init__(daemon=True)
        self.stop, self.rounds, self.wrong, self.error = threading.Event(), 0, [], None
        self.went_round = threading.Event()

    def run(self):
        try:
            layer = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
            while not self.stop.is_set():
                w = nn.Parameter(torch.ones(4))
                Double.apply(w).sum().backward()
                with torch.inference_mode():
                    quiet = layer(w)
                if not torch.equal(w.grad, torch.full((4,), 2.0)) or quiet.requires_grad:
                    self.wrong.append(self.rounds)
                with torch.no_grad():
                    layer(w.detach())
                self.rounds += 1
                self.went_round.set()
        except Exception as error:
            self.error = error
            self.went_round.set()

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *_):
        self.stop.set()
        self.join()


class Cut(nn.Module):
    def __init__(self, loader):
        super().__init__()
        self.encoder, self.head, self.loader = nn.Linear(4, 4), nn.Linear(4, 1), [loader]

    def forward(self, inputs):
        h = Double.apply(self.encoder(inputs))
        for _ in range(3):  # the other thread goes round in the middle of this forward
            self.loader[0].went_round.clear()
            assert self.loader[0].went_round.wait(300)
        h = h.detach()  # planted
        return self.head(h)


def line_of(text):
    with open(__file__) as lines:
        return next(i for i, line in enumerate(lines, 1) if line.strip() == text)


def assert_cut(found):
    (finding,) = found.findings
    assert (finding.cause, finding.where.line) == ("cut", line_of("h = h.detach()  # planted"))
    assert set(finding.names) == {"encoder.weight", "encoder.bias"}
    assert finding.where.module == ""


def test_another_thread_computes_undisturbed_and_is_not_taken_for_the_model():
    with Loader() as loader:
        model = Cut(loader)
        for _ in range(5):
            assert_cut(diagnose(model, lambda: model(torch.ones(3, 4)).mean()))
    assert loader.error is None
    assert not loader.wrong
    assert loader.rounds >= 15


def test_only_the_thread_that_asks_is_seen():
    seen, modules = [], []

    def function(cls, call, args):
        seen.append("apply")
        return call()

    def elsewhere():
        with torch.inference_mode():
            nn.Linear(2, 2)(torch.ones(2))
        Double.apply(torch.ones(2, requires_grad=True))

    def parameter(data, made):
        seen.append("parameter")

    def inference(entered):
        seen.append("inference")

    with function_calls.seen_calls(function, parameter, modules, inference):
        other = threading.Thread(target=elsewhere)
        other.start()
        other.join()
        assert seen == []
        elsewhere()
    assert set(seen) == {"apply", "parameter", "inference"}


def test_two_diagnoses_at_once_wait_for_each_other():
    inside, most, errors, lock = 0, 0, [], threading.Lock()
    barrier = threading.Barrier(4)
    shared = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Linear(4, 1))
    before = {name: p.detach().clone() for name, p in shared.named_parameters()}
    apply = vars(torch.autograd.Function)["apply"]

    def closure():
        nonlocal inside, most
        with lock:
            inside += 1
            most = max(most, inside)
        threading.Event().wait(0.02)
        loss = shared[2](shared[1](shared[0](torch.ones(3, 4))).detach()).square().mean()
        with lock:
            inside -= 1
        return loss

    def ask():
        try:
            barrier.wait()
            found = diagnose(shared, closure, optimizer=torch.optim.SGD(shared.parameters(), 0.1))
            assert found["0.weight"].cause == "cut", found.render()
            assert found["2.weight"].status != "none", found.render()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert most == 1
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in shared.named_parameters())
    assert vars(torch.autograd.Function)["apply"] is apply  # as torch made it


def test_an_error_lets_the_next_thread_in():
    def fails():
        raise ValueError("planted")

    model = nn.Linear(4, 1)
    with pytest.raises(ValueError, match="planted"):
        diagnose(model, fails)
    found = []
    other = threading.Thread(
        target=lambda: found.append(diagnose(model, lambda: model(torch.ones(3, 4)).mean()))
    )
    other.start()
    other.join(30)
    assert found
    assert found[0].healthy
