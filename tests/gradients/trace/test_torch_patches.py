"""Torch's functions are wrapped once, whoever listens, and come back with the last listener to leave."""

import functools
import itertools
import threading
import types

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from clinometer import attribute, explain_step, watch
from clinometer.gradients.trace.torch_patches import in_this_thread, patch, patched


def plain(value):
    return value


class Owner:
    def method(self, value):
        return value

    @classmethod
    def of_class(cls, value):
        return cls, value

    @staticmethod
    def static(value):
        return value


@pytest.fixture
def module():
    module = types.ModuleType("owner")
    module.plain = plain
    return module


def listener(heard, name):
    def around(call, *args, **kwargs):
        heard.append(name)
        return call(*args, **kwargs)

    return around


def wrap_by_hand(owner, name):
    """What another library does: keeps what is there, puts its own on top; returns what undoes it."""
    before = getattr(owner, name)

    @functools.wraps(before)
    def theirs(*args, **kwargs):
        theirs.called += 1
        return before(*args, **kwargs)

    theirs.called = 0
    setattr(owner, name, theirs)
    return theirs, lambda: setattr(owner, name, before)


def orders(users):
    """Every order in which users can enter and leave, as [(name, enters)]."""
    events = [(name, enters) for name in users for enters in (True, False)]
    for order in itertools.permutations(events):
        if all(order.index((name, True)) < order.index((name, False)) for name in users):
            yield order


@pytest.mark.parametrize("users", ["ab", "abc"])
def test_in_every_order_of_entering_and_leaving_each_hears_its_own_time_and_the_original_returns(
    users, module
):
    for order in orders(users):
        inside, removers, heard = [], {}, []
        for name, enters in order:
            if enters:
                removers[name] = patch(module, "plain", listener(heard, name))
                inside.append(name)
            else:
                removers[name]()
                inside.remove(name)
            heard.clear()
            assert module.plain(3) == 3
            assert heard == inside[::-1], order
            wrapped_once = module.plain is plain or module.plain.__wrapped__ is plain
            assert wrapped_once, order
        assert module.plain is plain


@pytest.mark.parametrize("users", ["ab", "abc"])
def test_a_wrapper_of_somebody_else_stays_and_hears_everything_wherever_it_comes_between(users, module):
    """For every order of ours, theirs wraps after each event, and unwraps after each later one."""
    for order in orders(users):
        for begins, ends in itertools.combinations(range(len(order)), 2):
            module.plain = plain
            inside, removers, heard = [], {}, []
            theirs, undo = None, None
            for position, (name, enters) in enumerate(order):
                if enters:
                    removers[name] = patch(module, "plain", listener(heard, name))
                    inside.append(name)
                else:
                    removers[name]()
                    inside.remove(name)
                if position == begins:
                    theirs, undo = wrap_by_hand(module, "plain")
                if position == ends:
                    above = module.plain is not theirs  # one of ours came after: to undo takes it out, too
                    undo()
                    theirs = None
                    if above:
                        break
                heard.clear()
                before = theirs.called if theirs else 0
                assert module.plain(3) == 3
                assert sorted(heard) == sorted(inside), (order, begins, ends)
                if theirs:
                    assert theirs.called == before + 1
            for remove in removers.values():
                remove()
            patch(module, "plain", listener([], "later"))()
            assert module.plain is plain, (order, begins, ends)


def test_a_wrapper_of_somebody_else_that_stays_gets_calls_passed_through(module):
    heard = []
    with patched(module, "plain", listener(heard, "a")):
        theirs, undo = wrap_by_hand(module, "plain")
    assert module.plain is theirs
    assert module.plain(3) == 3
    assert heard == []
    with patched(module, "plain", listener(heard, "b")):
        assert module.plain(4) == 4
        assert heard == ["b"]
    assert module.plain is theirs
    assert theirs.called == 2
    undo()  # brings our idle wrapper back, which passes through, and goes at the next occasion
    assert module.plain(5) == 5
    patch(module, "plain", listener(heard, "c"))()
    assert module.plain is plain


def test_methods_class_methods_static_methods_and_inherited_ones_are_wrapped_and_come_back():
    class Below(Owner):
        pass

    before = {name: vars(Owner)[name] for name in ("method", "of_class", "static")}
    heard, below = [], Below()
    for owner in (Owner, Below):
        for name in before:
            with patched(owner, name, listener(heard, name)):
                assert below.method(1) == 1
                assert Below.of_class(1) == (Below, 1)
                assert Below.static(1) == below.static(1) == 1
            assert heard.count(name) == (2 if name == "static" else 1)
            heard.clear()
    assert {name: vars(Owner)[name] for name in before} == before
    assert not before.keys() & vars(Below).keys()


def test_what_torch_does_not_have_is_left_alone(module):
    remove = patch(module, "of_another_version", listener([], "a"))
    remove()
    assert not hasattr(module, "of_another_version")


def test_to_leave_twice_does_no_harm_and_an_error_passes(module):
    def fails(call, *args):
        raise ValueError("planted")

    remove, other = patch(module, "plain", fails), patch(module, "plain", listener([], "b"))
    with pytest.raises(ValueError, match="planted"):
        module.plain(1)
    remove()
    remove()
    assert module.plain(1) == 1
    other()
    assert module.plain is plain
    heard = []
    with patched(module, "plain", listener(heard, "c")):
        other()  # of a time that is over
        with patched(module, "plain", listener(heard, "d")):
            assert module.plain(2) == 2
    assert heard == ["d", "c"]
    assert module.plain is plain


def test_threads_that_enter_and_leave_at_once_leave_the_original(module):
    errors, barrier = [], threading.Barrier(8)

    def work():
        try:
            barrier.wait()
            for _ in range(200):
                heard = []
                with patched(module, "plain", in_this_thread(listener(heard, "mine"))):
                    assert module.plain(7) == 7
                    assert heard == ["mine"]
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert module.plain is plain


# ---- the instrument's own users ----


def amp_step(scaler, optimizer, loss):
    optimizer.zero_grad()
    scaler.scale(loss()).backward()
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()


def scene():
    torch.manual_seed(0)
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = torch.randn(3, 4)
    return model, optimizer, (lambda: model(x).square().mean()), torch.amp.GradScaler("cpu", init_scale=64.0)


@pytest.mark.parametrize("first_out", ["watch", "step"])
@pytest.mark.parametrize("first_in", ["watch", "step"])
def test_a_watch_and_explain_step_hear_unscaling_in_every_order(first_in, first_out):
    original = torch.amp.GradScaler.unscale_
    model, optimizer, loss, scaler = scene()
    step = explain_step(optimizer, model)
    watching = None
    if first_in == "watch":
        watching = watch(model, optimizer, to=[])
    step.__enter__()
    watching = watching or watch(model, optimizer, to=[])
    heard = []
    watching.unscaled = lambda given: heard.append(given)  # what torch_calls tells it
    amp_step(scaler, optimizer, loss)
    assert heard == [optimizer]
    if first_out == "watch":
        watching.close()
        step.__exit__(None, None, None)
    else:
        step.__exit__(None, None, None)
        amp_step(scaler, optimizer, loss)
        assert len(heard) == 2
        watching.close()
    assert torch.amp.GradScaler.unscale_ is original


def test_attribute_runs_a_backward_of_its_own_while_a_watch_lives():
    """It opens torch.autograd.backward up; opening our wrapper instead made it call itself without end."""
    model, optimizer, _, _ = scene()
    x = torch.ones(3, 4, requires_grad=True)

    def loss():
        return checkpoint(model, x, use_reentrant=True).mean()

    def pushes():
        found = attribute(model, loss, "weight", (0, 0)).to_dict()
        return {key: value for key, value in found.items() if key != "seconds"}

    alone = pushes()
    watching = watch(model, optimizer, to=[])
    try:
        found = pushes()
        found["uses"][0]["where"]["stack"] = alone["uses"][0]["where"]["stack"]  # this test's own lines
        assert found == alone
    finally:
        watching.close()
