"""A watched run is the same run, bit for bit, and afterwards nothing is left of the watch."""

import contextlib
import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import nn

from clinometer.monitoring.watch import watch
from tests.monitoring.sink import Kept


def model_of():
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Linear(8, 32), nn.Tanh(), nn.Dropout(0.1), nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 4)
    )


def batches(count=20):
    generator = torch.Generator().manual_seed(5)
    return [
        (torch.randn(6, 8, generator=generator), torch.randint(4, (6,), generator=generator))
        for _ in range(count)
    ]


def plain(model, optimizer):
    for x, y in batches():
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        yield loss


def clipped(model, optimizer):
    for x, y in batches():
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.3)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        yield loss


def value_clipped(model, optimizer):
    for x, y in batches():
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        nn.utils.clip_grad_value_(model.parameters(), 0.01)
        optimizer.step()
        optimizer.zero_grad()
        yield loss


def accumulated(model, optimizer):
    for index, (x, y) in enumerate(batches(40)):
        loss = nn.functional.cross_entropy(model(x), y) / 4
        loss.backward()
        if index % 4 == 3:
            optimizer.step()
            optimizer.zero_grad()
        yield loss


def scaled(dtype):
    def loop(model, optimizer):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40 if dtype == torch.float16 else 2.0**10)
        for x, y in batches(40):
            with torch.autocast("cpu", dtype=dtype):
                loss = nn.functional.cross_entropy(model(x), y)
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            yield loss

    return loop


def all_in_autocast(model, optimizer):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        yield from plain(model, optimizer)


def with_closure(model, optimizer):
    for x, y in batches(10):

        def closure(x=x, y=y):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            return loss

        yield optimizer.step(closure)


def with_groups_later(model, optimizer):
    for index, (x, y) in enumerate(batches()):
        if index == 5:
            model.append(nn.Linear(4, 4))
            optimizer.add_param_group({"params": list(model[-1].parameters()), "lr": 0.05})
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        yield loss


def compiled(model, optimizer):
    torch.compiler.reset()
    fast = torch.compile(model, backend="aot_eager")
    for x, y in batches():
        loss = nn.functional.cross_entropy(fast(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        yield loss


def whole_step_compiled(model, optimizer):
    torch.compiler.reset()

    @torch.compile(backend="eager")
    def step(x, y):
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        return loss

    for x, y in batches():
        loss = step(x, y)
        optimizer.step()
        optimizer.zero_grad()
        yield loss


def with_backward_hooks(model, optimizer):
    """The optimizer steps inside backward, as each gradient arrives."""
    parts = {p: torch.optim.SGD([p], lr=0.1) for p in model.parameters()}

    def step(p):
        parts[p].step()
        p.grad = None

    handles = [p.register_post_accumulate_grad_hook(step) for p in model.parameters()]
    for x, y in batches():
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        yield loss
    for handle in handles:
        handle.remove()


def SGD(params):
    return torch.optim.SGD(params, lr=0.1, momentum=0.9)


def ADAMW(params):
    return torch.optim.AdamW(params, lr=1e-2)


def FUSED(params):
    return torch.optim.AdamW(params, lr=1e-2, fused=True)


def LBFGS(params):
    return torch.optim.LBFGS(params, lr=0.5, max_iter=4)


RUNS = {
    "sgd": (plain, SGD),
    "adamw": (plain, ADAMW),
    "fused": (plain, FUSED),
    "clipped": (clipped, ADAMW),
    "clipped-fused": (clipped, FUSED),
    "value-clipped": (value_clipped, SGD),
    "accumulated": (accumulated, ADAMW),
    "scaled-float16": (scaled(torch.float16), ADAMW),
    "scaled-bfloat16-fused": (scaled(torch.bfloat16), FUSED),
    "autocast": (all_in_autocast, ADAMW),
    "closure": (with_closure, SGD),
    "lbfgs": (with_closure, LBFGS),
    "groups-later": (with_groups_later, ADAMW),
    "compiled": (compiled, ADAMW),
    "whole-step-compiled": (whole_step_compiled, SGD),
    "backward-hooks": (with_backward_hooks, SGD),
}


def run(name, watched):
    loop, make = RUNS[name]
    model = model_of()
    optimizer = make(model.parameters())
    sink = Kept()
    torch.manual_seed(11)
    with watch(model, optimizer, to=sink) if watched else contextlib.nullcontext():
        losses = [float(loss.detach()) for loss in loop(model, optimizer)]
    return losses, copy.deepcopy(model.state_dict()), torch.get_rng_state(), sink


@pytest.mark.parametrize("name", RUNS)
# torch's own word about the interpreter, when it compiles on Python 3.13.0; the upper filter comes first.
@pytest.mark.filterwarnings("ignore:Guards may run slower on Python 3.13.0:RuntimeWarning")
@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_a_watched_run_has_the_same_bits(name):
    without, weights, state, _ = run(name, watched=False)
    losses, watched_weights, watched_state, sink = run(name, watched=True)
    assert losses == without
    for key, weight in weights.items():
        assert torch.equal(weight, watched_weights[key]), key
    assert torch.equal(state, watched_state)
    assert sink.state == "done"
    if name != "backward-hooks":
        assert len(sink.rows) == {"closure": 10, "lbfgs": 10, "accumulated": 10}.get(name, len(without))


def test_two_optimizers_make_one_row_a_round():
    def alternate(watched):
        torch.manual_seed(1)
        one, two = model_of(), nn.Linear(4, 1)
        both = nn.ModuleList([one, two])
        a, b = ADAMW(one.parameters()), SGD(two.parameters())
        sink = Kept()
        with watch(both, [a, b], to=sink) if watched else contextlib.nullcontext():
            for x, _ in batches():
                for optimizer in (b, a):
                    (two(one(x)).square().mean()).backward()
                    optimizer.step()
                    both.zero_grad()
        return copy.deepcopy(both.state_dict()), sink

    without, _ = alternate(False)
    weights, sink = alternate(True)
    assert all(torch.equal(weights[key], without[key]) for key in weights)
    assert [row[0] for row in sink.rows] == list(range(1, 21))
    assert all(
        value > 0 for value in sink.of("0.0.weight", "update_norm") + sink.of("1.weight", "update_norm")
    )


def seams():
    places = [torch.autograd.backward, torch.nn.utils.clip_grad._clip_grads_with_norm_]
    places += [torch.nn.utils.clip_grads_with_norm_, torch.nn.utils.clip_grad_value_]
    scaler = torch.amp.GradScaler
    return [*places, scaler.scale, scaler.unscale_, scaler.step]


def test_close_takes_every_hook_away():
    from clinometer import clip_observers

    before = seams()
    model = model_of()
    optimizer = ADAMW(model.parameters())
    first, second = watch(model, optimizer, to=Kept()), watch(model, optimizer, to=Kept())
    assert seams() != before
    assert not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in model.modules())
    first.close()
    assert seams() != before
    second.close()
    second.close()
    assert seams() == before
    assert clip_observers.observers == []
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


def test_model_and_optimizer_can_be_copied_pickled_and_freed():
    model = model_of()
    optimizer = ADAMW(model.parameters())
    sink = Kept()
    watch(model, optimizer, to=sink)
    list(plain(model, optimizer))
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert list(copied.state_dict()) == list(model.state_dict())
    twin, twin_optimizer = copy.deepcopy((model, optimizer))
    assert not twin_optimizer._optimizer_step_pre_hooks
    pickle.loads(pickle.dumps(optimizer))
    steps = len(sink.rows)
    list(plain(twin, twin_optimizer))
    assert len(sink.rows) == steps
    gone = [weakref.ref(model), weakref.ref(optimizer)]
    del model, optimizer, twin, twin_optimizer, copied
    gc.collect()
    assert [reference() for reference in gone] == [None, None]
    assert sink.state == "done"
    assert len(sink.rows) == 20


def test_an_exception_of_the_watch_is_one_warning_and_the_training_goes_on(monkeypatch):
    from clinometer.monitoring import step

    model = model_of()
    optimizer = ADAMW(model.parameters())
    sink = Kept()
    watching = watch(model, optimizer, to=sink)
    monkeypatch.setattr(step.StepWatch, "before_step", lambda *_: 1 / 0)
    with pytest.warns(RuntimeWarning, match="ZeroDivisionError") as seen:
        losses = list(plain(model, optimizer))
    assert len(seen) == 1
    assert len(losses) == 20
    assert watching.closed
    assert sink.state == "failed"


def test_a_sink_that_fails_is_dropped_and_the_others_go_on():
    class Full(Kept):
        def step(self, *_):
            raise OSError("no space left")

    model = model_of()
    optimizer = ADAMW(model.parameters())
    good = Kept()
    with pytest.warns(RuntimeWarning, match="no space left") as seen:
        with watch(model, optimizer, to=[Full(), good]):
            list(plain(model, optimizer))
    assert len(seen) == 1
    assert len(good.rows) == 20


def test_an_exception_of_the_loop_passes_through():
    model = model_of()
    optimizer = ADAMW(model.parameters())
    sink = Kept()
    with pytest.raises(RuntimeError, match="does not require grad"):
        with watch(model, optimizer, to=sink):
            torch.ones(()).backward()
    assert sink.state == "failed"
